"""Norms and pointwise kernels at sizes that are multiples of nothing: both layouts, all dtypes, all three orders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fuseblock._activations import NAMES

from ..backends import Forced
from . import batch_norm_act_cases as norm
from . import test_bias_act as bias_act
from .bounds import Orders, poisoned_outputs
from .test_batch_norm_act import test_values_and_derivatives as check_batch_norm

CHANNELS, IMAGES, BATCHES = (1, 3, 5, 96, 100), ((1, 1), (5, 7), (33, 31)), (1, 3)
#: (shape, whether the channels are last, activation, dtype): every size in both layouts; the others in turn.
ALL = [
    (
        (batch, channels, *image),
        last,
        NAMES[n % len(NAMES)],
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
    check_batch_norm(forced, case, dtype)


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
    case = norm.Case((1, shape[0] * shape[1], *shape[2:]), activation)

    def unfolded(t: Tensor) -> Tensor:
        return norm.last(t.view(shape)) if last else t.view(shape)

    def run(case: norm.Case) -> Orders:
        p = norm.problem(case, dtype)
        x, weight, bias, _, slope, *_ = p.inputs
        assert x is not None
        v = [*p.v[:3], None if slope is None else p.v[3]]
        flags = norm.EPS, activation, norm.SLOPE, True, "", False, True
        with poisoned_outputs():
            y, mean, _, invstd, count, _ = forced.batch_norm_act(
                unfolded(x), weight, bias, None, slope, None, None, *flags
            )
            saved = unfolded(x), weight, bias, None, slope, mean, invstd, count, None
            options = *norm.options(case), True, True, False, True
            first = forced.batch_norm_act_bwd(unfolded(p.dy), *saved, *options)
            adjoints = (unfolded(p.v[0]), *v[1:], None, unfolded(p.dy), *saved, *norm.options(case), True)
            second = forced.batch_norm_act_bwd_bwd(*adjoints)
        got = [[y], norm.present(first), norm.present(second if norm.is_curved(case) else second[:3])]
        if forced.name != "reference":
            of_shape = [g for g in itertools.chain(*got) if g.shape == shape]
            assert all(layout(g) == layout(unfolded(x)) for g in of_shape)
        like = [
            [g.reshape(w.shape) for g, w in zip(*pair, strict=True)] for pair in zip(got, p.want, strict=True)
        ]
        return Orders(like, p.want, p.stock)

    norm.check(case, dtype, run)
