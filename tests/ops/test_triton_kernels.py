"""The Triton kernels through their launchers: in the hardened interpreter, or on a GPU where there is one.

Values are compared with the plain formulas in float64, see lstm_cases.
"""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fuseblock
from fuseblock import dispatch
from fuseblock.launch import (
    _triton,
    gpu,
    triton_lstm_gates,
    triton_lstm_recurrence,
    triton_lstm_recurrence_step,
)
from fuseblock.launch.triton_lstm_recurrence_step import StepConfig

from ..triton_interpreter import install
from . import plain_lstm
from .bounds import poisoned_outputs, state_dtype
from .lstm_cases import LstmCase, assert_outputs, check_backward, check_forward, check_second_order

if _triton.INTERPRETED:
    install()

DEVICE = "cpu" if _triton.INTERPRETED else "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FIRST_ORDER = ("lstm_recurrence", "lstm_recurrence_bwd")

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no interpreter and no GPU"
)


def _to(device: str, values: Any) -> list[Any]:
    return [v.to(device) if isinstance(v, Tensor) else v for v in values]


class Engine:
    """The three ops on one engine of the launcher; tensors travel to the device and back."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def _run(self, op: str, args: tuple[Any, ...]) -> list[Tensor]:
        [candidate] = [c for c in triton_lstm_recurrence.candidates(op) if c.variant == self.variant]
        args = tuple(_to(DEVICE, args))
        assert candidate.why_not(*args) is None
        return _to("cpu", candidate.run(*args))

    def lstm_recurrence(self, *args: Any) -> list[Tensor]:
        return self._run("lstm_recurrence", args)

    def lstm_recurrence_bwd(self, *args: Any) -> list[Tensor]:
        return self._run("lstm_recurrence_bwd", args)

    def lstm_recurrence_bwd_bwd(self, *args: Any) -> list[Tensor]:
        return self._run("lstm_recurrence_bwd_bwd", args)


PER_STEP, PERSISTENT, FUSED_STEP = Engine("per step"), Engine("persistent"), Engine("fused step")
ENGINES = (PER_STEP, PERSISTENT, FUSED_STEP)

PER_STEP_CASES = [
    LstmCase(3, 3, 33, 2, None, None),
    LstmCase(4, 3, 3, 2, None, (4, 0, 2)),
    LstmCase(3, 2, 16, 1, 5, (3, 1)),
    LstmCase(1, 1, 1, 1, None, None),
]
PERSISTENT_CASES = [
    LstmCase(3, 3, 33, 2, None, None),
    LstmCase(4, 3, 3, 2, None, (4, 0, 2)),
    LstmCase(3, 17, 16, 1, None, (3,) * 16 + (1,)),
    LstmCase(5, 2, 48, 2, None, (2, 9)),
    LstmCase(1, 1, 1, 1, None, None),
]


def _fused_step_case(n_steps: int, batch: int, hidden: int, directions: int, ragged: bool) -> LstmCase:
    lengths = itertools.islice(itertools.cycle((1, n_steps, 0, n_steps + 3, 2)), batch) if ragged else None
    return LstmCase(n_steps, batch, hidden, directions, None, None if lengths is None else tuple(lengths))


#: Every pair of values of T, B, H, D, ragged or not, dtype occurs.
FUSED_STEP_CASES = [
    (_fused_step_case(*sizes), dtype)
    for *sizes, dtype in (
        (7, 8, 24, 1, True, torch.bfloat16),
        (2, 1, 40, 2, True, torch.float16),
        (1, 3, 128, 2, False, torch.bfloat16),
        (7, 1, 100, 1, False, torch.float32),
        (1, 17, 200, 1, True, torch.float32),
        (2, 8, 128, 1, False, torch.float16),
        (7, 17, 24, 2, False, torch.float32),
        (7, 3, 40, 1, True, torch.float32),
        (2, 8, 100, 2, True, torch.float32),
        (7, 3, 200, 2, False, torch.float16),
        (1, 17, 100, 1, True, torch.float16),
        (2, 17, 40, 2, True, torch.bfloat16),
        (7, 1, 128, 1, True, torch.bfloat16),
        (2, 3, 24, 2, True, torch.float16),
        (1, 8, 40, 2, False, torch.float32),
        (1, 1, 24, 2, True, torch.float16),
        (2, 1, 200, 1, False, torch.bfloat16),
        (1, 3, 100, 1, False, torch.bfloat16),
        (7, 17, 128, 2, True, torch.float32),
        (2, 8, 200, 1, False, torch.float32),
    )
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs per launch of a step kernel, with ragged last blocks."""
    monkeypatch.setattr(_triton, "step_blocks", lambda rows, hidden: (2, 16))


# ---------------------------------------------------------------------------------------------- recurrence, per step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PER_STEP_CASES, ids=str)
def test_per_step_forward(case: LstmCase, dtype: torch.dtype) -> None:
    check_forward(PER_STEP, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PER_STEP_CASES, ids=str)
def test_per_step_backward(case: LstmCase, dtype: torch.dtype) -> None:
    check_backward(PER_STEP, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PER_STEP_CASES, ids=str)
def test_per_step_second_order(case: LstmCase, dtype: torch.dtype) -> None:
    check_second_order(PER_STEP, case, dtype)


@pytest.mark.usefixtures("small_blocks")
def test_per_step_in_small_blocks() -> None:
    case = LstmCase(2, 3, 33, 2, None, (2, 1, 2))
    check_forward(PER_STEP, case, torch.float32)
    check_backward(PER_STEP, case, torch.float32)
    check_second_order(PER_STEP, case, torch.float32)


def test_per_step_without_some_cotangents() -> None:
    case = LstmCase(3, 2, 4, 1, None, (3, 1))
    for given in range(5):
        check_backward(PER_STEP, case, torch.float64, given=(given,))
    for given in range(3):
        check_second_order(PER_STEP, case, torch.float64, v_given=(given,), d_given=(given + 1,))


# -------------------------------------------------------------------------------------------- recurrence, persistent


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", PERSISTENT_CASES, ids=str)
def test_persistent_forward(case: LstmCase, dtype: torch.dtype) -> None:
    check_forward(PERSISTENT, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", PERSISTENT_CASES, ids=str)
def test_persistent_backward(case: LstmCase, dtype: torch.dtype) -> None:
    check_backward(PERSISTENT, case, dtype)


def test_persistent_backward_without_some_cotangents() -> None:
    case = LstmCase(3, 2, 4, 2, None, (3, 1))
    for given in range(5):
        check_backward(PERSISTENT, case, torch.float32, given=(given,))


# -------------------------------------------------------------------------------------------- recurrence, fused step


@pytest.mark.parametrize(("case", "dtype"), FUSED_STEP_CASES, ids=str)
def test_fused_step(case: LstmCase, dtype: torch.dtype) -> None:
    check_forward(FUSED_STEP, case, dtype)
    check_backward(FUSED_STEP, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("hidden", [24, 40, 100, 128, 200, 256, 320])
@pytest.mark.parametrize("batch", [1, 3, 8, 17])
def test_fused_step_over_odd_sizes(batch: int, hidden: int, dtype: torch.dtype) -> None:
    for n_steps, ragged in itertools.product((1, 2, 33), (False, True)):
        case = _fused_step_case(n_steps, batch, hidden, 2, ragged)
        check_forward(FUSED_STEP, case, dtype)
        check_backward(FUSED_STEP, case, dtype)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_fused_step_in_small_blocks(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs per launch in all three dimensions, and sums in several passes and parts, the last ones ragged."""
    config = StepConfig(16, 16, 16, parts, 4, 1)
    monkeypatch.setattr(triton_lstm_recurrence_step, "step_config", lambda *args, **options: config)
    case = _fused_step_case(2, 18, 25, 2, True)
    check_forward(FUSED_STEP, case, torch.float32)
    check_backward(FUSED_STEP, case, torch.float32)


def test_fused_step_without_some_cotangents() -> None:
    case = LstmCase(3, 3, 4, 2, None, (3, 1, 0))
    for given in range(5):
        check_backward(FUSED_STEP, case, torch.float32, given=(given,))


def test_fused_step_fits_every_known_gpu() -> None:
    """tests/test_compile_triton.py holds what compilers take against these numbers."""

    def shared(dtype: torch.dtype, batch: int, hidden: int, backward: bool) -> int:
        config = triton_lstm_recurrence_step.gpu_step_config(dtype, batch, hidden, backward=backward)
        return config.shared(dtype, backward=backward)

    smallest = min(card.shared_bytes for card in gpu.KNOWN)
    for call in itertools.product(DTYPES[1:], (1, 16, 17, 32, 33, 64, 65), (100, 256), (False, True)):
        assert shared(*call) <= smallest
    assert shared(torch.bfloat16, 16, 256, False) == 4 * (16 + 64) * 4 * 32 * 2 + 1024
    assert shared(torch.bfloat16, 16, 256, True) == 4 * (16 + 16) * 4 * 64 * 2 + 1024
    assert shared(torch.bfloat16, 16, 100, False) == 2 * 16 * 64 * 4 + 1024


def test_fused_step_looks_its_kernel_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later launches start the kernel that the first one returned, with every parameter, and differ in the step alone."""
    kernel = triton_lstm_recurrence_step.lstm_recurrence_step_fwd_kernel
    launches = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args, **options: (launches.append((grid, args, options)), self)[1]

    monkeypatch.setattr(triton_lstm_recurrence_step, "lstm_recurrence_step_fwd_kernel", Recorded())
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    triton_lstm_recurrence_step.fwd(*LstmCase(3, 70, 48, 2, None, None).inputs(torch.bfloat16), None, True)
    assert [grid for grid, _, _ in launches] == [(2, 2, 2)] * 3
    assert [args[0] for _, args, _ in launches] == [0, 1, 2]
    assert [options for _, _, options in launches] == [
        {"num_warps": 8, "num_stages": 3},
        *[{"stream": 7}] * 2,
    ]
    for _, args, _ in launches:
        assert len(args) == len(inspect.signature(kernel.fn).parameters)
        assert all(a is b for a, b in zip(args[1:], launches[0][1][1:], strict=True))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.variant)
def test_strided_and_misaligned_inputs(engine: Engine) -> None:
    """gx of a batch-first layer, off by one element; cotangents that are one expanded scalar."""
    n_steps, batch, hidden = 3, 2, 16
    case = LstmCase(n_steps, batch, hidden, 1, None, None)
    gx, h0, c0, w_hh, _, _ = case.inputs(torch.float32)
    storage = torch.empty(batch * n_steps * 4 * hidden + 1)
    strided = storage[1:].view(batch, n_steps, 4 * hidden).transpose(0, 1)
    strided.copy_(gx)
    # Not through Engine: copies to a device would lose the strides.
    run = {
        op: next(c.run for c in triton_lstm_recurrence.candidates(op) if c.variant == engine.variant)
        for op in FIRST_ORDER
    }
    args = _to(DEVICE, (h0, c0, w_hh, None, None, None, True))
    moved = torch.empty_like(storage, device=DEVICE)[1:].view(batch, n_steps, 4 * hidden).transpose(0, 1)
    moved.copy_(gx)
    y, h_n, c_n, gates, c = run["lstm_recurrence"](moved, *args)
    expected = run["lstm_recurrence"](gx.to(DEVICE), *args)
    torch.testing.assert_close((y, h_n, c_n, gates, c), tuple(expected), rtol=0, atol=0)

    ones = torch.ones((), device=DEVICE)
    cotangents = [ones.expand(x.shape) for x in (y, h_n, c_n, gates, c)]
    saved = [gates, c, args[1], args[2], None, None, None]
    got = run["lstm_recurrence_bwd"](*cotangents, *saved)
    want = run["lstm_recurrence_bwd"](*(x.contiguous() for x in cotangents), *saved)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.variant)
def test_strided_lengths(engine: Engine) -> None:
    *tensors, lengths = LstmCase(3, 3, 4, 1, None, (3, 1, 2)).inputs(torch.float32)
    strided = torch.stack((lengths, torch.full_like(lengths, 9)), 1)[:, 0]
    orders = (lengths, strided)
    y, h_n, c_n, gates, c = want = engine.lstm_recurrence(*tensors, lengths, None, True)
    assert all(map(torch.equal, want, engine.lstm_recurrence(*tensors, strided, None, True)))
    cotangents, saved = (y, h_n, c_n, gates, c), (gates, c, *tensors[2:])
    first, same = (engine.lstm_recurrence_bwd(*cotangents, *saved, order, None) for order in orders)
    assert all(map(torch.equal, first, same))
    if engine is PER_STEP:
        v = (gates, h_n, c_n, None, *cotangents, *saved)
        second, same = (engine.lstm_recurrence_bwd_bwd(*v, order, None, first[0]) for order in orders)
        assert all(map(torch.equal, second, same))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.variant)
def test_a_batch_of_nothing(engine: Engine) -> None:
    *tensors, _ = LstmCase(2, 0, 4, 2, None, None).inputs(torch.float32)
    y, h_n, c_n, gates, c = engine.lstm_recurrence(*tensors, None, None, True)
    assert (y.shape, h_n.shape, c_n.shape, gates.shape) == ((2, 0, 8), (2, 0, 4), (2, 0, 4), (2, 0, 32))
    dgx, dh0, dc0, _ = engine.lstm_recurrence_bwd(
        y, h_n, None, None, None, gates, c, *tensors[2:], None, None
    )
    assert (dgx.shape, dh0.shape, dc0.shape) == (gates.shape, h_n.shape, c_n.shape)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_and_infinity_travel_and_stay_in_their_rows() -> None:
    gx, h0, c0, w_hh, _, _ = LstmCase(3, 3, 4, 1, None, None).inputs(torch.float32)
    gx[1, 0, 0] = float("nan")
    gx[0, 1, 8:12] = float("inf")
    lengths = torch.tensor([3, 3, 1])
    gx[1:, 2] = float("nan")
    for engine in ENGINES:
        y, h_n, *_ = engine.lstm_recurrence(gx, h0, c0, w_hh, None, lengths, None, True)
        want, want_h, *_ = plain_lstm.forward(gx, h0, c0, w_hh, None, lengths)
        want = torch.where(torch.arange(3)[:, None, None] < lengths[None, :, None], want, 0)
        torch.testing.assert_close(y, want, equal_nan=True)
        torch.testing.assert_close(h_n, want_h, equal_nan=True)


def test_what_inactive_rows_receive_is_ignored() -> None:
    """NaN in cotangents of inactive steps reaches nothing, in either order."""
    case = LstmCase(3, 2, 4, 2, None, (3, 1))
    gx, h0, c0, w_hh, _, lengths = case.inputs(torch.float32)
    for engine in ENGINES:
        y, h_n, c_n, gates, c = engine.lstm_recurrence(gx, h0, c0, w_hh, None, lengths, None, True)
        dy, d_gates, d_c = torch.ones_like(y), torch.ones_like(gates), torch.ones_like(c)
        dy[1:, 1] = d_gates[1:, 1] = float("nan")
        saved = (gates, c, c0, w_hh, None, lengths, None)
        first = engine.lstm_recurrence_bwd(dy, h_n, c_n, d_gates, d_c, *saved)
        assert all(x.isfinite().all() for x in first)
        if engine is PER_STEP:
            v_dgx = torch.ones_like(gates)
            v_dgx[1:, 1] = float("nan")
            cotangents = (v_dgx, h_n, c_n, None, dy, h_n, c_n, d_gates, d_c)
            assert all(
                x.isfinite().all() for x in engine.lstm_recurrence_bwd_bwd(*cotangents, *saved, first[0])
            )


def test_tf32_is_allowed_as_for_pytorchs_operations() -> None:
    """The newer of PyTorch's two interfaces, too, after whose use the older one raises."""
    for operation, setting in (("matmul", torch.backends.cuda.matmul), ("conv", torch.backends.cudnn.conv)):
        before = setting.fp32_precision
        try:
            for value in ("tf32", "ieee"):
                setting.fp32_precision = value
                assert _triton.precision(torch.float32, operation) == value
                assert _triton.precision(torch.bfloat16, operation) == "ieee"
        finally:
            setting.fp32_precision = before


def test_the_engine_is_chosen_with_a_reason() -> None:
    def chosen(case: LstmCase, dtype: torch.dtype) -> str:
        args = (*_to(DEVICE, case.inputs(dtype)), None, True)
        with fuseblock.backend("triton"):
            return dispatch.choose("lstm_recurrence", args).variant

    assert chosen(LstmCase(1, 1, 64, 1, None, None), torch.float32) == "persistent"
    assert chosen(LstmCase(1, 1, 65, 1, None, None), torch.float32) == "fused step"
    assert chosen(LstmCase(1, 1, 128, 1, None, None), torch.bfloat16) == "persistent"
    assert chosen(LstmCase(1, 1, 100, 1, None, None), torch.bfloat16) == "fused step"
    assert chosen(LstmCase(1, 1, 8, 1, None, None), torch.float64) == "per step"
    assert chosen(LstmCase(1, 1, 8, 1, 4, None), torch.float32) == "per step"
    packed = (*_to(DEVICE, LstmCase(1, 1, 8, 1, None, None).inputs(torch.float32)), torch.tensor([1]), True)
    with fuseblock.backend("triton"), pytest.raises(fuseblock.BackendError, match="batch_sizes"):
        dispatch.choose("lstm_recurrence", packed)


# -------------------------------------------------------------------------------------------------------- lstm_gates


def _gates_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, c_dtype: torch.dtype, scale: float
) -> list[Tensor]:
    """(v_dgates, v_dc, dh, dc_new, gates, c)."""
    wide = (*shape[:-1], 4 * shape[-1])
    sizes = (
        (wide, dtype),
        (shape, c_dtype),
        (shape, dtype),
        (shape, c_dtype),
        (wide, dtype),
        (shape, c_dtype),
    )
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(d) for s, d in sizes]


def _gates_forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h, c_new, _ = plain_lstm.step(gates, c)
    return h, c_new


def _gates_expected(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of forward, backward and second order by autograd in `dtype`."""
    v_dgates, v_dc, dh, dc_new, gates, c = (v.detach().to(dtype).clone().requires_grad_() for v in values)
    outputs = _gates_forward(gates, c)
    first = torch.autograd.grad(outputs, (gates, c), (dh, dc_new), create_graph=True)
    second = torch.autograd.grad(first, (dh, dc_new, gates, c), (v_dgates, v_dc))
    return [x.detach() for x in (*outputs, *first, *second)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 8.0])
@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 3, 33), (5, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lstm_gates(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    for c_dtype in {dtype, state_dtype(dtype)}:
        values = _gates_inputs(shape, dtype, c_dtype, scale)
        want, stock = _gates_expected(values, torch.float64), _gates_expected(values, dtype)
        on_device = _to(DEVICE, values)
        with poisoned_outputs():
            got = [
                *triton_lstm_gates.lstm_gates(*on_device[4:]),
                *triton_lstm_gates.lstm_gates_bwd(*on_device[2:]),
                *triton_lstm_gates.lstm_gates_bwd_bwd(*on_device),
            ]
        names = "h c_new dgates dc a_dh a_dc_new a_gates a_c"
        dtypes = (dtype, c_dtype) * 4
        assert_outputs(names, [(_to("cpu", got), want, stock)], dtypes, longest_sum=32)


@pytest.mark.usefixtures("small_blocks")
def test_lstm_gates_in_small_blocks() -> None:
    test_lstm_gates(torch.float32, (5, 33), 1.0)


def test_lstm_gates_layouts_and_missing_cotangents() -> None:
    values = _gates_inputs((4, 6, 8), torch.float64, torch.float64, 1.0)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in values]
    sliced = [torch.cat((v, v), -1)[..., : v.shape[-1]] for v in values]
    columns = [v.transpose(-1, -2).contiguous().transpose(-1, -2) for v in values]
    want = _gates_expected(values, torch.float64)
    for variant in (strided, sliced, columns):
        got = triton_lstm_gates.lstm_gates_bwd_bwd(*_to(DEVICE, variant))
        draw = _to("cpu", got), want[4:], want[4:]
        assert_outputs("a_dh a_dc a_gates a_c", [draw], [torch.float64] * 4, 32)

    for given in range(4):
        zeros = [v if n == given or n > 3 else torch.zeros_like(v) for n, v in enumerate(values)]
        some = [v if n == given or n > 3 else None for n, v in enumerate(_to(DEVICE, values))]
        want = _gates_expected(zeros, torch.float64)
        got = [*triton_lstm_gates.lstm_gates_bwd(*some[2:]), *triton_lstm_gates.lstm_gates_bwd_bwd(*some)]
        draw = _to("cpu", got), want[2:], want[2:]
        assert_outputs("dgates dc a_dh a_dc a_gates a_c", [draw], [torch.float64] * 6, 32)


def test_lstm_gates_of_nothing() -> None:
    gates, c = torch.empty(0, 12, device=DEVICE), torch.empty(0, 3, device=DEVICE)
    h, c_new = triton_lstm_gates.lstm_gates(gates, c)
    assert h.shape == c_new.shape == (0, 3)
    assert triton_lstm_gates.lstm_gates_bwd(h, c_new, gates, c)[0].shape == (0, 12)
