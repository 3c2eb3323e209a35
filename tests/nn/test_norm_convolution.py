"""Batch norms whose backward runs with that of the convolution behind them: same values and derivatives, and when."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseblock
from fuseblock import _conv_engine, dispatch
from fuseblock.nn import _fused_convolution

from ..backends import _ON_GPU, DEVICE, available
from ..ops.conv_stats_cases import Masks
from .test_fused_convolution import everything

pytestmark = _ON_GPU


@pytest.fixture
def triton() -> Iterator[None]:
    with available("triton"), fuseblock.backend("triton"):
        yield


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that the operator was run on, in order."""
    seen: list[Tensor] = []
    run = dispatch.run

    def note(op: str, args: tuple[object, ...]) -> object:
        seen.extend([args[2]] if op == "norm_act_conv_bwd" else [])  # type: ignore[list-item]
        return run(op, args)

    monkeypatch.setattr(dispatch, "run", note)
    return seen


def model() -> nn.Sequential:
    """Every kind of convolution behind a norm, with an activation between or none; statistics given, too."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.LeakyReLU(0.2),
        nn.Conv2d(3, 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 3, 4, 2, 1),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        nn.Conv2d(3, 3, 3, padding=(1, 0), groups=3),
    )


def fused(net: nn.Sequential) -> nn.Sequential:
    net = copy.deepcopy(net)
    fuseblock.fuse(net, verbose=False)
    return net


def first_order(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *net.parameters()]), *net.buffers()]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_derivatives_are_the_stock_ones(
    layout: torch.memory_format, backwards: list[Tensor]
) -> None:
    torch.manual_seed(0)
    stock = model().double().to(DEVICE)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, device=DEVICE).contiguous(memory_format=layout)
    # A backward that is recorded runs on operators; the one behind it goes through the forward again.
    for derivatives in (first_order, everything):
        backwards.clear()
        mine, plain = fused(stock), copy.deepcopy(stock)
        for _ in range(2):  # running statistics move on
            for got, want in zip(derivatives(mine, x), derivatives(plain, x), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        assert len(backwards) == 2 * 3


@pytest.mark.usefixtures("triton")
def test_only_the_gradients_asked_for(backwards: list[Tensor]) -> None:
    net = fused(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3))).to(DEVICE)
    x = torch.randn(2, 2, 5, 5, device=DEVICE, requires_grad=True)
    norm, conv = net[0], net[2]

    def masks(wanted: list[Tensor], create_graph: bool = False) -> list[list[bool]]:
        y = net(x)
        with Masks() as seen:
            found = torch.autograd.grad(y.sum(), wanted, create_graph=create_graph)
        assert [g.shape for g in found] == [t.shape for t in wanted]
        return seen.seen

    assert (masks([x]), len(backwards)) == ([], 1)
    assert (masks([norm.bias]), len(backwards)) == ([], 2)
    assert (masks([norm.weight]), len(backwards)) == ([], 3)
    assert (masks([conv.weight, conv.bias]), len(backwards)) == ([[False, True, False]], 3)
    assert (masks([x, conv.weight]), len(backwards)) == ([[False, True, False]], 4)
    for wanted in ([x], [norm.weight]):
        assert (masks(wanted, create_graph=True), len(backwards)) == ([[True, False, False]], 4)
    assert masks([conv.weight], create_graph=True) == [[False, True, False]]
    conv.requires_grad_(False)
    net(x).sum().backward()
    assert len(backwards) == 5
    assert conv.weight.grad is None
    assert norm.weight.grad is not None


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> None:
        return None


@pytest.mark.usefixtures("triton")
def test_batched_and_undefined_gradients(backwards: list[Tensor]) -> None:
    net = fused(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3))).double().to(DEVICE)
    x = torch.randn(2, 2, 4, 5, device=DEVICE, dtype=torch.float64, requires_grad=True)
    y = net(x)
    several = torch.randn(3, *y.shape, device=DEVICE, dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, x, several, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in several]
    torch.testing.assert_close(batched, torch.stack(each))
    count = len(backwards)
    assert torch.autograd.grad(NoGradient.apply(y), x, torch.ones_like(y), allow_unused=True) == (None,)
    assert len(backwards) == count


@pytest.mark.usefixtures("triton")
def test_residual_blocks(backwards: list[Tensor]) -> None:
    """Between the convolutions; the residual is added by the last norm."""
    for mode, norm, count in (
        ("same", "batch", 1),
        ("up", "batch", 1),
        ("down", "batch", 2),
        ("same", None, 0),
    ):
        torch.manual_seed(0)
        block = fuseblock.nn.ResidualBlock2d(3, mode=mode, norm=norm).double().to(DEVICE)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
        backwards.clear()
        got = first_order(copy.deepcopy(block), x)
        with fuseblock.backend("reference"):
            want = first_order(block, x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert len(backwards) == count


@pytest.mark.usefixtures("triton")
def test_blocks_of_a_sequence(backwards: list[Tensor]) -> None:
    """A block's norm with the convolution of the next block, where nobody sees what is between them."""
    torch.manual_seed(0)
    blocks = [fuseblock.nn.Conv2dBlock(3, 3, 3, 1, 1) for _ in range(3)]
    net = fuseblock.nn.Sequential(blocks[0], fuseblock.nn.Sequential(*blocks[1:])).double().to(DEVICE)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    with fuseblock.backend("reference"):
        want = first_order(copy.deepcopy(net), x)
    for got, expected in zip(first_order(copy.deepcopy(net), x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert len(backwards) == 2
    blocks[1].register_forward_hook(lambda *args: None)
    first_order(net, x)
    assert len(backwards) == 2


@pytest.mark.usefixtures("triton")
def test_autocast(backwards: list[Tensor]) -> None:
    """Where the norm's input has the dtype of autocast; weights have not."""
    torch.manual_seed(0)
    net = fused(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, 1, 1))).to(DEVICE)
    for dtype, count in ((torch.bfloat16, 1), (torch.float32, 1)):
        x = torch.randn(2, 3, 6, 6, device=DEVICE, dtype=dtype, requires_grad=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = net(x)
        wanted = [x, *net.parameters()]
        found = torch.autograd.grad(y.float().sin().sum(), wanted)
        with fuseblock.backend("reference"), torch.autocast(DEVICE, torch.bfloat16):
            other = net(x)
        assert y.dtype is other.dtype is torch.bfloat16
        torch.testing.assert_close(y, other, rtol=0.02, atol=0.02)
        for got, want in zip(found, torch.autograd.grad(other.float().sin().sum(), wanted), strict=True):
            assert got.dtype is want.dtype
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * want.abs().max().item())
        assert len(backwards) == count


@pytest.mark.usefixtures("triton")
def test_evaluation_hooks_and_others_run_apart(backwards: list[Tensor]) -> None:
    x = torch.randn(2, 4, 6, 6, device=DEVICE, requires_grad=True)

    def run(*modules: nn.Module, train: bool = True, prepare: object = None) -> None:
        net = fused(nn.Sequential(*modules)).to(DEVICE).train(train)
        if callable(prepare):
            prepare(net)
        net(x).sum().backward()

    norm, act, conv = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    run(norm, act, conv, train=False)
    for n in range(3):
        run(norm, act, conv, prepare=lambda net, n=n: net[n].register_forward_hook(lambda *args: None))
    run(norm, nn.PReLU(), conv)
    run(norm, nn.Softplus(), conv)
    run(nn.InstanceNorm2d(4), act, conv)
    run(norm, act, conv, nn.Tanh())  # the convolution applies it
    run(norm, act, nn.Conv2d(4, 4, 3, 2))
    run(norm, act, nn.Conv2d(4, 4, 3, padding=3))
    run(norm, act, nn.Conv2d(4, 4, 3, dilation=2))
    run(norm, act, nn.Conv2d(4, 4, 3, padding="same"))
    run(norm, act, nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)))
    with torch.no_grad():
        fused(nn.Sequential(norm, act, conv)).to(DEVICE)(x)
    torch.jit.trace(fused(nn.Sequential(norm, act, conv)).to(DEVICE), x, check_trace=False)
    assert backwards == []
    run(norm, act, conv)
    assert len(backwards) == 1
    with pytest.raises(ValueError, match="running_mean"):
        run(nn.BatchNorm2d(3, affine=False), act, conv)


def test_calls() -> None:
    x = torch.randn(2, 3, 6, 6, device=DEVICE, requires_grad=True)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.1), nn.Conv2d(3, 4, 3))
    norm, act, conv = fused(net).to(DEVICE)
    call = _fused_convolution.call_into(norm, act, conv, x)
    assert isinstance(call, _conv_engine.Call)
    assert (call.op, call.operator, call.activation) == ("norm_act_conv", "norm_act_conv_bwd", "leaky_relu")
    assert dict(_conv_engine.key(call))["mode"] == "train"
    assert "is no convolution" in _fused_convolution.call_into(norm, None, act, x)
    with fuseblock.backend("cpu"):
        assert _conv_engine.choose(call)[0] == "aten"
    with available("triton"), fuseblock.backend("triton"):
        told = fuseblock.explain("block", fuseblock.nn.Sequential(norm, act, conv), x)
        assert (told.op, told.chosen) == ("norm_act_conv", "triton")
        without = fuseblock.nn.Sequential(norm, nn.Softplus(), conv)
        assert "Softplus is no convolution" in str(fuseblock.explain("block", without, x))
