"""instance_norm_act against plain equations per sample and channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fuseblock._activations import NAMES, activate
from fuseblock.functional import instance_norm_act

SHAPES = [(3, 5, 33, 31), (1, 3, 5, 7), (2, 96, 1, 3), (3, 1, 8)]


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, name: str, slope: Tensor | None) -> Tensor:
    ones = (1,) * (x.dim() - 2)
    y = F.instance_norm(x)
    if weight is not None:
        y = y * weight.view(-1, x.shape[1], *ones)
    if bias is not None:
        y = y + bias.view(-1, x.shape[1], *ones)
    return activate(y, name, 0.1, None if slope is None else slope.view(-1, *ones))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, channels_last: bool, per_sample: bool) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64)
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        rows = shape[:2] if per_sample else shape[1:2]
        leaves = [x, torch.randn(rows, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)]
        if name == "prelu":
            leaves.append(torch.rand(shape[1], dtype=torch.float64))
        leaves = [t.requires_grad_() for t in leaves]
        slope = leaves[3] if name == "prelu" else None
        results = []
        for y in (
            instance_norm_act(*leaves[:3], activation=name, negative_slope=0.1, slope=slope),
            plain(*leaves[:3], name, slope),
        ):
            (dx, *_) = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            results.append((y, dx, *torch.autograd.grad(dx.sin().sum(), leaves)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)
        if channels_last and x.dim() == 4:
            assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_gradcheck() -> None:
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 2), (2, 3), (3,))]
    assert gradcheck(lambda *a: instance_norm_act(*a, activation="silu"), inputs)
    assert gradgradcheck(lambda *a: instance_norm_act(*a, activation="silu"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9, 9).to(dtype)
    got = instance_norm_act(x, activation="leaky_relu", negative_slope=0.1)
    want = plain(x.double(), None, None, "leaky_relu", None)
    assert got.dtype is dtype
    assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(2, 3),), r"expected x of shape \(N, C, ...\)"),
        ((torch.randn(2, 3, 4), torch.randn(2)), r"expected weight of shape \(3,\) or \(2, 3\)"),
        ((torch.randn(2, 3, 4), None, torch.randn(3, 2)), "expected bias"),
        ((torch.randn(2, 3, 1),), "more than 1 value per channel"),
    ],
)
def test_mistakes(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instance_norm_act(*args)
