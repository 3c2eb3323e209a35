"""minibatch_stddev against the papers' formula, its gradients, layouts and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuseblock import functional


def plain(x: Tensor, group_size: int | None, features: int) -> Tensor:
    """NVlabs' MinibatchStdLayer, line by line."""
    n, c, h, w = x.shape
    g = n if group_size is None else min(group_size, n)
    y = x.reshape(g, -1, features, c // features, h, w)
    y = y - y.mean(dim=0)
    y = (y.square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])
    y = y.reshape(-1, features, 1, 1).repeat(g, 1, h, w)
    return torch.cat([x, y], dim=1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "group", "features"),
    [((8, 6, 5, 3), 4, 1), ((6, 6, 2, 2), 2, 3), ((3, 5, 1, 1), None, 1), ((1, 2, 3, 3), 4, 2)],
)
def test_values_and_gradients(shape: tuple[int, ...], group: int | None, features: int, last: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    got, want = functional.minibatch_stddev(x, group, features), plain(x, group, features)
    torch.testing.assert_close(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch.testing.assert_close(
        functional.minibatch_stddev(x, group, features, concatenate=False), want[:, shape[1] :, 0, 0]
    )
    dy = torch.randn(got.shape, dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad(y, x, dy, create_graph=True) for y in (got, want))
    torch.testing.assert_close(a, b)
    if x.shape[0] > 1:
        second = [torch.autograd.grad(g.square().sum(), x)[0] for g in (a, b)]
        torch.testing.assert_close(*second)


def test_gradgradcheck_and_third_order() -> None:
    x = torch.randn(4, 2, 2, 1, dtype=torch.float64, requires_grad=True)

    def gradient(x: Tensor) -> Tensor:
        y = functional.minibatch_stddev(x, 2)
        return torch.autograd.grad(y, x, y.cos(), create_graph=True)[0]

    assert torch.autograd.gradgradcheck(functional.minibatch_stddev, x)
    assert torch.autograd.gradgradcheck(gradient, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_statistics_are_float32(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(4, 8, 4, 4)).to(dtype)  # squares overflow float16
    got = functional.minibatch_stddev(x)
    assert got.dtype == dtype
    assert torch.equal(got, plain(x.float(), 4, 1).to(dtype))


def test_other_dimensions() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    want = (x.view(2, 2, 6).var(0, correction=0) + 1e-8).sqrt().mean(1).repeat(2)
    torch.testing.assert_close(functional.minibatch_stddev(x, 2)[:, 6], want)
    assert functional.minibatch_stddev(torch.randn(4, 6, 9)).shape == (4, 7, 9)


def test_bad_input() -> None:
    x = torch.randn(6, 4, 2, 2)
    with pytest.raises(ValueError, match="multiple of group_size=4, got 6 samples"):
        functional.minibatch_stddev(x)
    with pytest.raises(ValueError, match="multiple of num_channels=3, got 4"):
        functional.minibatch_stddev(x, 3, 3)
    with pytest.raises(ValueError, match="group_size=0"):
        functional.minibatch_stddev(x, 0)
    with pytest.raises(ValueError, match=r"shape \(N, C, \.\.\.\)"):
        functional.minibatch_stddev(torch.randn(4))
    with pytest.raises(TypeError, match="floating point"):
        functional.minibatch_stddev(x.long())
