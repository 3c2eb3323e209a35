"""What batch_norm_act saves for backward, and how often its passes over memory touch the tensors.

Counted, not asserted by prose: saved tensors by hooks of autograd; reads and writes of full tensors twice over. The driver's
six functions are wrapped, and every full tensor that goes in or comes out of one counts as one pass over it. That a CPU
kernel touches each element of these tensors once is then measured: the kernels are compiled for the plainest instruction
set with a count of bytes in every load and store of simd.h, and the counts of each tensor are compared with its size.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuseblock import _ext, functional
from fuseblock._activations import NAMES
from fuseblock.launch import batch_norm_act as driver

pytestmark = pytest.mark.skipif(
    not _ext.has("fuseblock_cpu", "batch_norm_act"), reason="the compiled library is absent"
)
SHAPE = (4, 8, 6, 6)
SMOOTH = ("silu", "tanh", "elu")

#: (activation, residual) -> passes of forward, backward, second order (with a cotangent of dresidual where there is one).
PASSES = {
    ("identity", False): (3, 5, 8),
    ("relu", False): (3, 5, 8),
    ("leaky_relu", False): (3, 5, 8),
    ("prelu", False): (3, 5, 8),
    ("silu", False): (3, 5, 8),
    ("tanh", False): (3, 5, 8),
    ("elu", False): (3, 5, 8),
    # Forward reads the residual, backward writes its gradient; of the sign a mask remembers an eighth of a byte.
    ("relu", True): (4, 6, 9),
    ("leaky_relu", True): (4, 6, 9),
    # Both passes of backward read the residual; second order reads it and v_r twice, and writes the residual's adjoint.
    ("prelu", True): (4, 8, 13),
    ("silu", True): (4, 8, 13),
    ("tanh", True): (4, 8, 13),
    ("elu", True): (4, 8, 13),
}


def leaves(activation: str, residual: bool) -> tuple[Tensor | None, ...]:
    c = SHAPE[1]
    x, r = torch.randn(SHAPE), torch.randn(SHAPE) if residual else None
    slope = torch.rand(c) if activation == "prelu" else None
    tensors = x, torch.rand(c), torch.randn(c), r, slope
    return tuple(None if t is None else t.requires_grad_() for t in tensors)


@pytest.mark.parametrize(("activation", "residual"), PASSES)
def test_saved_bytes(activation: str, residual: bool) -> None:
    """x, and of a residual one bit an element, or itself before smooth activations and prelu."""
    x, weight, bias, r, slope = leaves(activation, residual)
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        functional.batch_norm_act(x, weight, bias, r, slope=slope, activation=activation)
    per_channel = 4 * SHAPE[1]
    size = sum(n for n in saved.values() if n > per_channel)
    extra = 0
    if residual and activation != "identity":
        extra = x.numel() // 8 if activation in ("relu", "leaky_relu") else 4 * x.numel()
    assert size == 4 * x.numel() + extra
    assert sum(saved.values()) - size <= 3 * per_channel


class Counting:
    """The kernels of the CPU, counting full tensors in arguments and results."""

    def __init__(self) -> None:
        from fuseblock.launch import cpu_batch_norm_act

        self.kernels = cpu_batch_norm_act
        self.passes = 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            result = getattr(self.kernels, name)(*args)
            for value in (*args, *(result if isinstance(result, tuple) else (result,))):
                members = vars(value).values() if isinstance(value, driver.Site) else (value,)
                self.passes += sum(isinstance(t, Tensor) and tuple(t.shape) == SHAPE for t in members)
            return result

        return call


@pytest.mark.parametrize(("activation", "residual"), PASSES)
def test_passes(activation: str, residual: bool) -> None:
    x, weight, bias, r, slope = (None if t is None else t.detach() for t in leaves(activation, residual))
    dy, v = torch.randn(SHAPE), torch.randn(SHAPE)
    v_r = torch.randn(SHAPE) if residual else None
    counted = []

    def count(run: Any, *args: Any) -> Any:
        kernels: Any = Counting()
        result = run(kernels, *args)
        counted.append(kernels.passes)
        return result

    options = activation, 0.1, True, ""
    _, mean, _, invstd, n, mask = count(
        driver.forward, x, weight, bias, r, slope, None, None, 1e-5, *options, True
    )
    kept = r if driver.needs_residual(activation) else None
    saved = x, weight, bias, kept, slope, mean, invstd, n, mask if mask.numel() else None
    count(driver.backward, dy, *saved, *options, 1e-5, True, True, residual)
    channel = torch.rand(SHAPE[1])
    a = channel if slope is not None else None
    count(driver.second_order, v, channel, channel, a, v_r, dy, *saved, *options, 1e-5)
    assert tuple(counted) == PASSES[activation, residual]


# ---- the kernels themselves ----------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = r"""
#include <cstdint>
// Loads and stores of tensors; operands and sums of channels are no tensors.
static const char* begins[8];
static int64_t bytes_of, loaded[8], stored[8];
static void count(const void* p, int64_t n, int64_t* where) {
  for (int k = 0; k < 8; ++k)
    if (begins[k] && p >= begins[k] && p < begins[k] + bytes_of) where[k] += n;
}
#define FB_ISA baseline
#define FB_VEC_BYTES 16
#include "cpu/batch_norm_act_kernels.h"
using namespace fuseblock;
// tensors: x, dy, v, v_r, residual, three results. sum: 0 to 3 as in NormSums, or result: 1 to 3 as in NormResult.
extern "C" void run(int what, int result, int activation, int last, int64_t n, int64_t c, int64_t s, void** tensors,
                    void* operands, double* sums, int64_t* out) {
  cpu::NormView a = {};
  a.dtype = cpu::DType::f32, a.activation = (Activation)activation, a.channels_last = last;
  a.N = last ? n * s : n, a.C = a.width = a.padded = c, a.S = last ? 1 : s, a.operands = operands;
  a.x = tensors[0], a.dy = tensors[1], a.v = tensors[2], a.v_r = tensors[3], a.residual = tensors[4];
  a.result = tensors[5], a.result2 = tensors[6], a.result3 = tensors[7];
  bytes_of = 4 * n * c * s;
  for (int k = 0; k < 8; ++k) begins[k] = (const char*)tensors[k], loaded[k] = stored[k] = 0;
  for (int64_t channel = 0; channel < (last ? 1 : c); ++channel) {
    const cpu::NormSlice slice{channel, 0, last ? a.N : n * s};
    if (what) baseline::Norm<float>::sum(a, (cpu::NormSums)what, slice, sums);
    else baseline::Norm<float>::apply(a, (cpu::NormResult)result, slice);
  }
  for (int k = 0; k < 8; ++k) out[k] = loaded[k], out[8 + k] = stored[k];
}
"""


#: What is put behind the heads of simd.h's memory functions.
COUNTERS = {
    "FB_INLINE Vec<C> load(const S* p, Full) {": "count(p, (int64_t)sizeof(S) * Vec<C>::size, loaded);",
    "FB_INLINE Vec<C> load(const S* p, Tail tail) {": "count(p, (int64_t)sizeof(S) * tail.lanes, loaded);",
    "FB_INLINE void store(S* p, Vec<C> v, Full) {": "count(p, (int64_t)sizeof(S) * Vec<C>::size, stored);",
    "FB_INLINE void store(S* p, Vec<C> v, Tail tail) {": "count(p, (int64_t)sizeof(S) * tail.lanes, stored);",
}


def counting_headers(folder: Path) -> None:
    """The headers of the kernels, with counters in the loads and stores."""
    for room in ("cpu", "math"):
        (folder / room).mkdir(parents=True, exist_ok=True)
        for header in (ROOT / "csrc" / room).glob("*.h"):
            text = header.read_text()
            if header.name == "simd.h":
                for head, counter in COUNTERS.items():
                    assert text.count(head) == 1, head
                    text = text.replace(head, f"{head}\n  {counter}")
            (folder / room / header.name).write_text(text)


@pytest.fixture(scope="module")
def counted() -> Any:
    """run(sum, result, activation, last, tensors) -> (bytes loaded, bytes stored) per tensor."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [*sorted((ROOT / "csrc/cpu").glob("*.h")), *sorted((ROOT / "csrc/math").glob("*.h"))]
    digest = hashlib.sha256(PROGRAM.encode() + b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "passes" / digest
    library = folder / "count.so"
    if not library.exists():
        counting_headers(folder)
        (folder / "count.cpp").write_text(PROGRAM)
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-I."]
        subprocess.run([*command, "count.cpp", "-o", "new.so"], check=True, cwd=folder)
        (folder / "new.so").rename(library)
    function = ctypes.CDLL(str(library)).run
    long = ctypes.c_int64

    def run(what: int, result: int, activation: str, last: bool, tensors: list[Tensor | None]) -> Any:
        pointers = (ctypes.c_void_p * 8)(*(None if t is None else t.data_ptr() for t in tensors))
        n, c, h, w = SHAPE
        operands, sums, out = torch.rand(14, c), torch.zeros(12, c, dtype=torch.double), (long * 16)()
        function(
            what, result, NAMES.index(activation), int(last), long(n), long(c), long(h * w), pointers,
            ctypes.c_void_p(operands.data_ptr()), ctypes.c_void_p(sums.data_ptr()), out,
        )  # fmt: skip
        return list(out[:8]), list(out[8:])

    return SimpleNamespace(run=run)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("activation", ["leaky_relu", "prelu", "silu"])
def test_kernels_touch_every_element_once(counted: Any, activation: str, last: bool) -> None:
    x, dy, v, v_r, r, one, two, three = tensors = [torch.randn(SHAPE) for _ in range(8)]
    whole = 4 * x.numel()
    del dy, v, v_r, r, one, two, three
    curved = activation != "leaky_relu"
    # (sums, result): which of x, dy, v, v_r, residual are read, which of three results are written
    calls = {
        (1, 0): ("x", ""),
        (2, 0): ("x dy r", ""),
        (3, 0): ("x dy v r" + " v_r" * curved, ""),
        (0, 1): ("x r", "1"),
        (0, 2): ("x dy r", "12"),
        (0, 3): ("x dy v v_r r", "12" + "3" * curved),
    }
    for (what, result), (reads, writes) in calls.items():
        used = [t if k < 5 or str(k - 4) in writes else None for k, t in enumerate(tensors)]
        loaded, stored = counted.run(what, result, activation, last, used)
        read = dict(zip(["x", "dy", "v", "v_r", "r"], loaded, strict=False))
        assert {name: n / whole for name, n in read.items() if n} == dict.fromkeys(reads.split(), 1.0)
        assert [n / whole for n in stored[5:]] == [float(k in writes) for k in "123"]
