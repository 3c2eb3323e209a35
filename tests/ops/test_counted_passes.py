"""Every GPU kernel loads and stores what the performance model says: counted, not asserted by prose.

Emulated CUDA kernels and interpreted Triton kernels run at sizes that are multiples of nothing, and every access is counted
(tests/traffic.py). The formulas are those of docs/performance.md (benchmarks/model_kernels.py), within 5 %.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from fuseblock import dispatch
from fuseblock._activations import number
from fuseblock.launch import batch_norm_act as norm_driver
from fuseblock.launch import cuda_lstm_layer, per_step, resident_recurrence

from .. import emulator, traffic
from ..backends import DEVICE, available
from ..benchmarks_package import load
from ..emulator.batch_norm_act import EmulatedBatchNormAct
from ..emulator.bias_act import EmulatedBiasAct
from ..emulator.lstm_gates import EmulatedCuda
from ..traffic import Launch

model, registry = load("model"), load("model_kernels")

#: What runs the emulated kernels of a family.
EMULATED: dict[str, Callable[[ModuleType], Any]] = {
    **emulator.OPERATORS,
    "batch_norm_act": lambda module: EmulatedBatchNormAct(module).kernels,
    "lstm_gates": lambda module: EmulatedCuda(
        module,
        emulator.load_operators("batch_norm_act", "counted"),
        emulator.load_operators("bias_act", "counted"),
    ),
}
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels are counted in emulator and interpreter")
TOLERANCE = 0.05
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)
FIRST, LAST = LAYOUTS
#: Of tests that take long in the interpreter: dtype and layout.
TENSORS = [
    pytest.param(torch.float32, FIRST, id="f32-first"),
    pytest.param(torch.bfloat16, LAST, id="bf16-last"),
    pytest.param(torch.float32, LAST, id="f32-last", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, FIRST, id="bf16-first", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Backend:
    """One family of kernels of one backend, and the context that counts their launches."""

    name: str
    count: Callable[[], AbstractContextManager[list[Launch]]]
    kernels: Any


def on(family: str, *names: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """The fixture `backend` for a family of `emulator.FAMILIES`, which for CUDA is a module to compile."""
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in names or ("cuda", "triton")}
    params = [pytest.param((name, family), marks=marks[name], id=name) for name in marks]
    return pytest.mark.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    name, family = request.param
    if name == "triton":
        with available("triton"):
            kernels = importlib.import_module(f"fuseblock.launch.triton_{family}")
            yield Backend(name, traffic.of_interpreted, kernels)
        return
    module = emulator.load_family(family, "counted")
    yield Backend(name, partial(traffic.of_emulated, [module], monkeypatch), EMULATED[family](module))


def check(launches: list[Launch], kernel: Any, **sizes: float) -> None:
    """The sum over launches is what the formulas of a kernel of the registry say."""
    read, written = kernel.read(sizes), model.evaluate(kernel.writes, sizes)
    again = model.evaluate(kernel.again, sizes)
    counted = {
        "read": (sum(launch.read for launch in launches), read),
        "written": (sum(launch.written for launch in launches), written),
    }
    slack = 1e-3 * (read + written)  # a few bytes of a channel
    for what, (bytes_of, formula) in counted.items():
        close = pytest.approx(formula, rel=TOLERANCE, abs=slack)
        assert bytes_of == close, (kernel.name, what, bytes_of, formula)
    twice = sum(launch.read_again for launch in launches)
    assert twice <= again + TOLERANCE * read, (kernel.name, "read again", twice, again)
    assert not any(launch.written_again for launch in launches), (kernel.name, "written twice")


def norm_splits(x: torch.Tensor) -> int:
    """Blocks of a reduction in CUDA C++ that share a channel."""
    count: int = emulator.load_family("batch_norm_act", "counted").splits(EmulatedBatchNormAct.numbers(x))
    return count


def bias_act_splits(x: torch.Tensor) -> int:
    """The same for bias_act."""
    numbers = EmulatedBiasAct.sizes(x) | {"activation": 0, "negative_slope": 0.0, "gain": 1.0, "clamp": 1.0}
    count: int = emulator.load_family("bias_act", "counted").splits(numbers)
    return count


def expect(backend: Backend, launches: list[Launch], *expected: tuple[Any, dict[str, float]]) -> None:
    """These kernels of the registry are all that was launched: by name, or in order where only launchers have names."""
    if backend.name == "cuda":
        assert len(launches) == len(expected), [launch.name for launch in launches]
        for launch, (kernel, sizes) in zip(launches, expected, strict=True):
            check([launch], kernel, **sizes)
        return
    for kernel, sizes in expected:
        own = [launch for launch in launches if re.fullmatch(kernel.triton, launch.name)]
        check(own, kernel, **sizes)
        launches = [launch for launch in launches if launch not in own]
    assert not launches


@on("batch_norm_act")
@pytest.mark.parametrize(("dtype", "layout"), TENSORS)
@pytest.mark.parametrize(
    ("activation", "residual"), [("leaky_relu", False), ("leaky_relu", True), ("silu", True)]
)
def test_norm(
    backend: Backend, activation: str, residual: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    # The time of the interpreter is that of the tiles; the few values that are read twice for a first mean hide in many.
    shape = (2, 5, 33, 61) if backend.name == "cuda" else (2, 21, 33, 31)

    def draw() -> torch.Tensor:
        return torch.randn(shape).to(dtype, memory_format=layout)

    channel = torch.rand(shape[1])
    x, dy, v, r, v_r = draw(), draw(), draw(), draw() if residual else None, draw() if residual else None
    options = activation, 0.1, True, ""
    masked, kept = residual and norm_driver.is_masked(activation), norm_driver.needs_residual(activation)
    with backend.count() as first:
        _, mean, _, invstd, n, mask = norm_driver.forward(
            backend.kernels, x, channel, channel, r, None, None, None, 1e-5, *options, True
        )
    saved = x, channel, channel, r if kept else None, None, mean, invstd, n, mask if masked else None
    with backend.count() as second:
        norm_driver.backward(backend.kernels, dy, *saved, *options, 1e-5, True, True, residual)
    with backend.count() as third:
        norm_driver.second_order(backend.kernels, v, channel, channel, None, v_r, dy, *saved, *options, 1e-5)

    kernel = registry.NORM.kernel
    splits = 1 if backend.name == "triton" else norm_splits(x)
    sizes = {
        "E": x.numel(),
        "C": shape[1],
        "b": x.element_size(),
        "P": splits,
        "m": int(masked),
        "d": int(residual),
    }

    def reduced(name: str, combine: str, **flags: int) -> list[tuple[Any, dict[str, float]]]:
        both = [kernel(name), kernel(combine)] if splits > 1 else [kernel(name)]
        return [(k, sizes | flags) for k in both]

    expect(
        backend,
        first,
        *reduced("batch_norm_act_stats", "batch_norm_act_combine_stats"),
        (kernel("batch_norm_act_fwd"), sizes | {"r": int(residual)}),
    )
    flags = {"r": int(residual and kept), "v": 0, "n": 2}
    expect(
        backend,
        second,
        *reduced("batch_norm_act_bwd_reduce", "batch_norm_act_combine_sums", **flags),
        (kernel("batch_norm_act_bwd"), sizes | flags),
    )
    # Sums of the second order with kinked activations leave the cotangent of the residual's gradient out.
    flags |= {"v": flags["r"], "n": 12 if activation == "silu" else 5}
    expect(
        backend,
        third,
        *reduced("batch_norm_act_bwd_bwd_reduce", "batch_norm_act_combine_sums", **flags),
        (kernel("batch_norm_act_bwd_bwd"), sizes | flags | {"v": int(residual)}),
    )


@on("batch_norm_act", "cuda")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("activation", "saved"), [("leaky_relu", ""), ("leaky_relu", "mask"), ("silu", "residual")]
)
def test_whole_norm(
    backend: Backend, activation: str, saved: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """One launch each: x, and in backward dy, are read once."""
    shape = (2, 16, 24, 40)
    x, dy, r = (torch.randn(shape).to(dtype, memory_format=layout) for _ in range(3))
    channel, masked = torch.rand(shape[1]), saved == "mask"
    affine, options = (channel, channel, r if saved else None, None), (number(activation), 0.1, False)
    with backend.count() as first:
        _, mean, _, invstd, mask = backend.kernels.whole_fwd(x, *affine, 1e-5, *options, masked)
    site = norm_driver.Site(
        x,
        mean,
        invstd,
        channel,
        channel,
        None if masked else affine[2],
        mask if masked else None,
        None,
        *options,
    )
    with backend.count() as second:
        backend.kernels.whole_bwd(dy, site, bool(saved))
    kernel, sizes = (
        registry.NORM.kernel,
        {"E": x.numel(), "C": shape[1], "b": x.element_size(), "m": int(masked)},
    )
    flags = {"r": int(saved == "residual"), "d": int(bool(saved)), "n": 2}
    expect(backend, first, (kernel("batch_norm_act_whole_fwd"), sizes | {"r": int(bool(saved))}))
    expect(backend, second, (kernel("batch_norm_act_whole_bwd"), sizes | flags))


@on("lstm_gates", slow=("cuda",))
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("hidden", [40, 33])
def test_lstm_gates(backend: Backend, hidden: int, dtype: torch.dtype) -> None:
    rows = 77

    def draw(columns: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(rows, columns).to(dtype)

    gates, dh, c, dc, v_c = draw(4 * hidden), draw(hidden), *(draw(hidden, torch.float32) for _ in range(3))
    sizes = {"U": rows * hidden, "b": gates.element_size(), "s": 4}
    kernel = registry.GATES.kernel
    with backend.count() as launches:
        backend.kernels.lstm_gates(gates, c)
    expect(backend, launches, (kernel("lstm_gates"), sizes))
    with backend.count() as launches:
        backend.kernels.lstm_gates_bwd(dh, dc, gates, c)
    expect(backend, launches, (kernel("lstm_gates_bwd"), sizes))
    with backend.count() as launches:
        backend.kernels.lstm_gates_bwd_bwd(draw(4 * hidden), v_c, dh, dc, gates, c)
    expect(backend, launches, (kernel("lstm_gates_bwd_bwd"), sizes))


@on("bias_act")
@pytest.mark.parametrize(("dtype", "layout"), TENSORS)
@pytest.mark.parametrize(
    ("activation", "clamp", "bits"),
    [("leaky_relu", math.inf, 1), ("leaky_relu", 0.5, 2), ("silu", math.inf, 0)],
)
def test_bias_act(
    backend: Backend,
    activation: str,
    clamp: float,
    bits: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    def draw() -> torch.Tensor:
        return torch.randn(3, 11, 33, 31).to(dtype, memory_format=layout)

    x, dy, v = draw(), draw(), draw()
    bias, v_bias = torch.randn(11), torch.randn(11)
    constants = number(activation), 0.2, 1.5, clamp
    kept = bits == 0
    splits = 1 if backend.name == "triton" else bias_act_splits(x)
    sizes = {"E": x.numel(), "C": 11, "b": x.element_size(), "m": bits, "x": int(kept), "P": splits, "n": 1}
    kernel = registry.BIAS_ACT.kernel
    sums = [(kernel("bias_act_sum"), sizes)] if backend.name == "cuda" else []
    with backend.count() as launches:
        _, mask = backend.kernels.bias_act(x, bias, None, *constants, True)
    expect(backend, launches, (kernel("bias_act"), sizes))
    saved = (x, bias, None, None) if kept else (None, None, None, mask)
    with backend.count() as launches:
        backend.kernels.bias_act_bwd(dy, *saved, *constants, True)
    expect(backend, launches, (kernel("bias_act_bwd"), sizes), *sums)
    with backend.count() as launches:
        backend.kernels.bias_act_bwd_bwd(v, v_bias, None, dy if kept else None, *saved, *constants)
    expect(backend, launches, (kernel("bias_act_bwd_bwd"), sizes), *(sums if kept else []))


@on("upfirdn2d", slow=("cuda",))
@pytest.mark.parametrize(
    ("layout", "width", "after"),
    [(FIRST, 31, 4), (FIRST, 32, -1), (LAST, 31, 4)],
    ids=["first", "rows", "last"],
)
@pytest.mark.parametrize(("up", "down", "taps"), [(1, 1, 4), (2, 1, 4), (1, 2, 4), (3, 2, 5)])
def test_upfirdn2d(
    backend: Backend, up: int, down: int, taps: int, layout: torch.memory_format, width: int, after: int
) -> None:
    """Rows of whole vectors, too: 32 samples become 32, 64 or 16."""
    x = torch.randn(2, 5, 33, width).to(torch.bfloat16, memory_format=layout)
    f = torch.rand(taps, taps)
    with backend.count() as launches:
        y = backend.kernels.upfirdn2d(x, f, up, up, down, down, taps, after, taps, taps, False, 1.0)
    sizes = {"X": x.numel(), "Y": y.numel(), "b": 2, "K": taps * taps, "u": up * up}
    expect(backend, launches, (registry.IMAGES.kernel("upfirdn2d"), sizes))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["first", "last"])
@pytest.mark.parametrize(
    ("op", "prologue"),
    [
        *(
            (op, prologue)
            for op in ("conv2d_stats", "conv_transpose2d_subpixel")
            for prologue in (False, True)
        ),
        ("conv2d_act", False),
    ],
)
def test_convolutions(op: str, prologue: bool, layout: torch.memory_format) -> None:
    channels, out_channels = 21, 35
    x = torch.randn(2, channels, 13, 17).to(torch.bfloat16, memory_format=layout)
    weight = torch.randn(out_channels, channels, 3, 3).to(x.dtype)
    norm = (torch.rand(channels), torch.rand(channels)) if prologue else (None, None)
    with available("triton"):
        from fuseblock.launch import triton_conv_stats as convolutions
    with traffic.of_interpreted() as launches:
        if op == "conv_transpose2d_subpixel":
            weight = torch.randn(channels, out_channels, 4, 4).to(x.dtype)
            y = convolutions.conv_transpose2d_subpixel(x, weight, None, *norm, "relu", 0.0)[0]
        elif op == "conv2d_stats":
            y = convolutions.conv2d_stats(x, weight, None, 1, 1, 1, 1, *norm, "relu", 0.0)[0]
        else:
            y = convolutions.conv2d_act(x, weight, None, 1, 1, 1, 1, 1, False, "leaky_relu", 0.2)
    statistics = op != "conv2d_act"
    sizes: dict[str, float] = {"X": x.numel(), "Y": y.numel(), "W": weight.numel(), "b": 2}
    sizes |= {"C": channels, "O": out_channels, "p": int(prologue), "q": int(statistics), "g": 0}
    sizes["P"] = 2 if op == "conv_transpose2d_subpixel" else 1  # all pixels are one block in the interpreter
    first, *combine = launches
    kernel = next(k for k in registry.CONVOLUTION.kernels if op in k.name)
    assert first.name == kernel.triton
    check([first], kernel, **sizes)
    assert len(combine) == statistics
    if statistics:
        check(combine, registry.CONVOLUTION.kernel("combine_stats"), **sizes)


@pytest.mark.parametrize(("iterations", "layout"), [(0, FIRST), (1, LAST)], ids=["0-first", "1-last"])
def test_spectral_norm(iterations: int, layout: torch.memory_format) -> None:
    with available("triton"):
        from fuseblock.launch import triton_spectral_norm as norms
    shapes = [(70, 33, 3, 3), (101, 70, 4, 4)]
    weights = [torch.randn(shape).contiguous(memory_format=layout) for shape in shapes]
    us = [torch.randn(w.shape[0]) for w in weights]
    vs = [torch.randn(w[0].numel()) for w in weights]
    dims = [0] * len(weights)
    with traffic.of_interpreted() as forward:
        ys, state = norms.spectral_norm(weights, us, vs, dims, iterations, 1e-12)
    with traffic.of_interpreted() as backward:
        norms.spectral_norm_bwd([torch.randn_like(y) for y in ys], weights, state, dims)
    elements = sum(w.numel() for w in weights)
    sizes = {"W": elements, "R": sum(map(len, us)), "C": sum(map(len, vs)), "b": 4, "i": iterations}
    names = ["rows", *["columns"] * iterations, "scale", "inner", "gradient"]
    for launch, name in zip([*forward, *backward], names, strict=True):
        check([launch], registry.SPECTRAL.kernel(f"spectral_norm_{name}"), **sizes)


@dataclass(frozen=True)
class Recurrence:
    """Operands of the recurrence, and the sizes that formulas have."""

    steps: int = 24
    batch: int = 13
    hidden: int = 40
    directions: int = 2
    dtype: torch.dtype = torch.bfloat16

    def operands(self) -> tuple[Any, ...]:
        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return (0.3 * torch.randn(*shape)).to(dtype)

        t, b, h, d = self.steps, self.batch, self.hidden, self.directions
        state = draw(d, b, h), draw(d, b, h, dtype=torch.float32)
        return draw(t, b, d * 4 * h), *state, draw(d, 4 * h, h), None, None, None

    def sizes(self, keeps: bool) -> dict[str, float]:
        t, b, h, d = self.steps, self.batch, self.hidden, self.directions
        sizes: dict[str, float] = {"T": t, "B": b, "D": d, "H": h, "U": t * b * d * h, "Q": d * b * h}
        return sizes | {"b": self.dtype.itemsize, "s": 4, "k": int(keeps)}


def check_recurrence(
    count: Callable[[], AbstractContextManager[list[Launch]]],
    forward: Any,
    backward: Any,
    name: str,
    exchanges: bool = False,
    steps: int = 5,
) -> None:
    """Forward without and with what backward needs, and backward."""
    problem = Recurrence(steps)
    operands = problem.operands()
    kernels = {k.name.split(": ")[1]: k for k in registry.RECURRENCE.kernels if name in k.name}
    for keeps in (False, True):
        with count() as launches:
            y, h_n, c_n, gates, c = forward(*operands, keeps)
        check(launches, kernels["forward"], **problem.sizes(keeps))
        assert len(launches) == model.evaluate(kernels["forward"].launches, problem.sizes(keeps))
    cotangents = torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n), None, None
    _, _, c0, w_hh, *rest = operands
    with count() as launches:
        backward(*cotangents, gates, c, c0, w_hh, *rest)
    assert bool(launches[0].exchanged) is exchanges
    check(launches, kernels["backward"], **problem.sizes(True))
    assert len(launches) == model.evaluate(kernels["backward"].launches, problem.sizes(True))


@on("lstm_gates", slow=("cuda",))
def test_recurrence_per_step(backend: Backend) -> None:
    steps = backend.kernels
    forward = partial(per_step.lstm_recurrence, steps)
    check_recurrence(backend.count, forward, partial(per_step.lstm_recurrence_bwd, steps), "per step")

    rows, hidden = 77, 40

    def draw(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(rows, columns).to(dtype)

    acts, dm, v = draw(4 * hidden), draw(hidden), draw(4 * hidden)
    c_prev, c, dc, v_dc, a_c_prev, a_c = (draw(hidden, torch.float32) for _ in range(6))
    outputs = draw(hidden), v_dc, draw(4 * hidden), draw(4 * hidden), a_c_prev, a_c
    with backend.count() as launches:
        steps.step_bwd_bwd(acts, c_prev, c, dm, dc, None, v, v_dc, None, 0, *outputs, None)
    check(launches, registry.RECURRENCE.kernel("per step: second order"), U=rows * hidden, b=2, s=4)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        pytest.param("triton (persistent)", "tier", marks=pytest.mark.slow),
        ("triton (fused step)", "fused step"),
    ],
)
def test_recurrence_in_triton(label: str, name: str) -> None:
    with available("triton"):
        forward, backward = (
            next(c.run for c in dispatch.candidates(op) if c.label == label)
            for op in ("lstm_recurrence", "lstm_recurrence_bwd")
        )
        # The persistent kernel may load the first step twice.
        check_recurrence(traffic.of_interpreted, forward, backward, name, steps=24 if name == "tier" else 5)


@pytest.mark.slow
@pytest.mark.parametrize("tier", resident_recurrence.TIERS)
def test_recurrence_with_resident_weights(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = emulator.load_recurrence(tier, "counted")
    of_tier = resident_recurrence.TIERS[tier]
    check_recurrence(
        partial(traffic.of_emulated, [kernels._module], monkeypatch),
        partial(resident_recurrence.lstm_recurrence, of_tier, kernels),
        partial(resident_recurrence.lstm_recurrence_bwd, of_tier, kernels),
        "tier",
        exchanges=tier == "grid",
        steps=24,
    )


@pytest.mark.slow
def test_layer_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = emulator.load_recurrence("block", "counted")
    problem, inputs = Recurrence(), 20
    _, h0, c0, w_hh, *_ = problem.operands()

    def draw(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(*shape)).to(problem.dtype)

    four_h = w_hh.shape[1]
    own = [(draw(four_h, inputs), w.clone(), draw(four_h), draw(four_h), None) for w in w_hh]
    for keeps in (False, True):
        x = draw(problem.steps, problem.batch, inputs)
        with traffic.of_emulated([kernels._module], monkeypatch) as launches:
            cuda_lstm_layer.lstm_layer(kernels.layer_fwd, x, h0, c0, own, None, keeps)
        kernel = registry.RECURRENCE.kernel("block tier: forward of a layer")
        check(launches, kernel, **problem.sizes(keeps), I=inputs)
