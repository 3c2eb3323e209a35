"""The fused CPU layer, `fuseblock_cpu::lstm_layer` and its gradient, against `torch.nn.LSTM` in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseblock
from fuseblock import _ext
from fuseblock._fused_layer import fused_layers

from .lstm_cases import error_ratio, poisoned_outputs, relative_error, state_dtype

pytestmark = pytest.mark.skipif(
    not _ext.has("fuseblock_cpu", "lstm_layer"), reason="the compiled library is absent"
)


@dataclass(frozen=True)
class Case:
    """n_steps, batch, inputs and hidden units, directions; whether biased, packed and with x in batch-first memory.

    Packed sequences have random lengths where none are given.
    """

    n_steps: int
    batch: int
    inputs: int
    hidden: int
    directions: int = 1
    biased: bool = True
    packed: bool = False
    transposed: bool = False
    lengths: tuple[int, ...] = ()

    def arguments(self, dtype: torch.dtype) -> tuple[torch.nn.LSTM, list[Tensor], Tensor | None]:
        """A float64 module whose weights `dtype` can hold; (x, h0, c0) in `dtype`; batch_sizes."""
        torch.manual_seed(0)
        module = torch.nn.LSTM(
            self.inputs,
            self.hidden,
            bias=self.biased,
            bidirectional=self.directions == 2,
            dtype=torch.float64,
        )
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(p.to(dtype))
        x = torch.randn(self.n_steps, self.batch, self.inputs).to(dtype)
        h0 = torch.randn(self.directions, self.batch, self.hidden).tanh().to(dtype)
        c0 = torch.randn(self.directions, self.batch, self.hidden).to(state_dtype(dtype))
        if self.transposed:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if not self.packed:
            return module, [x, h0, c0], None
        lengths = torch.randint(1, self.n_steps + 1, (self.batch,)).sort(descending=True).values
        lengths[0] = self.n_steps
        lengths = torch.tensor(self.lengths) if self.lengths else lengths
        ragged = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
        return module, [ragged.data, h0, c0], ragged.batch_sizes


def run_module(
    module: torch.nn.LSTM,
    inputs: list[Tensor],
    batch_sizes: Tensor | None,
    cotangents: list[Tensor | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    """(y, h_n, c_n, dx, dh0, dc0, per direction dw_ih, dw_hh and, if biased, db) of PyTorch in `dtype`."""
    module = module.to(dtype)
    x, h0, c0 = leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    if batch_sizes is None:
        y, (h_n, c_n) = module(x, (h0, c0))
    else:
        packed, (h_n, c_n) = module(torch.nn.utils.rnn.PackedSequence(x, batch_sizes), (h0, c0))
        y = packed.data
    used = [(o, g.to(dtype)) for o, g in zip((y, h_n, c_n), cotangents, strict=True) if g is not None]
    wanted = [*leaves, *(p for name, p in module.named_parameters() if "bias_hh" not in name)]
    grads = torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used])
    return [t.detach().to(torch.float64) for t in (y, h_n, c_n, *grads)]


def check(
    case: Case, dtype: torch.dtype, given: tuple[int, ...] = (0, 1, 2), ops: Any = torch.ops.fuseblock_cpu
) -> None:
    """Check both passes; only the cotangents of y, h_n, c_n whose place is in `given` are there."""
    module, inputs, batch_sizes = case.arguments(dtype)
    weights = [p.detach().to(dtype) for p in module.parameters()]
    with poisoned_outputs():
        y, h_n, c_n, gates, c = ops.lstm_layer(*inputs, weights, batch_sizes, True)
        short = ops.lstm_layer(*inputs, weights, batch_sizes, False)
        cotangents = [
            torch.randn(t.shape).to(t.dtype) if n in given else None for n, t in enumerate((y, h_n, c_n))
        ]
        arguments = (*cotangents, *inputs, y, gates, c, weights, batch_sizes)
        grads = ops.lstm_layer_bwd(*arguments, True)
        without_dx = ops.lstm_layer_bwd(*arguments, False)
    assert all(map(torch.equal, short[:3], (y, h_n, c_n)))
    assert [t.numel() for t in (*short[3:], without_dx[0])] == [0, 0, 0]
    assert all(map(torch.equal, without_dx[1:], grads[1:]))
    if not case.biased:
        assert all(db.numel() == 0 for db in grads[5::3])
        grads = [g for n, g in enumerate(grads) if n < 5 or n % 3 != 2]

    want = run_module(module, inputs, batch_sizes, cotangents, torch.float64)
    stock = run_module(module, inputs, batch_sizes, cotangents, dtype)
    got = [y, h_n, c_n, *grads]
    stock_error = max(relative_error(s, w) for s, w in zip(stock, want, strict=True))
    longest = case.n_steps * case.batch * (4 * case.hidden + case.inputs + 32)
    for n, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        assert g.is_contiguous()
        assert g.dtype == (state_dtype(dtype) if n in (2, 5) else dtype)
        ratio = error_ratio(g, w, stock_error, longest)
        assert ratio <= 1, f"output {n}: error is {ratio:.3g} times the allowed one"


CASES = (
    Case(1, 1, 1, 1),
    Case(40, 1, 5, 3, directions=2),
    Case(13, 2, 1, 20, biased=False, transposed=True),
    Case(120, 2, 3, 17, packed=True),
    Case(13, 7, 77, 33, directions=2, packed=True),
    Case(5, 64, 40, 50, directions=2, transposed=True),
    Case(3, 97, 40, 20, packed=True, biased=False),
    Case(2, 200, 1, 24),
)


@pytest.fixture(params=(1, 2, 8))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_module(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_missing_cotangents(given: tuple[int, ...]) -> None:
    check(Case(9, 3, 5, 20, directions=2, packed=True), torch.float64, given)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("packed", [False, True])
def test_threads(packed: bool) -> None:
    check(Case(30, 20, 40, 50, directions=2, packed=packed), torch.float64)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [8], indirect=True)
def test_more_threads_than_rows_worth_one() -> None:
    """Threads that get no rows, since one sequence is most of the work."""
    check(Case(100, 4, 100, 100, packed=True, lengths=(100, 1, 1, 1)), torch.float64)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa: str) -> None:
    code = (
        "import sys, torch\n"
        "from tests.ops import test_lstm_layer_cpu as t\n"
        "try: torch.ops.fuseblock_cpu.lstm_gates(torch.zeros(1, 4), torch.zeros(1, 1))\n"
        "except RuntimeError: sys.exit(77)\n"
        "for case in t.CASES:\n"
        "    for dtype in (torch.float64, torch.float32, torch.bfloat16): t.check(case, dtype)\n"
    )
    env = {**os.environ, "FUSEBLOCK_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env)
    if done.returncode == 77:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr


def test_same_result_every_time() -> None:
    module, inputs, _ = Case(30, 20, 40, 50).arguments(torch.float32)
    runs = []
    for _ in range(2):
        ours = fuseblock.nn.LSTM(40, 50)
        ours.load_state_dict(module.state_dict())
        y, _ = ours(inputs[0])
        y.sum().backward()
        runs.append([y, *(p.grad for p in ours.parameters())])
    assert all(map(torch.equal, *runs))


def test_which_layers() -> None:
    def takes(x: Tensor, hidden: int, **options: Any) -> list[bool]:
        options = {"proj_size": 0, "bias": True} | options
        module = torch.nn.LSTM(x.shape[-1], hidden, 2, **options)
        weights = []
        for names in module._all_weights:
            own = {n.split("_l")[0]: getattr(module, n) for n in names}
            slots = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            weights.append(tuple(own.get(slot) for slot in slots))
        return fused_layers(x, weights, 1, None, None)

    x = torch.zeros(10, 3, 7)
    assert takes(x, 20) == takes(x, 20, bias=False) == [True, True]
    assert takes(x, 20, proj_size=4) == [False, False]
    assert takes(x, 200) == [True, False]
    assert takes(x[:1], 20) == [False, False]
    assert takes(x.to(torch.int64), 20) == [False, False]
    with fuseblock.backend("reference"):
        assert takes(x, 20) == [False, False]


def test_mistakes() -> None:
    module, inputs, _ = Case(3, 2, 4, 5).arguments(torch.float32)
    weights = [p.detach().float() for p in module.parameters()]
    layer = torch.ops.fuseblock_cpu.lstm_layer
    with pytest.raises(RuntimeError, match=r"w_ih must have shape \(20, 7\)"):
        layer(torch.zeros(3, 2, 7), *inputs[1:], weights, None, False)
    with pytest.raises(RuntimeError, match="2 or 4 tensors per direction"):
        layer(*inputs, weights[:3], None, False)
    with pytest.raises(RuntimeError, match="must not be empty"):
        layer(torch.zeros(0, 2, 4), *inputs[1:], weights, None, False)
    with pytest.raises(RuntimeError, match="h0 must be float32"):
        layer(inputs[0], inputs[1].double(), inputs[2], weights, None, False)


def test_batched_gradients() -> None:
    """``is_grads_batched`` runs one backward on a batch of gradients, which PyTorch loops over op by op."""
    module = fuseblock.nn.LSTM(5, 6, 2, bidirectional=True).double()
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    with fuseblock.backend("cpu"):
        y, _ = module(x)
        cotangents = torch.randn(3, *y.shape, dtype=torch.float64)
        one_by_one = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in cotangents]
        together = torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True)
    for got, want in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("frozen", ["weight", "bias", "l0", "input"])
def test_frozen_parts(frozen: str) -> None:
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=frozen != "input")
    stock = torch.nn.LSTM(5, 6, 2, dtype=torch.float64)
    ours = fuseblock.nn.LSTM(5, 6, 2, dtype=torch.float64)
    ours.load_state_dict(stock.state_dict())
    grads = []
    for module in (stock, ours):
        for name, p in module.named_parameters():
            p.requires_grad_(frozen not in name)
        wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
        y, (h_n, c_n) = module(x)
        grads.append(torch.autograd.grad((y.sin().sum() + h_n.sum() + c_n.cos().sum()), wanted))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
