"""Whole layers on the block tier, emulated: the input projection in the kernel, and when a stack on a GPU runs it."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import pad

import fuseblock
from fuseblock import _engine, _fused_layer, _stack, _tables
from fuseblock._recompute import LayerWeights
from fuseblock.launch import cuda_lstm_layer

from .. import tables
from ..emulator import EmulatedRecurrence, load_recurrence
from ..emulator.build import ROOT
from .bounds import error_ratio, relative_error
from .layer_cases import LayerCase, check, layer_case, run
from .resident_cases import assert_equal, case

HALF = (torch.float16, torch.bfloat16)
BATCHES, HIDDENS, STEPS, INPUTS = (1, 3, 8, 17), (24, 40, 100, 128), (1, 2, 33), (1, 4, 5, 28, 32)


@pytest.fixture
def kernels() -> Iterator[EmulatedRecurrence]:
    block = load_recurrence("block")
    yield block
    block.set_seed(0)


#: Every pair of values of two different columns occurs: steps, batch, hidden, inputs, directions, lengths, biases.
PAIRWISE = [
    (33, 1, 24, 1, 2, True, False),
    (2, 3, 40, 1, 1, False, True),
    (1, 8, 100, 1, 1, True, True),
    (2, 17, 128, 1, 2, False, False),
    (1, 3, 24, 4, 1, False, False),
    (33, 8, 40, 4, 2, True, True),
    (2, 1, 100, 4, 2, False, True),
    (33, 17, 24, 4, 1, True, True),
    (1, 1, 128, 4, 1, True, False),
    (2, 8, 24, 5, 2, True, True),
    (1, 17, 40, 5, 2, False, False),
    (33, 3, 100, 5, 2, True, False),
    (33, 1, 128, 5, 1, False, True),
    (2, 17, 24, 28, 1, False, True),
    (1, 1, 40, 28, 1, True, True),
    (33, 8, 100, 28, 1, False, False),
    (2, 3, 128, 28, 2, True, True),
    (1, 8, 24, 32, 2, False, True),
    (33, 1, 40, 32, 2, False, False),
    (2, 17, 100, 32, 1, True, False),
    (33, 3, 128, 32, 1, False, True),
    (1, 8, 128, 32, 2, True, True),
    (2, 1, 24, 32, 1, True, True),
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", PAIRWISE, ids=str)
def test_parity(kernels: EmulatedRecurrence, sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
    check(kernels.layer_fwd, layer_case(*sizes), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("batch", BATCHES)
def test_parity_of_every_size(
    kernels: EmulatedRecurrence, batch: int, hidden: int, inputs: int, dtype: torch.dtype
) -> None:
    for steps, directions, ragged in itertools.product(STEPS, (1, 2), (False, True)):
        kernels.set_seed(steps + directions)
        biased = (steps + directions + ragged) % 2 == 0
        check(kernels.layer_fwd, layer_case(steps, batch, hidden, inputs, directions, ragged, biased), dtype)


def test_every_pair_occurs() -> None:
    values = (STEPS, BATCHES, HIDDENS, INPUTS, (1, 2), (False, True), (False, True))
    for a, b in itertools.combinations(range(len(values)), 2):
        missing = set(itertools.product(values[a], values[b])) - {(row[a], row[b]) for row in PAIRWISE}
        assert not missing, (a, b, missing)


@pytest.mark.parametrize("hidden", [40, 45])
def test_threads_in_any_order(kernels: EmulatedRecurrence, hidden: int) -> None:
    layer = layer_case(5, 9, hidden, 28, 2, True, True)
    arguments = layer.arguments(layer.problem, torch.bfloat16)
    want = run(kernels.layer_fwd, arguments)
    for seed in range(1, 13):
        kernels.set_seed(seed)
        assert_equal(run(kernels.layer_fwd, arguments), want)


@pytest.mark.parametrize("layout", ["batch first", "sliced", "shifted", "odd rows", "expanded"])
@pytest.mark.parametrize("inputs", [5, 32])
def test_layouts_of_x(kernels: EmulatedRecurrence, inputs: int, layout: str) -> None:
    """The same values, wherever x lies; nothing beside it is read."""
    x, *others = layer_case(4, 9, 40, inputs, 2, True, True).arguments(case(4, 9, 40, 2, True), torch.float16)
    if layout == "expanded":
        x = x[:1]
        want = run(kernels.layer_fwd, (x.repeat(4, 1, 1), *others))
        x = x.expand(4, -1, -1)
    else:
        want = run(kernels.layer_fwd, (x, *others))
    if layout == "batch first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout in ("sliced", "odd rows"):
        x = pad(x, (0, 8 if layout == "sliced" else 3), value=float("nan"))[..., :inputs]
    elif layout == "shifted":
        x = pad(x.flatten(), (1, 0), value=float("nan"))[1:].view(x.shape)
    assert_equal(run(kernels.layer_fwd, (x, *others)), want)


def test_weights_and_states_anywhere(kernels: EmulatedRecurrence) -> None:
    def shifted(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        return pad(v.flatten(), (1, 0), value=0).as_strided(v.shape, v.contiguous().stride(), 1)

    x, h0, c0, own, lengths = arguments = layer_case(3, 3, 40, 5, 2, False, True).arguments(
        case(3, 3, 40, 2, False), torch.float16
    )
    moved = [tuple(map(shifted, w)) for w in own]
    got = run(kernels.layer_fwd, (x, shifted(h0), shifted(c0), moved, lengths))  # type: ignore[arg-type]
    assert_equal(got, run(kernels.layer_fwd, arguments))


def test_what_inactive_rows_must_ignore_may_be_nan(kernels: EmulatedRecurrence) -> None:
    x, h0, c0, own, lengths = layer_case(4, 3, 24, 5, 2, True, True).arguments(
        case(4, 3, 24, 2, True), torch.float16
    )
    assert lengths is not None
    beyond = torch.arange(4)[:, None] >= lengths[None]
    want = run(kernels.layer_fwd, (x, h0, c0, own, lengths))
    dirty = x.masked_fill(beyond[..., None], float("nan"))
    assert_equal(run(kernels.layer_fwd, (dirty, h0, c0, own, lengths)), want)


def test_rows_do_not_touch_each_other(kernels: EmulatedRecurrence) -> None:
    x, *others = layer_case(3, 4, 24, 5, 1, False, True).arguments(case(3, 4, 24, 1, False), torch.float16)
    want = run(kernels.layer_fwd, (x, *others))[0]
    x[0, 2] = float("nan")
    got = run(kernels.layer_fwd, (x, *others))[0]
    assert got[:, 2].isnan().all()
    apart = [0, 1, 3]
    assert torch.equal(got[:, apart], want[:, apart])


def test_blocks(kernels: EmulatedRecurrence) -> None:
    """Always 8 rows a block; odd H has the threads of the largest."""
    for hidden, batch, directions, launch in [
        (32, 17, 1, (3, 1, 64)),
        (40, 17, 2, (3, 2, 128)),
        (96, 8, 1, (1, 1, 192)),
        (97, 1, 1, (1, 1, 256)),
        (20, 1, 1, (1, 1, 256)),
    ]:
        problem = case(1, batch, hidden, directions, False)
        run(kernels.layer_fwd, LayerCase(problem, 4).arguments(problem, torch.float16))
        assert kernels.last_launch() == launch


def test_nothing_to_do(kernels: EmulatedRecurrence) -> None:
    x, h0, c0, own, _ = layer_case(2, 3, 24, 4, 1, False, True).arguments(
        case(2, 3, 24, 1, False), torch.float16
    )
    y, h_n, *_ = run(kernels.layer_fwd, (x[:, :0], h0[:, :0], c0[:, :0], own, None))
    assert (y.shape, h_n.shape) == ((2, 0, 24), (1, 0, 24))


def test_limits_are_those_of_the_header(kernels: EmulatedRecurrence) -> None:
    header = (ROOT / "csrc" / "cuda" / "lstm_recurrence_block.h").read_text()
    assert int(re.search(r"kLstmBlockInput = (\d+);", header)[1]) == cuda_lstm_layer.LARGEST_INPUT
    for hidden, inputs, dtype in [(8, 33, HALF[0]), (129, 4, HALF[0]), (8, 4, torch.float32)]:
        problem = case(1, 1, hidden, 1, False)
        arguments = LayerCase(problem, inputs).arguments(problem, dtype)
        own = arguments[3][0]
        assert cuda_lstm_layer.why_not(own[0], own[1], None) is not None
        with pytest.raises(ValueError, match="cudaError 1"):
            run(kernels.layer_fwd, arguments)


# --- who is chosen, and what a stack makes of it


def stack(inputs: int, hidden: int, dtype: torch.dtype, layers: int = 1, **options: Any) -> torch.nn.LSTM:
    return torch.nn.LSTM(inputs, hidden, layers, dtype=dtype, **options)


def weights_of(module: torch.nn.LSTM) -> list[LayerWeights]:
    slots = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    own = [{n.split("_l")[0]: getattr(module, n) for n in names} for names in module._all_weights]
    return [tuple(w.get(slot) for slot in slots) for w in own]  # type: ignore[misc]


def key(**changes: Any) -> dict[str, Any]:
    of_layer = {"dtype": "float16", "ragged": False, "mode": "forward", "biased": True, "hidden": 64}
    return {**of_layer, "input": 4, "batch": 8, "steps": 16, "directions": 1, **changes}


def measured(best: str, **changes: Any) -> _tables.Table:
    times = {"fused": 5.0, "apart": 10.0} if best == "fused" else {"fused": 10.0, "apart": 5.0}
    return tables.table(lstm_layer=[tables.entry(key(**changes), best, **times)])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused_layer, "why_absent_on_cuda", None)


def reason(module: torch.nn.LSTM, table: _tables.Table, **options: Any) -> str | None:
    """Of the first layer on a GPU that is not here."""
    dtype = module.weight_ih_l0.dtype
    with FakeTensorMode(), _tables.using(table):
        own = [
            tuple(None if w is None else torch.empty(w.shape, dtype=dtype, device="cuda") for w in of_layer)
            for of_layer in weights_of(module)
        ]
        x = torch.empty(16, 8, module.input_size, dtype=dtype, device="cuda")
        lengths = torch.empty(8, dtype=torch.int64, device="cuda") if options.pop("ragged", False) else None
        return _fused_layer.why_not_fused(x, own, 1, lengths, None, **options)[0]  # type: ignore[arg-type]


@pytest.mark.usefixtures("built")
def test_only_a_measurement_chooses_it() -> None:
    module = stack(4, 64, torch.float16)
    assert reason(module, measured("fused")) is None
    assert reason(module, measured("fused", steps=64, batch=4)) is None
    slower = "measured 5.0 us against 10.0 us (fused)"
    assert slower in str(reason(module, measured("apart")))
    unmeasured = "plain rule: table test.json has no measurement of lstm_layer near these sizes"
    for other in ({"mode": "train"}, {"ragged": True}, {"hidden": 16}, {"input": 32}, {"biased": False}):
        assert reason(module, measured("fused", **other)) == unmeasured
    assert reason(module, measured("fused"), training=True) == unmeasured
    assert reason(module, measured("fused", mode="train", ragged=True), training=True, ragged=True) is None
    assert str(reason(module, tables.table())).startswith("plain rule")
    with fuseblock.backend("cuda"):
        assert reason(module, measured("fused")) is None
    with fuseblock.backend("triton"):
        assert reason(module, measured("fused")) == "backend 'triton' is forced"


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("module", "why"),
    [
        (stack(4, 64, torch.float32), "float16 and bfloat16, not in torch.float32"),
        (stack(33, 64, torch.float16), "I = 33"),
        (stack(4, 129, torch.float16), "H = 129"),
        (stack(4, 64, torch.float16, proj_size=8), "no projection"),
    ],
    ids=["dtype", "inputs", "hidden", "projection"],
)
def test_what_the_kernel_cannot_do(module: torch.nn.LSTM, why: str) -> None:
    assert why in str(reason(module, measured("fused")))


@pytest.mark.usefixtures("built")
def test_explain_says_it_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors stand for those of a GPU, but their mode has to see operators.
    monkeypatch.setattr(sys.modules["fuseblock.explain"], "plain_eager", lambda tensors: True)

    def parts(**options: Any) -> tuple[dict[str, str | None], list[str]]:
        found = fuseblock.explain("lstm", x, None, None, own, **options)
        return dict(found.reasons), [part.op for part in found.parts]

    with FakeTensorMode(), _tables.using(measured("fused")), _engine.always_ours():
        x = torch.empty(16, 8, 4, dtype=torch.float16, device="cuda")
        b, w_hh = x.new_empty(256), x.new_empty(256, 64)
        own: list[LayerWeights] = [(x.new_empty(256, 4), w_hh, b, b, None), (w_hh, w_hh, b, b, None)]
        reasons, names = parts()
        assert reasons["fused layer 0"] is None
        assert "I = 64" in str(reasons["fused layer 1"])
        assert names == ["layer 1, forward"]
        for options in ({"lengths": x.new_empty(8, dtype=torch.int64)}, {"batch_sizes": [8] * 16}):
            x = x.flatten(0, 1) if "batch_sizes" in options else x
            reasons, names = parts(**options)
            assert "no measurement of lstm_layer" in str(reasons["fused layer 0"])
            assert names == ["layer 0, forward", "layer 1, forward"]


@pytest.fixture
def fused_on_cpu(kernels: EmulatedRecurrence, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stacks of CPU tensors take a GPU's way where the kernel can run a layer. The inputs of those that ran, in a list."""
    ran = []

    def chosen(input: Tensor, weights: Sequence[LayerWeights], directions: int, *_: Any, **__: Any) -> Any:
        return [cuda_lstm_layer.why_not(w[0], w[1], w[4]) is None for w in weights[::directions]]

    def forward(x: Tensor, h0: Tensor, c0: Tensor, own: Any, lengths: Any, _: Any, save: bool) -> Any:
        ran.append(x.shape[2])
        return cuda_lstm_layer.lstm_layer(kernels.layer_fwd, x, h0, c0, own, lengths, save)

    monkeypatch.setattr(_stack, "fused_layers", chosen)
    monkeypatch.setattr(_fused_layer, "forward", forward)
    monkeypatch.setattr(_fused_layer, "has_backward", lambda x: False)
    return ran


def run_stack(module: torch.nn.LSTM, x: Tensor, training: bool, save_gates: bool) -> list[Tensor]:
    """y, h_n, c_n and, in training, the gradients of x and of the weights."""
    directions = 1 + module.bidirectional
    weights = weights_of(module)
    h0 = x.new_zeros(len(weights), x.shape[1], module.hidden_size)
    if not training:
        fused = _stack.fused_layers(x, weights, directions, None, None)
        return [*_stack.infer_stack(x, h0, h0, weights, directions, (None, None), fused)]

    def ours(*_: Any) -> Any:
        raise AssertionError("first derivatives only")

    leaves = [x.requires_grad_(), *module.parameters()]
    outputs = _stack.fused_stack(x, h0, h0, weights, directions, (None, None), None, ours, save_gates)
    return [*outputs, *torch.autograd.grad([v.float().sin().sum() for v in outputs], leaves)]


@pytest.mark.parametrize(
    ("training", "save_gates"),
    [(False, True), (True, True), (True, False)],
    ids=["infer", "train", "recompute"],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_stacks(fused_on_cpu: list[int], bidirectional: bool, training: bool, save_gates: bool) -> None:
    """The first layer is fused, the second has too many inputs; backward is that of the recurrence."""
    torch.manual_seed(0)
    module = stack(5, 40, torch.float16, 2, bidirectional=bidirectional)
    x = torch.randn(6, 3, 5).half()

    def plain_stack(dtype: torch.dtype) -> list[Tensor]:
        other = stack(5, 40, dtype, 2, bidirectional=bidirectional)
        other.load_state_dict({name: w.to(dtype) for name, w in module.state_dict().items()})
        leaves = [x.detach().to(dtype).requires_grad_(), *other.parameters()]
        y, (h_n, c_n) = other(leaves[0])
        if not training:
            return [y, h_n, c_n]
        return [y, h_n, c_n, *torch.autograd.grad([v.sin().sum() for v in (y, h_n, c_n)], leaves)]

    want, of_stock = plain_stack(torch.float64), plain_stack(torch.float16)
    got = run_stack(module, x, training, save_gates)
    assert fused_on_cpu == [5]
    stock_error = max(relative_error(s, w) for s, w in zip(of_stock, want, strict=True))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float16
        assert error_ratio(g, w, stock_error, 6 * 200) <= 1
