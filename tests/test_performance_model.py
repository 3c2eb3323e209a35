"""docs/performance.md: it is what its generator writes, and it has every GPU kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from .benchmarks_package import load

model, registry, blocks = load("model"), load("model_kernels"), load("model_blocks")
measured, page, resources = load("model_measured"), load("model_page"), load("model_resources")

KERNELS = [kernel for family in registry.FAMILIES for kernel in family.kernels]
UPDATE = "run `python -m benchmarks model` (kernels of Triton: `--triton`) and commit what it writes"


def test_the_committed_page_is_what_the_generator_writes() -> None:
    assert page.PAGE.read_text() == page.text(page.reports()), UPDATE
    assert page.PLOT.read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_resources_are_those_of_this_build() -> None:
    here, recorded = resources.of_build(), resources.recorded()["cuda"]
    if here is None or here["compiler"] != recorded["compiler"]:
        pytest.skip("no CUDA build here, or by another nvcc than the recorded one")
    assert here["kernels"] == recorded["kernels"], UPDATE


@pytest.mark.parametrize(
    "kernels",
    [
        ("bias_act_fwd_kernel", "batch_norm_act_fwd_kernel"),
        pytest.param((), marks=pytest.mark.slow, id="all"),
    ],
    ids=lambda kernels: f"{len(kernels)}",
)
def test_resources_are_those_that_triton_compiles(kernels: tuple[str, ...]) -> None:
    recorded = resources.recorded()["triton"]
    if resources.triton_version() != recorded["compiler"]:
        pytest.skip("no Triton here, or another one than the recorded one")
    expected = [row for row in recorded["kernels"] if not kernels or row["function"] in kernels]
    assert resources.of_triton(kernels)["kernels"] == expected, UPDATE


def test_every_cuda_kernel_is_in_the_registry() -> None:
    sources = "\n".join(path.read_text() for path in (resources.ROOT / "csrc/cuda").glob("*.cuh"))
    functions = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", sources)
    assert len(functions) > 20
    assert [name for name in functions if not registry.is_known(name, "cuda")] == []


def test_every_triton_kernel_is_in_the_registry() -> None:
    sources = "\n".join(path.read_text() for path in (resources.ROOT / "kernels").glob("*.py"))
    functions = re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)
    assert len(functions) > 15
    assert [name for name in functions if not registry.is_known(name, "triton")] == []


def test_formulas_need_no_other_symbols() -> None:
    for family in registry.FAMILIES:
        assert set(family.sizes) <= set(family.symbols)
        for kernel in family.kernels:
            sizes = family.sizes_of(kernel)
            assert kernel.moved(sizes) > 0
            assert model.evaluate(kernel.flops, sizes) > 0
            assert model.evaluate(kernel.launches, sizes) >= 1


def test_floors() -> None:
    """By hand: 134 MB at 4.3 TB/s; 4.3 of 4.8 TB/s and 790 TFLOP/s are what the design assumes."""
    h200 = model.GPUS[0]
    stats = registry.NORM.kernel("batch_norm_act_stats")
    assert h200.achievable_memory == pytest.approx(4.3e12)
    assert h200.achievable(True) == pytest.approx(790e12, rel=0.01)
    assert stats.floor(registry.NORM.sizes, h200) == pytest.approx(2 * 67_108_864 / 4.3e12, rel=1e-3)
    assert stats.is_memory_bound(registry.NORM.sizes, h200)
    conv = registry.CONVOLUTION.kernels[0]
    assert not conv.is_memory_bound(registry.CONVOLUTION.sizes, h200)


def test_passes_of_blocks() -> None:
    """Those of fuseblock come from the formulas: 3 and 5; without the statistics 2 and 5; second order 8."""
    ours = {design.name: (design.forward, design.backward) for design in blocks.OURS}
    assert [tuple(round(n, 2) for n in both) for both in ours.values()] == [(3, 5), (2, 5)]
    assert any((round(d.forward, 2), round(d.backward, 2)) == (2, 3) for d in blocks.DESIGNS)  # in one launch
    assert (blocks.REDUCED.forward, blocks.REDUCED.bytes_of_element()) == pytest.approx((2, 12))
    assert blocks.SECOND_ORDER[1] == pytest.approx(8)


def test_measured_times_are_shown_with_their_share() -> None:
    case = next(c for c in measured.CASES if (c.name, c.mode) == ("bn-lrelu", "forward"))
    floor = case.floor(model.GPUS[0])
    row: dict[str, Any] = {"case": "bn-lrelu", "mode": "forward", "provider": "fuseblock"}
    report = {
        "machine": {"gpu": "NVIDIA H200"},
        "parameters": {"dtype": "bfloat16"},
        "rows": [{**row, "seconds": {"median": 2 * floor}}, {**row, "mode": "train", "seconds": None}],
    }
    text = page.text([report])
    assert f"H200: {2e6 * floor:.3g} us, 50% of the floor" in text
    assert text.count("not measured |") == len(measured.CASES) - 1


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page.plot(tmp_path / "plot.svg", model.GPUS[1])
    assert all(family.title in (tmp_path / "plot.svg").read_text() for family in registry.FAMILIES)


def test_shown() -> None:
    assert model.shown("(2 + r)*b*E + m*E/8") == "(2 + r) b E + m E/8"
    assert model.evaluate("ceil(T/8)*b", {"T": 9, "b": 2}) == 4
