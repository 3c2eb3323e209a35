"""The CUDA step kernels, run by the emulator, against plain PyTorch in float64: every dtype, layout and optional operand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ..ops import plain_lstm
from . import EmulatedCuda

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HIDDEN = [1, 3, 8, 33, 129]
ROWS = 5
# Additions and roundings behind one value, in the state dtype: the longest chain of lstm_step_bwd_bwd, generously.
LONGEST_SUM = 64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def check(got: Tensor, want: Tensor, name: str) -> None:
    """Arithmetic in the state dtype, one rounding to the dtype of the result."""
    assert not got.isnan().any(), f"{name}: elements were not written"
    scale = max(float(want.abs().max()), 1.0)
    eps = LONGEST_SUM * torch.finfo(state_dtype(got.dtype)).eps + torch.finfo(got.dtype).eps
    error = float((got.double() - want).abs().max())
    assert error <= eps * scale, f"{name}: error {error:.3g}, allowed {eps * scale:.3g}"


@pytest.fixture(params=[0, 1], ids=["in order", "shuffled"])
def cuda(emulated_cuda: EmulatedCuda, request: pytest.FixtureRequest) -> Iterator[EmulatedCuda]:
    emulated_cuda.set_seed(request.param)
    yield emulated_cuda
    emulated_cuda.set_seed(0)


@pytest.mark.parametrize("narrow_state", [False, True], ids=["state", "narrow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_operators(cuda: EmulatedCuda, hidden: int, dtype: torch.dtype, narrow_state: bool) -> None:
    c_dtype = dtype if narrow_state else state_dtype(dtype)
    gates, v_dgates = (torch.randn(ROWS, 4 * hidden).to(dtype) for _ in range(2))
    c, dc_new, v_dc = (torch.randn(ROWS, hidden).to(c_dtype) for _ in range(3))
    dh = torch.randn(ROWS, hidden).to(dtype)

    leaves = [x.double().requires_grad_() for x in (dh, dc_new, gates, c)]
    h, c_new, _ = plain_lstm.step(leaves[2], leaves[3])
    first = torch.autograd.grad((h, c_new), leaves[2:], leaves[:2], create_graph=True)
    second = torch.autograd.grad(first, leaves, (v_dgates.double(), v_dc.double()))

    got = [
        *cuda.lstm_gates(gates, c),
        *cuda.lstm_gates_bwd(dh, dc_new, gates, c),
        *cuda.lstm_gates_bwd_bwd(v_dgates, v_dc, dh, dc_new, gates, c),
    ]
    names = ["h", "c_new", "dgates", "dc", "a_dh", "a_dc_new", "a_gates", "a_c"]
    dtypes = [dtype, c_dtype, dtype, c_dtype, dtype, c_dtype, dtype, c_dtype]
    for name, kind, x, want in zip(names, dtypes, got, (h, c_new, *first, *second), strict=True):
        assert x.dtype == kind
        check(x, want.detach(), name)


# How the operands of a step lie in memory: 16-byte aligned rows, rows with gaps, rows that start at odd places.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "gaps": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], -1)[:, : x.shape[1]],
    "unaligned": lambda x: torch.nn.functional.pad(x, (1, 0), value=float("nan"))[:, 1:],
}


class Operands:
    """Random operands of a step, and float64 twins for the plain implementation."""

    def __init__(self, hidden: int, dtype: torch.dtype, layout: str, lengths: tuple[int, ...] | None) -> None:
        self.hidden, self.dtype, self.state, self.layout = hidden, dtype, state_dtype(dtype), LAYOUTS[layout]
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.active = torch.ones(ROWS, dtype=torch.bool) if lengths is None else self.lengths > 1
        self.twins: dict[int, Tensor] = {}

    def _keep(self, x: Tensor) -> Tensor:
        laid = self.layout(x)
        self.twins[id(laid)] = x.double()
        self._alive = [*getattr(self, "_alive", []), laid]
        return laid

    def gates(self, x: Tensor | None = None) -> Tensor:
        return self._keep((torch.randn(ROWS, 4 * self.hidden) if x is None else x).to(self.dtype))

    def cells(self) -> Tensor:
        return self._keep(torch.randn(ROWS, self.hidden).to(self.dtype))

    def states(self, x: Tensor | None = None) -> Tensor:
        return self._keep((torch.randn(ROWS, self.hidden) if x is None else x).to(self.state))

    def empty(self, columns: int, dtype: torch.dtype) -> Tensor:
        return self._keep(torch.full((ROWS, columns), float("nan"), dtype=dtype))

    def unread(self, *tensors: Tensor | None) -> None:
        """Poison the inactive rows of what inactive rows must ignore (kernels only; the plain code multiplies)."""
        for x in tensors:
            if x is not None:
                x[~self.active] = float("nan")

    def twin(self, x: Tensor | int | None) -> Tensor | int | None:
        return self.twins[id(x)] if isinstance(x, Tensor) and id(x) in self.twins else x

    def check(
        self,
        step: Callable[..., None],
        plain: Callable[..., None],
        args: dict[str, object],
        outputs: list[str],
    ) -> None:
        """Run both; every output must agree everywhere, untouched elements included."""
        step(*args.values())
        plain(*(self.twin(x) for x in args.values()))
        for name in outputs:
            if args[name] is not None:
                want, got = self.twin(args[name]), args[name]
                untouched = want.isnan()
                assert torch.equal(got.isnan(), untouched), f"{name}: wrong elements written"
                check(got.masked_fill(untouched, 0), want.masked_fill(untouched, 0), name)


STEP_CASES = [
    (hidden, layout, lengths, full)
    for hidden, layout in [
        (3, "contiguous"),
        (8, "contiguous"),
        (16, "gaps"),
        # Aligned rows whose length is no multiple of the vector width of float32 and of 16-bit types.
        (6, "gaps"),
        (12, "gaps"),
        (129, "gaps"),
        (16, "unaligned"),
    ]
    for lengths in (None, (3, 0, 1, 2, 7))
    for full in (False, True)
]
steps = pytest.mark.parametrize(("hidden", "layout", "lengths", "full"), STEP_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@steps
@dtypes
def test_step_fwd(emulated_cuda: EmulatedCuda, hidden, layout, lengths, full, dtype) -> None:
    is_ = Operands(hidden, dtype, layout, lengths)
    args = {
        "pre": is_.gates(),
        "c_prev": is_.states(),
        "h_out": is_.empty(hidden, dtype),
        "c_out": is_.empty(hidden, is_.state),
        "acts_out": is_.empty(4 * hidden, dtype) if full else None,
        "lengths": is_.lengths,
        "t": 1,
        "h_state": is_.empty(hidden, dtype) if full and lengths else None,
    }
    is_.unread(args["pre"])
    is_.check(
        emulated_cuda.step_fwd,
        plain_lstm.PlainSteps.step_fwd,
        args,
        ["h_out", "c_out", "acts_out", "h_state"],
    )


def saved_step(is_: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Activated gates and cell states that belong together."""
    c_prev = torch.randn(ROWS, is_.hidden)
    _, c_new, acts = plain_lstm.step(torch.randn(ROWS, 4 * is_.hidden), c_prev)
    return is_.gates(acts), is_.states(c_prev), is_.states(c_new)


@steps
@dtypes
def test_step_bwd(emulated_cuda: EmulatedCuda, hidden, layout, lengths, full, dtype) -> None:
    is_ = Operands(hidden, dtype, layout, lengths)
    acts, c_prev, c_new = saved_step(is_)
    args = {
        "acts": acts,
        "c_prev": c_prev,
        "c_new": c_new,
        "dm": is_.cells() if full else None,
        "dc": is_.states() if full else None,
        "ext": is_.gates() if full else None,
        "lengths": is_.lengths,
        "t": 1,
        "delta_out": is_.empty(4 * hidden, dtype),
        "dc_prev_out": is_.empty(hidden, is_.state),
        "dm_keep": is_.empty(hidden, dtype) if lengths else None,
        "dc_total_out": is_.empty(hidden, is_.state) if full else None,
        "dy": is_.cells(),
        "d_c": is_.states() if full else None,
    }
    is_.unread(acts, c_prev, c_new, args["ext"], args["dy"])
    outputs = ["delta_out", "dc_prev_out", "dm_keep", "dc_total_out"]
    is_.check(emulated_cuda.step_bwd, plain_lstm.PlainSteps.step_bwd, args, outputs)


@steps
@dtypes
def test_step_bwd_bwd(emulated_cuda: EmulatedCuda, hidden, layout, lengths, full, dtype) -> None:
    is_ = Operands(hidden, dtype, layout, lengths)
    acts, c_prev, c_new = saved_step(is_)
    args = {
        "acts": acts,
        "c_prev": c_prev,
        "c_new": c_new,
        "dm": is_.cells() if full else None,
        "dc_total": is_.states(),
        "ext": is_.gates() if full else None,
        "v": is_.gates(),
        "v_dc_prev": is_.states() if full else None,
        "lengths": is_.lengths,
        "t": 1,
        "a_dm_out": is_.empty(hidden, dtype),
        "a_dc_out": is_.empty(hidden, is_.state),
        "a_ext_out": is_.empty(4 * hidden, dtype) if full else None,
        "a_acts_out": is_.empty(4 * hidden, dtype),
        "a_c_prev_out": is_.states(),
        "a_c_new_out": is_.empty(hidden, is_.state),
        "a_dm_state": is_.empty(hidden, dtype) if full and lengths else None,
    }
    is_.unread(acts, c_prev, c_new, args["dm"], args["dc_total"], args["ext"], args["v"])
    is_.check(
        emulated_cuda.step_bwd_bwd,
        plain_lstm.PlainSteps.step_bwd_bwd,
        args,
        [name for name in args if name[:2] == "a_"],
    )


def test_outputs_may_be_inputs(emulated_cuda: EmulatedCuda) -> None:
    for hidden in (5, 8):
        is_ = Operands(hidden, torch.bfloat16, "contiguous", (3, 0, 1, 2, 7))
        pre, c = is_.gates(), is_.states()
        h, apart, c_apart = (
            is_.empty(hidden, is_.dtype),
            is_.empty(4 * hidden, is_.dtype),
            is_.empty(hidden, is_.state),
        )
        emulated_cuda.step_fwd(pre, c, h, c_apart, apart, is_.lengths, 1, None)
        emulated_cuda.step_fwd(pre, c, h, c, pre, is_.lengths, 1, None)
        assert torch.equal(pre, apart)
        assert torch.equal(c, c_apart)


GRID_SIZES = [(1, 1), (64, 16), (65, 16), (5, 33), (127, 3), (3, 512), (2, 1028)]


@pytest.mark.parametrize(("rows", "hidden"), GRID_SIZES, ids=str)
def test_grids_have_few_idle_threads(emulated_cuda: EmulatedCuda, rows: int, hidden: int) -> None:
    emulated_cuda.lstm_gates(torch.randn(rows, 4 * hidden), torch.randn(rows, hidden))
    row_blocks, unit_blocks, along, across = emulated_cuda.last_launch()
    pieces = hidden if hidden % 4 else hidden // 4
    assert unit_blocks == -(-pieces // 128), "as few blocks as a row needs"
    assert pieces <= unit_blocks * along < pieces + unit_blocks, "of nearly equal size"
    assert across == 128 // along, "as many rows as fit"
    assert row_blocks == -(-rows // across), "as few blocks as the rows need"


def test_sizes_beyond_the_grid_are_refused(emulated_cuda: EmulatedCuda) -> None:
    def launch(rows: int, hidden: int) -> None:
        pre, state = (torch.empty(1, n).expand(rows, n) for n in (4 * hidden, hidden))
        emulated_cuda.step_fwd(pre, state, state, state, None, None, 0, None)

    for rows, hidden in [(1, 65535 * 128 + 1), (2**31, 512)]:
        with pytest.raises(ValueError, match="cudaError"):
            launch(rows, hidden)


def test_sizes_and_dtypes_of_no_operands(emulated_cuda: EmulatedCuda) -> None:
    invalid = 1
    for shape, error in {(0, 3): 0, (3, 0): 0, (0, 0): 0, (-1, 3): invalid, (3, -1): invalid}.items():
        assert emulated_cuda.launch_nothing(*shape, 1, 1) == error
    states = {torch.float64: {torch.float64}, torch.float32: {torch.float32}}
    states |= {dtype: {dtype, torch.float32} for dtype in (torch.float16, torch.bfloat16)}
    for dtype in DTYPES:
        for c_dtype in set(DTYPES) - states[dtype]:
            with pytest.raises(ValueError, match="cudaError"):
                emulated_cuda.lstm_gates(torch.zeros(2, 12, dtype=dtype), torch.zeros(2, 3, dtype=c_dtype))


def aligned(rows: int, columns: int, stride: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Rows that start `offset` elements behind a multiple of 64 bytes."""
    whole = torch.zeros(rows * stride + offset + 64, dtype=dtype)
    start = -whole.data_ptr() % 64 // dtype.itemsize + offset
    return torch.as_strided(whole, (rows, columns), (stride, 1), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", ["step_fwd", "step_bwd", "step_bwd_bwd"])
def test_rows_move_in_pieces_where_all_operands_allow_it(
    emulated_cuda: EmulatedCuda, step: str, dtype: torch.dtype
) -> None:
    """The hardware faults on a piece of 16 bytes that does not start at a multiple of 16."""
    hidden, rows, width, state = 8, 2, 16 // dtype.itemsize, state_dtype(dtype)
    steps = {
        "step_fwd": "GSCSg_tc",
        "step_bwd": "GSScsg_tgScscs",
        "step_bwd_bwd": "GSScSggs_tCSgGSSc",
    }
    # Lower case letters are optional operands; _ stands for lengths, t for a time.
    kinds = {"g": (4 * hidden, dtype), "c": (hidden, dtype), "s": (hidden, state)}

    def width_with(changed: int | None, stride: int = 0, offset: int = 0, absent: bool = False) -> int:
        args: list[object] = []
        for place, letter in enumerate(steps[step]):
            if letter in "_t":
                args.append(None if letter == "_" else 0)
                continue
            columns, kind = kinds[letter.lower()]
            other = place == changed
            args.append(
                None
                if absent and letter.islower()
                else aligned(rows, columns, columns + other * stride, other * offset, kind)
            )
        getattr(emulated_cuda, step)(*args)
        _, blocks, threads, _ = emulated_cuda.last_launch()
        assert blocks == 1
        return hidden // threads

    assert width_with(None) == width_with(None, absent=True) == width
    for place, letter in enumerate(steps[step]):
        if letter not in "_t":
            piece = 16 // kinds[letter.lower()][1].itemsize
            assert width_with(place, stride=piece) == width_with(place, offset=piece) == width
            assert width_with(place, stride=1) == width_with(place, offset=1) == 1
            assert width_with(place, stride=piece // 2) == 1


def test_nan_and_infinity_travel(emulated_cuda: EmulatedCuda) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e4, -1e4])
    pairs = torch.cartesian_prod(special, special)
    gates, c = torch.stack([pairs[:, 0], pairs[:, 1], pairs[:, 1], pairs[:, 0]], 1), torch.ones(len(pairs), 1)
    for got, want in zip(emulated_cuda.lstm_gates(gates, c), plain_lstm.step(gates, c)[:2], strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_operands_that_do_not_fit_are_refused(emulated_cuda: EmulatedCuda) -> None:
    gates, c = torch.randn(4, 12), torch.randn(4, 3)
    with pytest.raises(ValueError, match="expected 4 contiguous rows of 12"):
        emulated_cuda.lstm_gates(gates[:, :8].contiguous(), c)
    with pytest.raises(ValueError, match="cudaError"):
        emulated_cuda.lstm_gates(gates, c.double())
