"""Every tier of the recurrence in CUDA C++, all held to the same: on a GPU, or emulated, then with small sizes.

The tiers are those that dispatch lists. Each runs alone here, whatever the order of preference; sizes are odd ones up to the
largest that it says it can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fuseblock
from fuseblock import dispatch, ops
from fuseblock.launch import resident_recurrence

from .backends import DEVICE, Forced, available
from .emulator import load_recurrence
from .ops import layer_cases
from .ops.lstm_cases import LstmCase, check_backward, check_forward

ON_GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu] if ON_GPU else []

RESIDENT = list(resident_recurrence.TIERS)
TIERS = [*RESIDENT, "per step"]
OPS = ("lstm_recurrence", "lstm_recurrence_bwd")
#: dtype, whether float32 products may be rounded to TF32.
KINDS = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
}
#: Steps, batch, hidden, directions, lengths.
SMALL = [(2, 3, 24, 2, True), (3, 9, 40, 1, False)]
SIZES = [
    (1, 1, 24, 1, False),
    (33, 3, 40, 2, True),
    (2, 8, 100, 1, False),
    (33, 17, 128, 2, True),
    (2, 64, 128, 1, False),
    (33, 1, 200, 2, False),
    (2, 3, 256, 1, True),
    (33, 17, 256, 2, False),
    (2, 100, 320, 1, True),
    (33, 8, 512, 1, False),
    (2, 17, 512, 2, True),
    (33, 3, 640, 1, False),
    (1, 16, 1024, 2, False),
    (33, 16, 1024, 1, True),
    (2, 5, 1500, 1, False),
]


@contextmanager
def only(tier: str) -> Iterator[Forced]:
    """The operators, run by one tier alone."""
    with available("cuda") as forced:
        before = {op: dispatch.candidates(op) for op in OPS}
        for op, candidates in before.items():
            alone = [c for c in candidates if (c.name, c.variant) == ("cuda", tier)]
            assert len(alone) == 1, f"{op} has {[c.label for c in candidates]}: build the library again?"
            dispatch.register(op, *alone)
        try:
            yield forced
        finally:
            for op, candidates in before.items():
                dispatch.register(op, *candidates)


def largest_hidden(tier: str, dtype: torch.dtype) -> int:
    """That the tier can hold on this GPU, or the emulated one; 0 for not at all."""
    if tier == "per step":
        return 2**31
    found = resident_recurrence.TIERS[tier]
    gpu = resident_recurrence.gpu_of(torch.empty(0, device=DEVICE))
    return found.largest_hidden(dtype, gpu) if dtype in found.dtypes else 0


def skip_beyond(tier: str, dtype: torch.dtype, hidden: int) -> None:
    limit = largest_hidden(tier, dtype)
    if hidden > limit:
        pytest.skip(f"the {tier} tier holds H up to {limit} in {dtype} here")


def lstm_case(steps: int, batch: int, hidden: int, directions: int, ragged: bool) -> LstmCase:
    lengths = tuple((7 * b + steps) % (steps + 1) for b in range(batch)) if ragged else None
    return LstmCase(steps, batch, hidden, directions, None, lengths)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def check(tier: str, kind: str, sizes: tuple[Any, ...]) -> None:
    dtype, rounded = KINDS[kind]
    skip_beyond(tier, dtype, sizes[2])
    case = lstm_case(*sizes)
    with only(tier) as operators, tf32(rounded):
        # A CPU rounds nothing to TF32, nor does the emulator's GEMM of the per-step kernels.
        bound = {"tf32": rounded and (ON_GPU or tier != "per step")}
        check_forward(operators, case, dtype, **bound)
        check_backward(operators, case, dtype, **bound)


@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", TIERS)
def test_small_sizes(tier: str, kind: str, sizes: tuple[Any, ...]) -> None:
    """Forward and backward against float64. On a GPU, compute-sanitizer runs these, too."""
    check(tier, kind, sizes)


# tests/ops has the emulated sweeps.
@pytest.mark.parametrize("sizes", SIZES if ON_GPU else [], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tier", TIERS)
def test_parity(tier: str, kind: str, sizes: tuple[Any, ...]) -> None:
    check(tier, kind, sizes)


@pytest.mark.parametrize("tier", TIERS)
def test_long_sequences(tier: str) -> None:
    """Barriers and buffers whose phases repeat, over and over."""
    steps, hidden = (2000, 200) if ON_GPU else (37, 24)
    hidden = min(hidden, largest_hidden(tier, torch.bfloat16))
    skip_beyond(tier, torch.bfloat16, hidden or 1)
    case = lstm_case(steps, 3, hidden, 2, True)
    with only(tier) as operators:
        check_forward(operators, case, torch.bfloat16)
        check_backward(operators, case, torch.bfloat16)


class Layer:
    """A forward and a backward on DEVICE."""

    def __init__(self, tier: str, draw: int, steps: int = 64) -> None:
        limit = largest_hidden(tier, torch.bfloat16)
        skip_beyond(tier, torch.bfloat16, 1)
        sizes = (steps, 20, min(256, limit), 2, True) if ON_GPU else (3, 3, 24, 2, True)
        case = LstmCase(**{**vars(lstm_case(*sizes)), "draw": draw})
        *tensors, lengths = case.inputs(torch.bfloat16)
        self.gx, self.h0, self.c0, self.w_hh = (x.to(DEVICE) for x in tensors[:4])
        self.lengths = lengths.to(DEVICE)

    def step(self) -> list[Tensor]:
        with fuseblock.backend("cuda"):
            outputs = ops.lstm_recurrence(
                self.gx, self.h0, self.c0, self.w_hh, None, self.lengths, None, True
            )
            y, h_n, c_n, gates, c = outputs
            saved = (gates, c, self.c0, self.w_hh, None, self.lengths, None)
            return [*outputs, *ops.lstm_recurrence_bwd(y, h_n, c_n, None, None, *saved)]


def captured(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """(outputs, replay) of a CUDA graph; without a GPU, a replay is a step whose results are copied over the first ones."""
    if not ON_GPU:
        outputs = step()
        return outputs, lambda: [old.copy_(new) for old, new in zip(outputs, step(), strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # what is loaded at the first call is loaded outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return outputs, graph.replay


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    """Bit for bit: nothing in these kernels depends on who comes first."""
    assert [n for n, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("tier", RESIDENT)
def test_graphs(tier: str) -> None:
    """Replays follow what is copied into the inputs, back to back, each as the launch that it recorded."""
    with only(tier):
        layer, other = Layer(tier, 0), Layer(tier, 1)
        outputs, replay = captured(layer.step)
        for _ in range(3):
            replay()
        assert_equal(outputs, layer.step())
        layer.gx.copy_(other.gx)
        layer.w_hh.copy_(other.w_hh)
        layer.lengths.copy_(other.lengths.flip(0))
        for _ in range(3):
            replay()
        assert_equal(outputs, layer.step())


@pytest.mark.parametrize("tier", RESIDENT)
def test_two_streams_beside_other_work(tier: str) -> None:
    """Layers at the same time, each on its own stream, while large products take multiprocessors away."""
    repeats = 20 if ON_GPU else 2
    with only(tier):
        layers = [Layer(tier, draw) for draw in range(2)]
        want = [layer.step() for layer in layers]
        noise = torch.randn(2 * (4096 if ON_GPU else 8,), device=DEVICE)
        streams = [torch.cuda.Stream() if ON_GPU else None for _ in range(3)]
        if ON_GPU:
            torch.cuda.synchronize()
        got = []
        for _ in range(repeats):
            with torch.cuda.stream(streams[2]) if ON_GPU else nullcontext():
                noise @ noise
            for layer, stream in zip(layers, streams[:2], strict=True):
                with torch.cuda.stream(stream) if ON_GPU else nullcontext():
                    got.append(layer.step())
        if ON_GPU:
            torch.cuda.synchronize()
        for n, outputs in enumerate(got):
            assert_equal(outputs, want[n % 2])


@pytest.mark.parametrize("tier", RESIDENT)
def test_runs_on_the_current_stream(tier: str) -> None:
    with only(tier):
        layer = Layer(tier, 0)
        layer.step()
        stream = torch.cuda.Stream() if ON_GPU else None
        with torch.cuda.stream(stream) if ON_GPU else nullcontext():
            if ON_GPU:
                stream.wait_stream(torch.cuda.default_stream())
                torch.cuda._sleep(50_000_000)
            layer.gx.mul_(2)
            got = layer.step()
        if ON_GPU:
            torch.cuda.synchronize()
        assert_equal(got, layer.step())


@pytest.mark.parametrize("tier", TIERS)
def test_layer_against_stock(tier: str) -> None:
    """Error against float64 of at most twice that of PyTorch's layer in the same dtype, through two layers and back."""
    hidden = min(256 if ON_GPU else 16, largest_hidden(tier, torch.float16))
    skip_beyond(tier, torch.float16, hidden or 1)
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "device": DEVICE, "dtype": torch.float16}
    stock = torch.nn.LSTM(24, hidden, **options)
    ours = fuseblock.nn.LSTM(24, hidden, **options)
    ours.load_state_dict(stock.state_dict())
    exact = torch.nn.LSTM(24, hidden, **{**options, "dtype": torch.float64})
    exact.load_state_dict({name: value.double() for name, value in stock.state_dict().items()})
    x = torch.randn(40 if ON_GPU else 3, 5, 24, device=DEVICE).half()

    def run(module: torch.nn.LSTM, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, (h, c) = module(x)
        loss = y.double().sin().sum() + h.double().sum() + c.double().sum()
        return [y, h, c, *torch.autograd.grad(loss, [x, *module.parameters()])]

    with only(tier), fuseblock.backend("cuda"):
        got = run(ours, x)
    want = run(exact, x.double())

    def worst(values: list[Tensor]) -> float:
        pairs = zip(values, want, strict=True)
        return max(((a.double() - w).abs().max() / w.abs().max()).item() for a, w in pairs)

    limit = 2 * worst(run(stock, x)) + torch.finfo(torch.float16).eps
    assert worst(got) <= limit, f"{worst(got):.3g} > {limit:.3g}"


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_this_library_has_every_tier() -> None:
    """What compiles from csrc/cuda is what dispatch lists; a device without clusters may refuse, but nothing is absent."""
    for op in OPS:
        listed = [c for c in dispatch.candidates(op) if c.name == "cuda"]
        assert [c.variant for c in listed] == TIERS
        assert all(c.run is not None for c in listed)


@pytest.mark.parametrize("sizes", [(5, 9, 40, 5, 2, True, True), (2, 17, 128, 32, 1, False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_layers_in_one_launch(dtype: torch.dtype, sizes: tuple[Any, ...]) -> None:
    """The input projection in the block tier's kernel: steps, batch, hidden, input, directions, lengths, biases."""
    compiled, emulated = torch.ops.fuseblock_cuda, partial(load_recurrence, "block")
    kernel = compiled.lstm_block_layer_fwd.default if ON_GPU else emulated().layer_fwd
    layer_cases.check(kernel, layer_cases.layer_case(*sizes), dtype, DEVICE)
