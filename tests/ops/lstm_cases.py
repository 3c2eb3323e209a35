"""Problem sizes and inputs for tests of anything that offers the recurrence's three ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import plain_lstm
from .bounds import error_ratio, poisoned_outputs, relative_error, state_dtype

#: Fewer values than this are no measure of an error: one may be near zero by cancellation, or exact by luck.
FEW_VALUES = 16

#: What an op returned in one call, what it should have, and what stock PyTorch did.
Draw = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class LstmCase:
    """T steps, B rows, H units, D directions, P projected units (None: no projection), lengths (None: full).

    Cases that differ in `draw` alone have other random numbers.
    """

    n_steps: int
    batch: int
    hidden: int
    directions: int
    proj: int | None
    lengths: tuple[int, ...] | None
    draw: int = 0

    def __str__(self) -> str:
        ragged = "" if self.lengths is None else "-len" + "_".join(map(str, self.lengths))
        proj = "" if self.proj is None else f"-P{self.proj}"
        return f"T{self.n_steps}-B{self.batch}-H{self.hidden}-D{self.directions}{proj}{ragged}"

    def inputs(
        self, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(gx, h0, c0, w_hh, w_hr, lengths), the same values in every call but for rounding."""
        d, p = self.directions, self.proj or self.hidden
        scale = self.hidden**-0.5
        gx = self.normal(0, self.n_steps, self.batch, d * 4 * self.hidden)
        h0, c0 = self.normal(1, d, self.batch, p).tanh(), self.normal(2, d, self.batch, self.hidden)
        w_hh = self.normal(3, d, 4 * self.hidden, p) * scale
        w_hr = None if self.proj is None else (self.normal(4, d, p, self.hidden) * scale).to(dtype)
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        return gx.to(dtype), h0.to(dtype), c0.to(state_dtype(dtype)), w_hh.to(dtype), w_hr, lengths

    @property
    def longest_sum(self) -> int:
        """Additions behind one value, generously: every step's GEMM and its elementwise terms."""
        return self.n_steps * (4 * self.hidden + 32)

    @property
    def draws(self) -> list[LstmCase]:
        """The case with as many sets of random numbers as it takes to have a few values of every output."""
        count = max(1, FEW_VALUES // (self.directions * self.batch * self.hidden))
        return [replace(self, draw=k) for k in range(count)]

    def normal(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1000 * self.draw)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_outputs(
    names: str, draws: Sequence[Draw], dtypes: Sequence[torch.dtype], longest_sum: int
) -> float:
    """Check values, dtypes, shapes, contiguity and freshness of an op's outputs; returns the worst error ratio.

    The values of several draws count as those of one.
    """
    for got, want, _ in draws:
        used = [g.untyped_storage().data_ptr() for g in got if g.numel()]
        assert len(set(used)) == len(used), "outputs share memory"
        for name, g, w, dtype in zip(names.split(), got, want, dtypes, strict=True):
            assert g.dtype == dtype, f"{name}: {g.dtype}"
            assert g.shape == w.shape, f"{name}: {tuple(g.shape)}, expected {tuple(w.shape)}"
            assert g.is_contiguous(), f"{name} is not contiguous"
    got, want, stock = (list(map(torch.stack, zip(*each, strict=True))) for each in zip(*draws, strict=True))
    stock_error = max(relative_error(s, w) for s, w in zip(stock, want, strict=True))
    worst = 0.0
    for name, g, w in zip(names.split(), got, want, strict=True):
        ratio = error_ratio(g, w, stock_error, longest_sum)
        assert ratio <= 1, f"{name}: error is {ratio:.3g} times the allowed one\n{g}\n{w.to(g.dtype)}"
        worst = max(worst, ratio)
    return worst


def _cast(values: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def _stock(of: Callable[..., Any], tensors: Sequence[Tensor | None], dtype: torch.dtype, tf32: bool) -> Any:
    """What stock PyTorch computes; with `tf32`, operands of the recurrent product are rounded to it."""
    return of(*_cast(tensors, dtype), **({"operand": plain_lstm.tf32} if tf32 else {}))


def check_forward(ops: Any, case: LstmCase, dtype: torch.dtype, tf32: bool = False) -> float:
    """Check ops.lstm_recurrence with and without saved state. tf32: the bound is that of such products."""

    def run(draw: LstmCase) -> tuple[Draw, Draw]:
        *tensors, lengths = draw.inputs(dtype)
        want = plain_lstm.forward(*_cast(tensors, torch.float64), lengths)
        stock = _stock(plain_lstm.forward, [*tensors, lengths], dtype, tf32)
        with poisoned_outputs():
            got = ops.lstm_recurrence(*tensors, lengths, None, True)
            short = ops.lstm_recurrence(*tensors, lengths, None, False)
        assert [tuple(s.shape) for s in short[3:]] == [(0,), (0,)]
        return (got, want, stock), (short[:3], want[:3], stock[:3])

    state = state_dtype(dtype)
    dtypes = (dtype, dtype, state, dtype, state)
    full, short = zip(*(run(draw) for draw in case.draws), strict=True)
    assert_outputs("y h_n c_n", short, dtypes[:3], case.longest_sum)
    return assert_outputs("y h_n c_n gates c", full, dtypes, case.longest_sum)


def _backward_inputs(case: LstmCase, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """(cotangents of y, h_n, c_n, gates, c; gates, c, c0, w_hh, w_hr, lengths)."""
    gx, h0, c0, w_hh, w_hr, lengths = case.inputs(dtype)
    values = plain_lstm.forward(*_cast((gx, h0, c0, w_hh, w_hr), torch.float64), lengths)
    state = state_dtype(dtype)
    dtypes = (dtype, dtype, state, dtype, state)
    cotangents = [
        case.normal(10 + n, *v.shape).to(d) for n, (v, d) in enumerate(zip(values, dtypes, strict=True))
    ]
    return cotangents, [values[3].to(dtype), values[4].to(state), c0, w_hh, w_hr, lengths]


def _only(values: list[Any], given: tuple[int, ...] | None, none: bool) -> list[Any]:
    """The values whose place is in `given`; the others are None, or zeros for the plain formulas."""
    if given is None:
        return values
    return [v if n in given else (None if none else torch.zeros_like(v)) for n, v in enumerate(values)]


def check_backward(
    ops: Any, case: LstmCase, dtype: torch.dtype, given: tuple[int, ...] | None = None, tf32: bool = False
) -> float:
    """Check ops.lstm_recurrence_bwd; only the cotangents whose place is in `given` are there. tf32: as in the forward."""

    def run(draw: LstmCase) -> Draw:
        cotangents, saved = _backward_inputs(draw, dtype)
        zeros = _only(cotangents, given, none=False)
        want = plain_lstm.backward(*_cast([*zeros, *saved], torch.float64))
        stock = _stock(plain_lstm.backward, [*zeros, *saved], dtype, tf32)
        if case.proj is None:
            want, stock = (*want[:3], torch.empty(0)), (*stock[:3], torch.empty(0))
        with poisoned_outputs():
            return ops.lstm_recurrence_bwd(*_only(cotangents, given, none=True), *saved, None), want, stock

    dtypes = (dtype, dtype, state_dtype(dtype), dtype)
    return assert_outputs("dgx dh0 dc0 dh", [run(draw) for draw in case.draws], dtypes, case.longest_sum)


def check_second_order(
    ops: Any,
    case: LstmCase,
    dtype: torch.dtype,
    v_given: tuple[int, ...] | None = None,
    d_given: tuple[int, ...] | None = None,
) -> float:
    """Check ops.lstm_recurrence_bwd_bwd against autograd of the plain backward."""

    def run(draw: LstmCase) -> Draw:
        cotangents, saved = _backward_inputs(draw, dtype)
        zeros = _only(cotangents, d_given, none=False)
        first = plain_lstm.backward(*_cast([*zeros, *saved], torch.float64))
        kinds = (dtype, dtype, state_dtype(dtype), dtype)
        v = [draw.normal(20 + n, *f.shape).to(d) for n, (f, d) in enumerate(zip(first, kinds, strict=True))]
        if case.proj is None:
            v[3] = torch.zeros_like(v[3])

        def adjoints(precision: torch.dtype) -> list[Tensor]:
            inputs = [
                x.detach().clone() if isinstance(x, Tensor) else x for x in _cast([*zeros, *saved], precision)
            ]
            for x in inputs:
                if isinstance(x, Tensor) and x.is_floating_point():
                    x.requires_grad_()
            outputs = plain_lstm.backward(*inputs)
            wanted = [*inputs[:8], *([] if inputs[9] is None else [inputs[9]])]
            grads = torch.autograd.grad(
                outputs, wanted, _cast(_only(v, v_given, none=False), precision), allow_unused=True
            )
            return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True)]

        want, stock = adjoints(torch.float64), adjoints(dtype)
        v_args = _only([*v[:3], v[3] if case.proj is not None else None], v_given, none=True)
        dgx = first[0].to(dtype)
        with poisoned_outputs():
            *got, m_bar = ops.lstm_recurrence_bwd_bwd(
                *v_args, *_only(cotangents, d_given, none=True), *saved, None, dgx
            )
        if case.proj is None:
            assert tuple(m_bar.shape) == (0,)
        else:
            # m_bar shows in the adjoint of the projection alone, which the caller forms from it.
            d, p, h = case.directions, case.proj, case.hidden
            dh = first[3].reshape(case.n_steps, case.batch, d, p)
            assert m_bar.dtype == dtype
            m = m_bar.double().reshape(case.n_steps, case.batch, d, h)
            got.append(torch.einsum("tbdp,tbdh->dph", dh, m).to(dtype))
        return got, want, stock

    state = state_dtype(dtype)
    dtypes = [dtype, dtype, state, dtype, state, dtype, state, state]
    names = "a_dy a_dh_n a_dc_n a_d_gates a_d_c a_gates a_c a_c0"
    if case.proj is not None:
        dtypes.append(dtype)
        names += " a_w_hr"
    return assert_outputs(names, [run(draw) for draw in case.draws], dtypes, case.longest_sum)
