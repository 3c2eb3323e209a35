"""Convolutions that run with what stands behind them: same values and derivatives, who runs, and why."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseblock
from fuseblock import _conv_engine, _tables, dispatch
from fuseblock.nn import _fused_convolution

from ..backends import _ON_GPU, DEVICE, available
from ..tables import entry, table

pytestmark = _ON_GPU


@pytest.fixture
def triton() -> Iterator[None]:
    with available("triton"), fuseblock.backend("triton"):
        yield


def model() -> nn.Sequential:
    """Every kind: batch norms behind both convolutions, with and without an activation, and activations alone."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 4, 3, padding=(1, 0), bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6, momentum=None),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 4, 2, 1),
        nn.Tanh(),
    )


def everything(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    gradients = torch.autograd.grad(dx.square().sum() + y.cos().sum(), list(net.parameters()))
    return [y.detach(), dx.detach(), *gradients, *net.buffers()]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of convolutions that ran, in order."""
    seen: list[str] = []
    run = dispatch.run

    def note(op: str, args: Any) -> Any:
        seen.extend([op] if op.startswith("conv") else [])
        return run(op, args)

    monkeypatch.setattr(dispatch, "run", note)
    return seen


OPERATORS = ["conv2d_act", "conv2d_stats", "conv_transpose2d_subpixel", "conv2d_act", "conv2d_act"]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_derivatives_are_the_stock_ones(layout: torch.memory_format, ran: list[str]) -> None:
    torch.manual_seed(0)
    stock = model().double().to(DEVICE)
    fused = copy.deepcopy(stock)
    fuseblock.fuse(fused, verbose=False)
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64, device=DEVICE).contiguous(memory_format=layout)
    for got, want in zip(everything(fused, x), everything(stock, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert ran == OPERATORS


@pytest.mark.usefixtures("triton")
def test_the_norm_applies_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    block = fuseblock.nn.Conv2dBlock(3, 4, 3, activation="silu").to(DEVICE)
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    want = block(x)
    monkeypatch.setattr(nn.SiLU, "forward", None)
    torch.testing.assert_close(block(x), want)


@pytest.mark.usefixtures("triton")
def test_evaluation_hooks_and_others_run_apart(ran: list[str]) -> None:
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    block = fuseblock.nn.Conv2dBlock(3, 4, 3, padding=1).to(DEVICE)
    block.eval()(x)
    block.train()[0].register_forward_hook(lambda *args: None)
    block(x)
    for others in (
        {"padding_mode": "reflect"}, {"padding": "same"}, {"dilation": 2}, {"groups": 3}, {"norm": "instance"},
        {"norm": None, "activation": "silu"}, {"kernel_size": 6, "padding": 3},
    ):  # fmt: skip
        fuseblock.nn.Conv2dBlock(3, 6, **{"kernel_size": 3, "padding": 1, **others}).to(DEVICE)(x)
    fuseblock.nn.ConvTranspose2dBlock(3, 4, 3, 2, 1, output_padding=1).to(DEVICE)(x)
    fuseblock.nn.Conv2dBlock(3, 4, 3, norm=None).to(DEVICE)(x[0])
    assert ran == []


@pytest.mark.usefixtures("triton")
def test_residual_blocks(ran: list[str]) -> None:
    for mode, norm in (("same", "batch"), ("up", "batch"), ("down", None), ("same", None)):
        torch.manual_seed(0)
        block = fuseblock.nn.ResidualBlock2d(3, mode=mode, norm=norm, activation="relu").double().to(DEVICE)
        other = copy.deepcopy(block)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
        got = everything(block, x)
        with fuseblock.backend("reference"):
            want = everything(other, x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert ran == ["conv2d_stats", "conv2d_stats", "conv2d_stats", "conv2d_act", "conv2d_act"]


def critic() -> nn.Sequential:
    """SNGAN's, small, and a batch norm between convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 5, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(5, 4, 4, 2, 1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
    )


def each_normalised(model: nn.Sequential, normalise: Any) -> nn.Sequential:
    for layer in model:
        if hasattr(layer, "kernel_size"):
            normalise(layer)
    return model


NORMALISED = {
    "whole": lambda: fuseblock.nn.spectral_norm(critic()),
    "each": lambda: each_normalised(critic(), fuseblock.nn.spectral_norm),
    "hooks": lambda: each_normalised(critic(), nn.utils.spectral_norm),
}


def by_name(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Result, gradients through a penalty, and buffers: u and v have moved once."""
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (dx.square().sum() + y.cos().sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "dx": dx.detach(), **gradients, **{f"{n} ": b for n, b in model.named_buffers()}}


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", NORMALISED)
def test_under_spectral_norm(how: str, training: bool, ran: list[str]) -> None:
    torch.manual_seed(0)
    stock = NORMALISED[how]().double().to(DEVICE).train(training)
    fused = copy.deepcopy(stock)
    fuseblock.fuse(fused, verbose=False)
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, device=DEVICE)
    got, want = by_name(fused, x), by_name(stock, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-9, msg=name)
    behind = ["conv2d_stats"] if training else []  # of a norm that takes this batch's statistics
    assert ran == [*["conv2d_act"] * 3, *behind]
    assert how == "hooks" or not any("weight" in m.__dict__ for m in fused.modules())


@pytest.mark.usefixtures("triton")
def test_parametrizations_run_apart_and_once(ran: list[str]) -> None:
    torch.manual_seed(0)
    for normalise in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        stock = each_normalised(critic(), normalise).double().to(DEVICE)
        fused = copy.deepcopy(stock)
        fuseblock.fuse(fused, verbose=False)
        x = torch.randn(2, 3, 8, 6, dtype=torch.float64, device=DEVICE)
        got, want = by_name(fused, x), by_name(stock, x)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-9, msg=name)
    assert ran == []


def test_sequentials_ask_the_table(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    """Without one convolutions are PyTorch's own."""
    monkeypatch.setattr(_fused_convolution, "may_choose", lambda x: True)
    for op in ("conv2d_stats", "conv2d_act"):
        equations = dispatch.candidates(op)[-1]
        monkeypatch.setitem(dispatch._CANDIDATES, op, (replace(equations, name="triton"),))
    block = fuseblock.nn.Sequential(
        fuseblock.nn.Conv2d(3, 4, 3), fuseblock.nn.LeakyReLU(0.2), *fuseblock.nn.Conv2dBlock(4, 8, 3)
    )
    block, x = fuseblock.nn.spectral_norm(block), torch.randn(2, 3, 16, 16)
    answers: dict[str, Any] = {}
    for conv, follower, images in ((block[0], block[1], x), (block[2], block[3], torch.ones(2, 4, 14, 14))):
        call = _fused_convolution.call_of(conv, follower, images)
        assert isinstance(call, _conv_engine.Call)
        key = _tables.plain_key(_conv_engine.key(call))
        answers[call.op] = [entry(key, "triton", aten=3.0, triton=2.0)]
    want = block(x)
    assert ran == []
    with _tables.using(table(**answers)):
        got = block(x)
    assert ran == ["conv2d_act", "conv2d_stats"]
    assert got.shape == want.shape


@pytest.mark.usefixtures("triton")
def test_autocast(ran: list[str]) -> None:
    """Also behind the first block, where the input has 16 bits already and weights have not."""
    torch.manual_seed(0)
    block = fuseblock.nn.Sequential(
        *fuseblock.nn.Conv2dBlock(3, 4, 4, 2, 1), *fuseblock.nn.Conv2dBlock(4, 4, 3, 1, 1)
    ).to(DEVICE)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = block(x)
    assert ran == ["conv2d_stats", "conv2d_stats"]
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert block[0].weight.grad.dtype is torch.float32
    with fuseblock.backend("reference"), torch.autocast(DEVICE, torch.bfloat16):
        want = block(x)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)


def test_explain() -> None:
    block, x = fuseblock.nn.Conv2dBlock(3, 4, 3, device=DEVICE), torch.randn(2, 3, 6, 6, device=DEVICE)
    with available("triton"):
        with fuseblock.backend("triton"):
            forced = fuseblock.explain("block", block, x)
            evaluated = fuseblock.explain("block", block.eval(), x)
        assert (forced.op, forced.chosen, forced.rule) == (
            "conv_norm_act",
            "triton",
            "backend 'triton' is forced",
        )
        assert evaluated.chosen == "aten"
        assert "no statistics of this batch" in str(evaluated)
        told = fuseblock.explain("block", block.train(), x)
        assert told.chosen == "aten"
        assert ("Triton's interpreter is for tests" if DEVICE == "cpu" else "plain rule") in str(told)
        other = fuseblock.nn.Conv2dBlock(3, 4, 3, norm="instance", device=DEVICE)
        assert "neither batch norm nor activation" in str(fuseblock.explain("block", other, x))
        with fuseblock.backend("cpu"):
            assert fuseblock.explain("block", block, x).rule == "backend 'cpu' is forced"


def test_calls() -> None:
    x = torch.randn(2, 3, 6, 6)
    conv, norm = fuseblock.nn.Conv2d(3, 4, 3), fuseblock.nn.BatchNormAct2d(4)
    call = _fused_convolution.call_of(conv, norm, x)
    assert isinstance(call, _conv_engine.Call)
    assert dict(_conv_engine.key(call)) == {
        "mode": "train", "dtype": torch.float32, "tf32": dict(_conv_engine.key(call))["tf32"], "layout": "contiguous",
        "kind": "plain", "kernel": "3x3", "stride": "1x1", "channels": 3, "out_channels": 4, "groups": 1,
        "batch": 2, "height": 6, "width": 6,
    }  # fmt: skip
