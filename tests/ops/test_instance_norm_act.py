"""instance_norm_act against plain equations per sample and channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fuseblock
from fuseblock import _ext, ops
from fuseblock._activations import NAMES, activate
from fuseblock.functional import instance_norm_act

from ..backends import DEVICE, Forced, available
from .bounds import poisoned_outputs

_ON_GPU = [pytest.mark.gpu] if DEVICE == "cuda" else []
SHAPES = [(3, 5, 33, 31), (1, 3, 5, 7), (2, 96, 1, 3), (3, 1, 8), (2, 3, 2, 3, 2)]


def last(x: Tensor) -> Tensor:
    """The same values with the channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def layout(x: Tensor) -> tuple[bool, bool]:
    """Whether x is contiguous, whether it is channels-last."""
    return x.is_contiguous(), x.movedim(1, -1).is_contiguous()


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, name: str, slope: Tensor | None) -> Tensor:
    ones = (1,) * (x.dim() - 2)
    y = F.instance_norm(x)
    if weight is not None:
        y = y * weight.view(-1, x.shape[1], *ones)
    if bias is not None:
        y = y + bias.view(-1, x.shape[1], *ones)
    return activate(y, name, 0.1, None if slope is None else slope.view(-1, *ones))


def leaves_of(shape: tuple[int, ...], name: str, channels_last: bool, per_sample: bool) -> list[Tensor]:
    """x, weight, bias and, of prelu, slope in float64."""
    rows = shape[:2] if per_sample else shape[1:2]
    x = torch.randn(shape, dtype=torch.float64)
    tensors = [last(x) if channels_last else x, *(torch.randn(rows, dtype=torch.float64) for _ in range(2))]
    if name == "prelu":
        tensors.append(torch.rand(shape[1], dtype=torch.float64))
    return tensors


def derivatives(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """y, dx and gradients of dx."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = run(*leaves)
    dx, *_ = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return [y, dx, *torch.autograd.grad(dx.sin().sum(), leaves)]


def ours(name: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor | None = None) -> Tensor:
        return instance_norm_act(x, weight, bias, activation=name, negative_slope=0.1, slope=slope)

    return run


def theirs(name: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor | None = None) -> Tensor:
        return plain(x, weight, bias, name, slope)

    return run


def check(name: str, tensors: list[Tensor], device: str = "cpu") -> None:
    with poisoned_outputs():
        got = [t.cpu() for t in derivatives(ours(name), [t.to(device) for t in tensors])]
    torch.testing.assert_close(got, derivatives(theirs(name), tensors), rtol=1e-8, atol=1e-8)
    # PyTorch lays out the gradients of plain equations as it likes.
    ours_alone = got[:1] if fuseblock.dispatch.forced() == "reference" else got[:3]
    assert {layout(t) for t in ours_alone} == {layout(tensors[0])}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, channels_last: bool, per_sample: bool) -> None:
    for shape in SHAPES:
        check(name, leaves_of(shape, name, channels_last, per_sample))


@pytest.mark.parametrize("samples", [1, 3])
def test_gradient_laid_out_otherwise(forced: Forced, samples: int) -> None:
    """PyTorch's instance norm on a CPU is wrong for one image whose gradient has the channels last (torch 2.13)."""
    x, dy = torch.randn(2, samples, 5, 6, 7, dtype=torch.float64, device=forced.device)
    with fuseblock.backend(forced.name):
        results = []
        for place in (torch.Tensor.contiguous, last):
            for lay in (torch.Tensor.contiguous, last):
                leaf = place(x).requires_grad_()
                results += torch.autograd.grad(instance_norm_act(leaf, activation="relu"), leaf, lay(dy))
    for dx in results[1:]:
        torch.testing.assert_close(dx, results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["leaky_relu", "prelu", "silu"])
def test_channels_last_on_every_backend(forced: Forced, name: str) -> None:
    with fuseblock.backend(forced.name):
        for shape in [(3, 5, 7, 9), (2, 20, 3), (3, 1, 5)]:
            check(name, leaves_of(shape, name, True, per_sample=True), forced.device)


@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_per_sample(forced: Forced, channels_last: bool) -> None:
    """In every layout as a batch of one, whose channels are those of all samples."""
    x, dy, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(6, dtype=torch.float64)
    results = []
    for fold in (lambda t: last(t) if channels_last else t, lambda t: t.view(1, 6, 4, 5)):
        per_sample = not results
        args = fold(x), weight, *(None,) * 5, 1e-5, "silu", 0.0, True, "", False, per_sample
        y, mean, var, invstd, count, _ = forced.batch_norm_act(*args)
        saved = fold(dy), fold(x), weight, None, None, None, mean, invstd, count, None
        saved = *saved, "silu", 0.0, True, "", 1e-5
        dx, dweight, *_ = forced.batch_norm_act_bwd(*saved, True, True, False, per_sample)
        given = fold(v), weight, None, None, None
        a_dy, a_x, a_weight, *_ = forced.batch_norm_act_bwd_bwd(*given, *saved, per_sample)
        full = [t.reshape(x.shape) for t in (y, dx, a_dy, a_x)]
        results.append([*full, mean, var, invstd, count, dweight, a_weight])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [pytest.param(name, marks=_ON_GPU) for name in ("prelu", "tanh")])
def test_triton_with_several_programs_and_blocks_of_channels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with available("triton") as forced, fuseblock.backend("triton"):
        from fuseblock.launch import triton_batch_norm_act as launcher

        monkeypatch.setattr(launcher, "blocks", lambda layout, row, others, tile: (16, 4))
        monkeypatch.setattr(launcher, "programs", lambda chunks, channel_blocks: min(chunks, 2))
        check(name, leaves_of((3, 19, 11), name, True, per_sample=True), forced.device)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 16, 53, 48), (4, 15, 33, 31), (17, 3, 40, 40)])
def test_cpu_threads(shape: tuple[int, ...], threads: int) -> None:
    """Few large samples share all threads; else each thread takes whole samples."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("silu", leaves_of(shape, "silu", True, per_sample=True))
    finally:
        torch.set_num_threads(before)


def bytes_of_new_tensors(step: Callable[[], Any], device: str) -> tuple[int, Any]:
    """What memory ``step()`` asks for, and its result."""
    if device == "cuda":
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        result = step()
        return torch.cuda.memory_stats()["requested_bytes.all.allocated"] - before, result
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        result = step()
    events = profile.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]"), result


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["leaky_relu", "silu"])
@pytest.mark.parametrize(
    "backend", ["auto", "cpu", *(pytest.param(name, marks=_ON_GPU) for name in ("triton", "cuda"))]
)
def test_layouts_are_not_copied(backend: str, name: str, channels_last: bool) -> None:
    """The only new tensors of x's size are y, dx, and the two adjoints of the second order."""
    with available(backend) as forced, fuseblock.backend(backend):
        x, weight, bias = (
            t.float().to(forced.device)
            for t in leaves_of((3, 5, 33, 31), name, channels_last, per_sample=True)
        )
        dy, v = torch.randn_like(x), torch.randn_like(x)
        for direct in (True, False):  # one node, operators
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            dy.requires_grad_()
            counted = []

            def count(step: Callable[[], Any], counted: list[int] = counted) -> Any:
                size, result = bytes_of_new_tensors(step, forced.device)
                counted.append(size // x.nbytes)
                return result

            with torch.autocast(forced.device, torch.bfloat16, enabled=not direct):
                y = count(lambda leaves=leaves: ours(name)(*leaves))
            count(lambda y=y, leaves=leaves: torch.autograd.grad(y, leaves, dy, retain_graph=True))
            dx, *_ = count(lambda y=y, leaves=leaves: torch.autograd.grad(y, leaves, dy, create_graph=True))
            count(lambda dx=dx, leaves=leaves: torch.autograd.grad(dx, (*leaves[:2], dy), v))
            assert counted == [1, 1, 1, 2]


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last: bool) -> None:
    shapes = (2, 3, 2, 2), (2, 3), (3,)
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    inputs = [t.requires_grad_() for t in ((last(inputs[0]), *inputs[1:]) if channels_last else inputs)]
    assert gradcheck(lambda *a: instance_norm_act(*a, activation="silu"), inputs)
    assert gradgradcheck(lambda *a: instance_norm_act(*a, activation="silu"), inputs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(forced: Forced, dtype: torch.dtype, channels_last: bool) -> None:
    x = torch.randn(2, 3, 9, 9).to(dtype)
    x = last(x) if channels_last else x
    with fuseblock.backend(forced.name):
        got = instance_norm_act(x.to(forced.device), activation="leaky_relu", negative_slope=0.1).cpu()
    want = plain(x.double(), None, None, "leaky_relu", None)
    assert got.dtype is dtype
    assert got.stride() == x.stride()
    assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_non_finite_values_stay_in_their_sample_and_channel(forced: Forced) -> None:
    x = torch.randn(3, 4, 5, 7)
    x[1, 2, 3, 4] = float("nan")
    with fuseblock.backend(forced.name):
        finite = instance_norm_act(last(x).to(forced.device)).isfinite().cpu()
    assert not finite[1, 2].any()
    assert int(finite.sum()) == x.numel() - 35


def test_layouts_of_gradients() -> None:
    """A gradient and a cotangent of another layout than x."""
    x, dy, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    results = []
    for change in (last, lambda t: t):
        leaf, grad = last(x).requires_grad_(), change(dy).requires_grad_()
        y = instance_norm_act(leaf, activation="silu")
        (dx,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx, (leaf, grad), change(v))])
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == last(x).stride()


def test_one_node_equals_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseblock import _batch_norm_node

    tensors = leaves_of((2, 3, 4, 5), "prelu", True, per_sample=True)
    direct = derivatives(ours("prelu"), tensors)
    monkeypatch.setattr(_batch_norm_node, "can_run", lambda *args: False)
    torch.testing.assert_close(direct, derivatives(ours("prelu"), tensors), rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    x, *affine = leaves_of((2, 3, 4, 5), "prelu", True, per_sample=True)
    weight, bias = (t.flatten().requires_grad_() for t in affine[:2])
    slope = affine[2].repeat(2).requires_grad_()
    leaves = x.requires_grad_(), weight, bias, None, slope
    args = *leaves, None, None, 1e-5, "prelu", 0.0, True, "", False, True
    torch.library.opcheck(torch.ops.fuseblock.batch_norm_act.default, args)
    _, mean, _, invstd, count, _ = (t.detach() for t in ops.batch_norm_act(*args))
    assert mean.shape == (6,)
    assert count == 20
    saved = *leaves, mean, invstd, count, None, "prelu", 0.0, True, "", 1e-5
    dy = torch.randn_like(x).requires_grad_()
    args = dy, *saved, True, True, False, True
    torch.library.opcheck(torch.ops.fuseblock.batch_norm_act_bwd.default, args)
    saved = *(None if t is None else t.detach() for t in leaves), *saved[5:]
    args = dy.detach(), weight.detach(), None, None, None, dy.detach(), *saved, True
    torch.library.opcheck(torch.ops.fuseblock.batch_norm_act_bwd_bwd.default, args)


def test_third_order() -> None:
    x = last(torch.randn(2, 2, 2, 2, dtype=torch.float64)).requires_grad_()

    def third(run: Callable[[Tensor], Tensor]) -> Tensor:
        (grad,) = torch.autograd.grad(run(x).pow(2).sum(), x, create_graph=True)
        (grad2,) = torch.autograd.grad(grad.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad2.pow(2).sum(), x)[0]

    def run(x: Tensor) -> Tensor:
        return instance_norm_act(x, activation="silu")

    def by_hand(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return F.silu((x - mean) / (var + 1e-5).sqrt())

    with pytest.raises(NotImplementedError, match="third derivatives need fuseblock.backend"):
        third(run)
    with fuseblock.backend("reference"):
        torch.testing.assert_close(third(run), third(by_hand))


def test_transforms_and_forward_mode() -> None:
    x = last(torch.randn(2, 3, 4, 5, dtype=torch.float64))
    batch = torch.stack([x, 2 * x + 1])

    def loss(x: Tensor) -> Tensor:
        return instance_norm_act(x, activation="silu").pow(2).sum()

    got = torch.func.vmap(torch.func.grad(loss))(batch)
    torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(t.clone()) for t in batch]))
    _, tangent = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.grad(loss)(x).sum(), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(2, 3),), r"expected x of shape \(N, C, ...\)"),
        ((torch.randn(2, 3, 4), torch.randn(2)), r"expected weight of shape \(3,\) or \(2, 3\)"),
        ((torch.randn(2, 3, 4), None, torch.randn(3, 2)), "expected bias"),
        ((torch.randn(2, 3, 1),), r"more than 1 value per channel and sample, got x of shape \(2, 3, 1\)"),
    ],
)
def test_mistakes(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instance_norm_act(*args)


def test_what_statistics_per_sample_exclude() -> None:
    x, rows = last(torch.randn(2, 3, 4, 5)), torch.ones(6)
    usual = {"residual": None, "mean": None, "training": True, "group": ""}
    for wrong in ({"residual": x}, {"mean": rows}, {"training": False}, {"group": "all"}):
        residual, mean, training, group = (usual | wrong).values()
        args = x, None, None, residual, None, mean, mean, 1e-5, "identity", 0.0, training, group, False
        with pytest.raises(ValueError, match="expected training without residual, mean, var and group"):
            ops.batch_norm_act(*args, True)
    if not _ext.has("fuseblock_cpu", "batch_norm_act"):
        return
    none = (None,) * 5
    with pytest.raises(RuntimeError, match="statistics per sample take no residual"):
        torch.ops.fuseblock_cpu.batch_norm_act(x, None, None, x, *none, 0.0, 1e-5, 0, 0.0, True, False, True)
