"""Spectral normalisation of all layers at once: the mathematics and the buffers of torch.nn.utils.parametrizations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations

import fuseblock
from fuseblock import _ext, dispatch, functional

from .backends import DEVICE, available
from .ops.lstm_cases import error_ratio, poisoned_outputs, relative_error

#: Shape of a weight and the dimension of its output channels.
WEIGHTS = [
    ((5, 3, 3, 3), 0),
    ((70, 33, 3, 3), 0),
    ((1, 40), 0),
    ((3, 6, 4, 4), 1),
    ((40, 1), 0),
    ((2, 3, 5), 2),
    ((7, 1, 1), 0),
    ((9, 48), 0),
]
KINDS = ["cpu", "aten", "reference", "triton"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run on the compiled kernels, on PyTorch's operators, on the plain equations and in Triton's interpreter."""
    if request.param == "triton":
        if DEVICE == "cuda":
            pytest.skip("Triton's interpreter is off; test_gpu_graphed.py runs the kernels")
        with available("triton"), fuseblock.backend("triton"):
            yield "triton"
        return
    if request.param == "cpu" and _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    with fuseblock.backend("auto" if request.param == "cpu" else request.param):
        yield request.param


def inputs(
    dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    generator = torch.Generator().manual_seed(0)
    weights, us, vs = [], [], []
    for shape, dim in WEIGHTS:
        w = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "channels_last" and w.dim() == 4:
            w = w.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            w = w.transpose(0, 1).contiguous().transpose(0, 1)
        weights.append(w.requires_grad_())
        for kept, n in ((us, shape[dim]), (vs, w.numel() // shape[dim])):
            kept.append(
                torch.nn.functional.normalize(
                    torch.randn(n, generator=generator, dtype=torch.float64), dim=0
                ).to(dtype)
            )
    return weights, us, vs, [dim for _, dim in WEIGHTS]


def plain(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], n: int, eps: float
) -> list[Tensor]:
    """The equations of torch.nn.utils.parametrizations, in the manner of its source."""
    ys = []
    for w, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = w.movedim(dim, 0).flatten(1)
        with torch.no_grad():
            for _ in range(n):
                u.copy_(torch.nn.functional.normalize(matrix @ v, dim=0, eps=eps))
                v.copy_(torch.nn.functional.normalize(matrix.t() @ u, dim=0, eps=eps))
        ys.append(w / (u.clone() @ (matrix @ v.clone())))
    return ys


def outcome(
    run: Callable[..., Any], dtype: torch.dtype, layout: str, n: int, rounded: torch.dtype = torch.float64
) -> list[Tensor]:
    """ys, us, vs, dWs for inputs that do not depend on dtype; `rounded` is what they can be represented in."""
    weights, us, vs, dims = inputs(rounded, layout)
    weights = [w.detach().to(dtype).requires_grad_() for w in weights]
    us, vs = [u.to(dtype) for u in us], [v.to(dtype) for v in vs]
    ys = run(weights, us, vs, dims, n)
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(rounded).to(dtype) for y in ys]
    return [*ys, *us, *vs, *torch.autograd.grad(ys, weights, dys)]


def ours(weights: Any, us: Any, vs: Any, dims: Any, n: int) -> Any:
    return functional.spectral_norm(weights, us, vs, dims=dims, n_power_iterations=n, eps=1e-3)


def theirs(*args: Any) -> Any:
    return plain(*args, 1e-3)


@pytest.mark.parametrize("n_power_iterations", [0, 1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parity(kind: str, dtype: torch.dtype, layout: str, n_power_iterations: int) -> None:
    if kind == "triton" and layout == "transposed":
        with pytest.raises(fuseblock.BackendError, match="contiguous or channels-last weights, got strides"):
            outcome(ours, dtype, layout, n_power_iterations)
        return
    if kind == "triton" and n_power_iterations == 3 and dtype != torch.float32:
        pytest.skip("iterations are alike in all dtypes")
    want = outcome(theirs, torch.float64, layout, n_power_iterations, dtype)
    stock = outcome(theirs, dtype, layout, n_power_iterations, dtype)
    with poisoned_outputs():
        got = outcome(ours, dtype, layout, n_power_iterations, dtype)
    # A power method amplifies rounding as far as the singular values are apart: errors are compared by tensor.
    for k, (g, s, w) in enumerate(zip(got, stock, want, strict=True)):
        assert g.dtype == dtype and g.shape == w.shape
        few = max(relative_error(s, w), torch.finfo(dtype).eps * 4)
        assert error_ratio(g, w, few, 2000) <= 1, (k, relative_error(g, w), relative_error(s, w))
    for y, w in zip(got, inputs(dtype, layout)[0], strict=False):
        assert y.stride() == w.stride()


def test_triton_in_small_blocks_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a layer, the last ones ragged, and several launches for all layers."""
    from fuseblock.launch import triton_spectral_norm

    want = outcome(theirs, torch.float64, "channels_last", 2)
    blocks = {"BLOCK_R": 16, "BLOCK_K": 32, "BLOCK_C": 128, "BLOCK_L": 32}
    monkeypatch.setattr(triton_spectral_norm._Layers, "blocks", lambda layers: blocks)
    monkeypatch.setattr(triton_spectral_norm, "MAX_LAYERS", 3)
    with available("triton"), fuseblock.backend("triton"), poisoned_outputs():
        got = outcome(ours, torch.float64, "channels_last", 2)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa: str, tmp_path: Path) -> None:
    script = (
        "import torch; from tests.test_spectral_norm import outcome, ours\n"
        f"torch.save([x.detach() for x in outcome(ours, torch.float32, 'contiguous', 1)], {str(tmp_path / 'got')!r})"
    )
    environment = {**os.environ, "FUSEBLOCK_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if "must have it" in done.stderr or _ext.why_not is not None:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr
    want = outcome(theirs, torch.float64, "contiguous", 1)
    stock = outcome(theirs, torch.float32, "contiguous", 1)
    for g, s, w in zip(torch.load(tmp_path / "got"), stock, want, strict=True):
        assert error_ratio(g, w, max(relative_error(s, w), 4 * torch.finfo(torch.float32).eps), 0) <= 1


@pytest.mark.parametrize("n_power_iterations", [0, 1])
def test_gradcheck(kind: str, n_power_iterations: int) -> None:
    weights = [torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)]
    for w in weights:
        w.requires_grad_()
    us = [torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    vs = [torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    if n_power_iterations:
        # As a function of W with u and v constant, which only holds where they no longer move.
        with fuseblock.backend("auto"):
            functional.spectral_norm(weights, us, vs, dims=[0, 1], n_power_iterations=500)

    def call(*weights: Tensor) -> Tensor:
        kept = [u.clone() for u in us], [v.clone() for v in vs]
        ys = functional.spectral_norm(weights, *kept, dims=[0, 1], n_power_iterations=n_power_iterations)
        return torch.cat([y.flatten() for y in ys])

    def slopes(*weights: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*weights).sin().sum().square(), weights, create_graph=True)

    interpreted = kind == "triton"  # takes its time
    assert gradcheck(call, weights, fast_mode=interpreted)
    if not n_power_iterations:
        assert gradgradcheck(call, weights, fast_mode=interpreted)
        assert gradgradcheck(slopes, weights, fast_mode=True)


def test_gradients_that_are_not_wanted(kind: str) -> None:
    weights, us, vs, dims = inputs(torch.float32)
    weights[0] = weights[0].detach()
    ys = functional.spectral_norm(weights, us, vs, dims=dims)
    ys[1].sum().backward()
    assert weights[0].grad is None and weights[1].grad is not None and weights[2].grad is None


def test_threads_do_not_change_the_bits() -> None:
    if _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    w = torch.randn(300, 700)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            u, v = torch.ones(300), torch.ones(700)
            leaf = w.clone().requires_grad_()
            (y,) = functional.spectral_norm([leaf], [u], [v])
            found.append((y, u, v, *torch.autograd.grad(y.sin().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_zero_and_not_finite(kind: str) -> None:
    for value in (0.0, float("nan"), float("inf")):
        w = torch.full((3, 4), value, requires_grad=True)
        found = []
        for run in (ours, theirs):
            u, v = torch.ones(3) / 3**0.5, torch.ones(4) / 2
            (y,) = run([w], [u], [v], [0], 1)
            found.append((y, *torch.autograd.grad(y.sum(), w)))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())


def test_complex_weights() -> None:
    stock = parametrizations.spectral_norm(torch.nn.Linear(4, 3, dtype=torch.complex64))
    w, (u, v) = (
        stock.parametrizations.weight.original,
        (stock.parametrizations.weight[0]._u, stock.parametrizations.weight[0]._v),
    )
    (got,) = functional.spectral_norm([w], [u.clone()], [v.clone()])
    torch.testing.assert_close(got, stock.weight)


def test_errors_of_the_function() -> None:
    w, u, v = torch.ones(3, 4), torch.ones(3), torch.ones(4)
    for arguments, options in (
        (([w], [u], []), {}),
        (([w], [v], [u]), {}),
        (([w[0]], [v], [v]), {}),
        (([w], [u], [v]), {"dims": []}),
        (([w], [u], [v]), {"n_power_iterations": -1}),
    ):
        with pytest.raises(ValueError, match="spectral_norm: expected"):
            functional.spectral_norm(*arguments, **options)
    assert functional.spectral_norm([], [], []) == ()


def test_forced_backends_run_or_raise() -> None:
    w, u, v = torch.ones(3, 4), torch.ones(3), torch.ones(4)

    def normalize(w: Tensor) -> tuple[Tensor, ...]:
        return functional.spectral_norm([w], [u.to(w.dtype)], [v.to(w.dtype)])

    with fuseblock.backend("cuda"), pytest.raises(fuseblock.BackendError, match="cuda.*not implemented"):
        normalize(w)
    with fuseblock.backend("triton"), pytest.raises(fuseblock.BackendError, match="asked for triton"):
        normalize(w.to(torch.complex64))
    with fuseblock.backend("cpu"):
        for given in (w.bfloat16(), w.to(torch.complex64), torch.ones(4, 3).t()):
            with pytest.raises(fuseblock.BackendError, match="asked for cpu"):
                normalize(given)
        with pytest.raises(fuseblock.BackendError, match="asked for cpu"):
            torch.func.jvp(lambda w: normalize(w)[0], (w,), (w,))
        if _ext.why_not is None:
            with torch.profiler.profile() as profile:
                normalize(w)
            assert "fuseblock_cpu::spectral_norm" in {event.key for event in profile.key_averages()}


def test_the_opaque_iteration() -> None:
    arguments = torch.randn(3, 4), torch.randn(4), 2, 1e-12
    torch.library.opcheck(torch.ops.fuseblock.spectral_power_iteration.default, arguments)


def test_the_compiled_kernels_run() -> None:
    if _ext.why_not is not None:
        pytest.skip(_ext.why_not)
    for dtype, name in ((torch.float32, "cpu"), (torch.bfloat16, "aten")):
        weights, us, vs, dims = inputs(dtype)
        told = fuseblock.explain("spectral_norm", weights, us, vs, dims=dims)
        assert (told.chosen, told.parts[0].chosen) == (name, name)
        ran: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for op in ("spectral_norm", "spectral_norm_bwd"):
                patch.setitem(
                    dispatch._CANDIDATES, op, tuple(noted(op, c, ran) for c in dispatch.candidates(op))
                )
            functional.spectral_norm(weights, us, vs, dims=dims)[1].sum().backward()
        assert ran == [f"spectral_norm {name}", f"spectral_norm_bwd {name}"]


def noted(op: str, candidate: dispatch.Candidate, ran: list[str]) -> dispatch.Candidate:
    def run(*args: Any) -> Any:
        ran.append(f"{op} {candidate.name}")
        assert candidate.run is not None
        return candidate.run(*args)

    return replace(candidate, run=run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backward_takes_every_forward(dtype: torch.dtype) -> None:
    """A table may prefer different ones; of 16 bit, their states have different dtypes."""
    weights, us, vs, dims = inputs(dtype)
    weights = [w.detach() for w in weights]
    dys = [torch.randn_like(w) for w in weights]
    names = (
        ["triton", "aten", "reference"] if dtype is torch.bfloat16 else ["cpu", "triton", "aten", "reference"]
    )

    def able(op: str, *args: Any) -> dict[str, Any]:
        return {c.name: c.run for c in dispatch.candidates(op) if c.why_not(*args) is None}

    def wide(tensors: list[Tensor]) -> list[Tensor]:
        return [x.double() for x in tensors]

    with available("triton"), fuseblock.backend("triton"):
        for name, forward in able("spectral_norm", weights, us, vs, dims, 1, 1e-3).items():
            assert name in names
            _, state = forward(weights, us, vs, dims, 1, 1e-3)
            exact = able("spectral_norm_bwd", wide(dys), wide(weights), state.double(), dims)["reference"]
            want = exact(wide(dys), wide(weights), state.double(), dims)
            backwards = able("spectral_norm_bwd", dys, weights, state, dims)
            found = {name: run(dys, weights, state, dims) for name, run in backwards.items()}
            assert set(found) >= set(names) - {"cpu"}
            for dws in found.values():
                for got, stock, w in zip(dws, found["reference"], want, strict=True):
                    few = max(relative_error(stock, w), torch.finfo(dtype).eps * 4)
                    assert error_ratio(got, w, few, 2000) <= 1
