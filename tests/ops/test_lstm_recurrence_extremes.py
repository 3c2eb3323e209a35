"""The recurrence where values or lengths are extreme, on every engine: infinities, NaN, lengths out of range.

Kernels pad H with units whose weights are zero, and 0 * infinity is NaN: a padded unit must not tell the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ..backends import available
from . import plain_lstm
from .lstm_cases import LstmCase
from .resident_cases import TierOps, assert_equal, passes_of_float32

INF, NAN = float("inf"), float("nan")


def _triton(variant: str) -> Any:
    pytest.importorskip("triton")
    from .test_triton_kernels import Engine

    return Engine(variant)


#: Those that leave range checks of lengths to the operator.
ENGINES: dict[str, Callable[[], Any]] = {
    **{tier: lambda tier=tier: TierOps(tier) for tier in ("block", "cluster", "grid")},
    **{name: lambda name=name: _triton(name) for name in ("persistent", "fused step", "per step")},
}


@pytest.fixture(params=[*ENGINES, "cpu", "reference"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param in ENGINES:
        yield ENGINES[request.param]()
    else:
        with available(request.param) as operators:
            yield operators


def _kinds(x: Tensor) -> Tensor:
    """0: finite, 1 and -1: infinite, 2: NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0)).to(torch.int8)


def _double(values: Any) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]


def _assert_as(names: str, got: Any, want: Any, exact: bool = True) -> None:
    """As infinite as `want`, or as finite."""
    for name, g, w in zip(names.split(), got, want, strict=False):
        g, w = _kinds(g), _kinds(w)
        assert torch.equal(g, w) if exact else torch.equal(g == 0, w == 0), f"{name}\n{g}\n{w}"


def _spoiled(case: LstmCase, dtype: torch.dtype, *, in_products: bool) -> list[Any]:
    """Inputs (gx, h0, c0, w_hh, w_hr, lengths): a row for every kind of trouble, the last row without any.

    in_products: also in factors of the recurrent product.
    """
    gx, h0, c0, w_hh, w_hr, lengths = case.inputs(dtype)
    c0[0, 0, 1], c0[0, 1, 2], c0[-1, 2, 0] = INF, -INF, NAN
    gx[0, 3, 1], gx[1, 4, 2], gx[1, 5, 3 * case.hidden] = INF, -INF, NAN
    if in_products:
        h0[0, 6, 1], h0[-1, 7, -1], h0[-1, 8, 0] = INF, -INF, NAN
    return [gx, h0, c0, w_hh, w_hr, lengths]


#: H below the class in every tier, for aligned rows and for others, of which one has an odd number of units.
SIZES = [(40, 1), (37, 2), (30, 1)]
DTYPES = [(torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 3)]


def _runs(engine: Any, dtype: torch.dtype) -> bool:
    return not isinstance(engine, TierOps) or dtype in engine.tier.dtypes


@pytest.mark.parametrize(("dtype", "passes"), DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_infinite_states(engine: Any, sizes: tuple[int, int], dtype: torch.dtype, passes: int) -> None:
    """Infinite or NaN exactly where PyTorch's equations are; in three passes over float32, infinite factors make NaN."""
    if not _runs(engine, dtype):
        pytest.skip("not in this dtype")
    hidden, directions = sizes
    exact = passes == 1 or not isinstance(engine, TierOps)
    inputs = _spoiled(LstmCase(3, 10, hidden, directions, None, None), dtype, in_products=exact)
    gx, h0, c0, w_hh, _, _ = inputs
    want = plain_lstm.forward(*_double(inputs))
    with passes_of_float32(passes):
        got = engine.lstm_recurrence(*inputs, None, True)
    _assert_as("y h_n c_n gates c", got, want)

    normal = LstmCase(3, 10, hidden, directions, None, None).normal
    dy, dh_n, dc_n = normal(20, *want[0].shape), normal(21, *want[1].shape), normal(22, *want[2].shape)
    dy[2, 0, 1], dy[0, 1, -1], dh_n[0, 2, 0], dc_n[-1, 3, 1] = INF, NAN, -INF, INF
    cotangents = [dy.to(dtype), dh_n.to(dtype), dc_n.to(c0.dtype)]
    gates, c = want[3].to(dtype), want[4].to(c0.dtype)
    absent = [torch.zeros_like(gates), torch.zeros_like(c)]
    want = plain_lstm.backward(*_double([*cotangents, *absent, gates, c, c0, w_hh, None, None]))
    with passes_of_float32(passes):
        got = engine.lstm_recurrence_bwd(*cotangents, None, None, gates, c, c0, w_hh, None, None, None)
    _assert_as("dgx dh0 dc0", got, want, exact)


@pytest.mark.parametrize("hidden", [40, 37])
def test_infinite_weights(engine: Any, hidden: int) -> None:
    gx, h0, c0, w_hh, _, _ = LstmCase(3, 2, hidden, 1, None, None).inputs(torch.bfloat16)
    w_hh[0, 1, 2], w_hh[0, 3 * hidden, hidden - 1] = INF, -INF
    want = plain_lstm.forward(*_double((gx, h0, c0, w_hh, None, None)))
    got = engine.lstm_recurrence(gx, h0, c0, w_hh, None, None, None, True)
    _assert_as("y h_n c_n gates c", got, want)


@pytest.mark.parametrize("name", ENGINES)
def test_lengths_out_of_range(name: str) -> None:
    """Those on a GPU are not checked, which would wait for it: they count as the nearest in range."""
    engine, steps = ENGINES[name](), 3
    lengths = torch.tensor(
        [2**31, 2**32 + 1, 2**62, -1, -(2**31) - 1, -(2**32) + 1, steps + 1, 0, 2], dtype=torch.int64
    )
    inputs = LstmCase(steps, len(lengths), 24, 2, None, None).inputs(torch.bfloat16)[:5]

    def both(lengths: Tensor) -> list[Tensor]:
        y, h_n, c_n, gates, c = engine.lstm_recurrence(*inputs, lengths, None, True)
        saved = (gates, c, inputs[2], inputs[3], None, lengths, None)
        return [y, h_n, c_n, gates, c, *engine.lstm_recurrence_bwd(y, h_n, c_n, None, None, *saved)]

    assert_equal(both(lengths), both(lengths.clamp(0, steps)))
