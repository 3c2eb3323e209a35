"""Norms and pointwise kernels at sizes that are multiples of nothing: both layouts, all dtypes, all three orders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fuseblock._activations import NAMES

from ..backends import Forced
from . import test_batch_norm_act as norm
from . import test_bias_act as bias_act
from .bounds import error_ratio, poisoned_outputs, relative_error

CHANNELS, IMAGES, BATCHES = (1, 3, 5, 96, 100), ((1, 1), (5, 7), (33, 31)), (1, 3)
#: (shape, whether the channels are last, activation, dtype): every size in both layouts; the others in turn.
ALL = [
    (
        (batch, channels, *image),
        last,
        NAMES[(n + 3) % len(NAMES)],
        norm.DTYPES[(n // 2 + n // 10) % len(norm.DTYPES)],
    )
    for n, (batch, channels, image, last) in enumerate(
        itertools.product(BATCHES, CHANNELS, IMAGES, (False, True))
    )
]
#: 40,000 elements take a second or two in emulator and interpreter.
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if math.prod(case[0]) > 1500 or n % 3 else [])
    for n, case in enumerate(ALL)
]


def layout(x: Tensor) -> tuple[bool, bool]:
    """Whether x is contiguous, whether it is channels-last."""
    return x.is_contiguous(), x.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize(("shape", "last", "activation", "dtype"), CASES, ids=str)
def test_batch_norm(
    forced: Forced, shape: tuple[int, ...], last: bool, activation: str, dtype: torch.dtype
) -> None:
    values = math.prod(shape) // shape[1]
    case = norm.Case(shape, activation, values % 2 == 1, last, training=values > 1)
    norm.test_values_and_derivatives(forced, case, dtype)


@pytest.mark.parametrize(("shape", "last", "activation", "dtype"), CASES, ids=str)
def test_bias_act(
    forced: Forced, shape: tuple[int, ...], last: bool, activation: str, dtype: torch.dtype
) -> None:
    clamp = bias_act.CLAMP if shape[1] % 2 else math.inf
    bias_act.check(bias_act.Problem(shape, activation, clamp, dtype, last), forced)


@pytest.mark.parametrize(("shape", "last", "activation", "dtype"), CASES, ids=str)
def test_instance_norm(
    forced: Forced, shape: tuple[int, ...], last: bool, activation: str, dtype: torch.dtype
) -> None:
    """As a batch of one, whose channels are those of all samples."""
    if shape[2:] == (1, 1):
        pytest.skip("one value has no statistics")
    if forced.name == "cpu" and last and shape[0] * shape[1] > 100:
        pytest.xfail(
            "of many planes some begin far from their mean, which costs the CPU's shifted sums digits"
        )
    case = norm.Case((1, shape[0] * shape[1], *shape[2:]), activation)
    inputs, dy = case.inputs(dtype), case.full(10, dtype)
    x, weight, bias, _, slope, *_ = inputs
    v = [case.full(11, dtype), *(case.channels(n, dtype) for n in (12, 13, 14)), None]
    want, stock = (norm.derivatives(case, inputs, dy, v, d) for d in (torch.float64, dtype))

    def unfolded(t: Tensor) -> Tensor:
        return norm.last(t.view(shape)) if last else t.view(shape)

    given = [v[0], v[1], v[2], None if slope is None else v[3]]
    with poisoned_outputs():
        y, mean, _, invstd, count, _ = forced.batch_norm_act(
            unfolded(x),
            weight,
            bias,
            None,
            slope,
            None,
            None,
            norm.EPS,
            activation,
            norm.SLOPE,
            True,
            "",
            False,
            True,
        )
        saved = unfolded(x), weight, bias, None, slope, mean, invstd, count, None
        options = *norm.options(case), True, True, False, True
        first = forced.batch_norm_act_bwd(unfolded(dy), *saved, *options)
        adjoints = (unfolded(given[0]), *given[1:], None, unfolded(dy), *saved, *norm.options(case), True)
        second = forced.batch_norm_act_bwd_bwd(*adjoints)
    if activation not in ("prelu", "silu", "tanh", "elu"):
        want[2], stock[2], second = want[2][:3], stock[2][:3], second[:3]
    for order, got in enumerate(([y], norm.present(first), norm.present(second))):
        stock_error = max(relative_error(s, w) for s, w in zip(stock[order], want[order], strict=True))
        for k, (g, w) in enumerate(zip(got, want[order], strict=True)):
            if g.shape == shape and forced.name != "reference":
                assert layout(g) == layout(unfolded(x))
            ratio = error_ratio(g.reshape(w.shape), w, stock_error, case.longest_sum)
            assert ratio <= 1, f"order {order}, output {k}: error {ratio:.3g} times the allowed one"
