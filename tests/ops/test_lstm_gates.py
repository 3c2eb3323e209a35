"""Operator lstm_gates on every backend: values, derivatives, layouts, transforms, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fuseblock
from fuseblock import functional, ops
from fuseblock.reference import lstm_gates_bwd_reference, lstm_gates_reference

from ..backends import Forced
from .bounds import error_ratio, poisoned_outputs, relative_error, state_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 5), (129, 33), (2, 3, 8)]
LONGEST_SUM = 64  # additions and roundings behind one value, generously


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, c_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    *lead, hidden = shape
    gates = 2 * torch.randn(*lead, 4 * hidden, dtype=torch.float64)
    c = torch.randn(shape, dtype=torch.float64)
    return gates.to(dtype), c.to(c_dtype or state_dtype(dtype))


def composite(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """What PyTorch users write by hand, in the dtypes given."""
    i, f, g, o = gates.chunk(4, -1)
    c_new = f.sigmoid() * c.to(gates.dtype) + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_new.tanh(), c_new


def derivatives(
    gates: Tensor, c: Tensor, dh: Tensor, dc: Tensor, v: tuple[Tensor, Tensor]
) -> list[list[Tensor]]:
    """Outputs, first and second derivatives of the composite, in the dtypes given."""
    leaves = [x.detach().clone().requires_grad_() for x in (gates, c.to(gates.dtype), dh, dc.to(gates.dtype))]
    outputs = composite(*leaves[:2])
    first = torch.autograd.grad(outputs, leaves[:2], leaves[2:], create_graph=True)
    dgates, d_c = first
    adjoint = torch.autograd.grad(
        (dgates, d_c), (leaves[2], leaves[3], *leaves[:2]), (v[0], v[1].to(gates.dtype))
    )
    return [list(outputs), list(first), list(adjoint)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_derivatives(forced: Forced, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gates, c = inputs(shape, dtype)
    dh, dc = torch.randn(shape).to(dtype), torch.randn(shape).to(c.dtype)
    v = (torch.randn(gates.shape).to(dtype), torch.randn(shape).to(c.dtype))
    want = derivatives(*(x.double() for x in (gates, c, dh, dc)), (v[0].double(), v[1].double()))
    stock = derivatives(gates, c, dh, dc, v)
    with poisoned_outputs():
        got = [
            forced.lstm_gates(gates, c),
            forced.lstm_gates_bwd(dh, dc, gates, c),
            forced.lstm_gates_bwd_bwd(*v, dh, dc, gates, c),
        ]
    expected = [(dtype, c.dtype), (dtype, c.dtype), (dtype, c.dtype, dtype, c.dtype)]
    for order, kinds in enumerate(expected):
        stock_error = max(relative_error(s, w) for s, w in zip(stock[order], want[order], strict=True))
        for k, kind in enumerate(kinds):
            value = got[order][k]
            assert value.dtype == kind
            assert value.is_contiguous()
            ratio = error_ratio(value, want[order][k], stock_error, LONGEST_SUM)
            assert ratio <= 1, f"order {order}, output {k}: error {ratio:.3g} times the allowed one"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_cell_state(forced: Forced, dtype: torch.dtype) -> None:
    gates, c = inputs((5, 16), dtype, c_dtype=dtype)
    h, c_new = forced.lstm_gates(gates, c)
    wide_h, wide_c = forced.lstm_gates(gates, c.float())
    assert c_new.dtype == dtype
    assert torch.equal(h, wide_h)
    assert torch.equal(c_new, wide_c.to(dtype))


@pytest.mark.parametrize("missing", ["dh", "dc"])
def test_missing_cotangents_mean_zeros(forced: Forced, missing: str) -> None:
    gates, c = inputs((3, 5), torch.float64)
    given = torch.randn_like(c)
    zero = torch.zeros_like(c)
    dh, dc = (None, given) if missing == "dh" else (given, None)
    full = (zero, given) if missing == "dh" else (given, zero)
    for got, want in zip(
        forced.lstm_gates_bwd(dh, dc, gates, c), lstm_gates_bwd_reference(*full, gates, c), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    v = torch.randn_like(gates), torch.randn_like(c)
    for v_args, v_full in (((None, v[1]), (0 * v[0], v[1])), ((v[0], None), (v[0], 0 * v[1]))):
        got = forced.lstm_gates_bwd_bwd(*v_args, dh, dc, gates, c)
        want = forced.lstm_gates_bwd_bwd(*v_full, *full, gates, c)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_gradgradcheck(forced: Forced) -> None:
    gates, c = (x.to(forced.device).requires_grad_() for x in inputs((2, 3), torch.float64))
    fast = forced.name in ("triton", "cuda")  # interpreted and emulated kernels take milliseconds a call
    with fuseblock.backend(forced.name):
        assert torch.autograd.gradcheck(ops.lstm_gates, (gates, c), fast_mode=fast)
        assert torch.autograd.gradgradcheck(ops.lstm_gates, (gates, c), fast_mode=fast)


LAYOUTS = {
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape[0], *x.shape[1:]),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(forced: Forced, layout: str) -> None:
    gates, c = (LAYOUTS[layout](x) for x in inputs((4, 3, 6), torch.float64))
    got, want = forced.lstm_gates(gates, c), lstm_gates_reference(gates, c)
    got_bwd = forced.lstm_gates_bwd(c, c, gates, c)
    want_bwd = lstm_gates_bwd_reference(c, c, gates, c)
    for a, b in zip((*got, *got_bwd), (*want, *want_bwd), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_channels_last_rows_serve_convlstm(forced: Forced) -> None:
    gates, c = inputs((2, 3, 3, 5), torch.float64)
    h, _ = forced.lstm_gates(gates.permute(0, 3, 1, 2).permute(0, 2, 3, 1), c)
    torch.testing.assert_close(h, lstm_gates_reference(gates, c)[0], rtol=1e-12, atol=1e-12)


def test_nan_and_infinity_travel(forced: Forced) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e4, -1e4])
    rows = torch.cartesian_prod(special, special)
    gates = torch.stack([rows[:, 0], rows[:, 1], rows[:, 1], rows[:, 0]], 1)
    c = torch.ones(len(rows), 1)
    for got, want in zip(forced.lstm_gates(gates, c), composite(gates, c), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_small_arguments_keep_their_relative_accuracy(forced: Forced) -> None:
    gates = torch.tensor([[50.0, -50.0, 1e-6, 50.0]])
    h, c = forced.lstm_gates(gates, torch.zeros(1, 1))
    torch.testing.assert_close(c, torch.full_like(c, 1e-6), rtol=1e-4, atol=0)
    torch.testing.assert_close(h, torch.full_like(h, 1e-6), rtol=1e-4, atol=0)


def test_run_to_run_equal(forced: Forced) -> None:
    gates, c = inputs((65, 17), torch.float32)
    first, second = forced.lstm_gates(gates, c), forced.lstm_gates(gates, c)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "empty"])
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    gates, c = inputs((3, 2, 4), dtype)
    if layout != "contiguous":
        gates, c = LAYOUTS[layout](gates), LAYOUTS[layout](c)
    gates, c = gates.detach().requires_grad_(), c.detach().requires_grad_()
    v = torch.randn_like(gates)
    torch.library.opcheck(torch.ops.fuseblock.lstm_gates.default, (gates, c))
    torch.library.opcheck(torch.ops.fuseblock.lstm_gates_bwd.default, (c.to(dtype), None, gates, c))
    torch.library.opcheck(
        torch.ops.fuseblock.lstm_gates_bwd_bwd.default,
        (v, None, c.detach().to(dtype), None, gates.detach(), c.detach()),
    )


def test_third_order_raises() -> None:
    gates, c = (x.requires_grad_() for x in inputs((2, 3), torch.float64))
    (grad,) = torch.autograd.grad(functional.lstm_gates(gates, c)[0].sum(), gates, create_graph=True)
    (grad2,) = torch.autograd.grad(grad.pow(2).sum(), gates, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives need fuseblock.backend"):
        grad2.sum().backward()


def test_bad_input() -> None:
    gates, c = inputs((3, 5), torch.float32)
    with pytest.raises(ValueError, match=r"expected gates of shape \(\.\.\., 4H\)"):
        functional.lstm_gates(gates[:, :-1], c)
    with pytest.raises(ValueError, match="expected gates of shape"):
        functional.lstm_gates(gates, c[:2])
    with pytest.raises(TypeError, match="expected c of dtype torch.float32"):
        functional.lstm_gates(gates, c.double())
    with pytest.raises(TypeError, match="floating point"):
        functional.lstm_gates(gates.long(), c.long())


def test_autocast_keeps_the_cell_state_in_float32() -> None:
    gates, c = inputs((3, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        h, c_new = functional.lstm_gates(gates, c)
    assert (h.dtype, c_new.dtype) == (torch.bfloat16, torch.float32)
    want, _ = functional.lstm_gates(gates.bfloat16(), c)
    assert torch.equal(h, want)
