"""The microbenchmarks compile for every architecture without spills, and their loops hold what they are to measure."""

from __future__ import annotations

import re

import pytest

from . import test_compile_cuda as compiled

FOLDER = compiled.ROOT / "benchmarks" / "micro"
#: The other architectures take a minute more.
ARCHITECTURES = ["90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100"))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(FOLDER.glob("*.cu")), ids=lambda source: source.stem)
def test_compiles_without_spills(source, architecture: str) -> None:
    usage = compiled.dump(source, architecture, "--dump-resource-usage")
    stacks = re.findall(r"Function (\S+):\s*REG:\d+ STACK:(\d+)", usage)
    assert stacks, usage
    assert {stack for _, stack in stacks} == {"0"}, usage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_are_of_resident_weights(architecture: str) -> None:
    kernels = compiled.sass(FOLDER / "products.cu", architecture)
    assert len(kernels) == 6
    for code in kernels:
        name = code.split("\n", 1)[0]
        loop = compiled.loop_around_mma(compiled.instructions(code))
        mma = [text for text in loop if "HMMA" in text]
        assert len(mma) == 32, name
        weights = {int(re.search(r"R\d+, R(\d+)", text)[1]) for text in mma}
        assert len(weights) == 32, f"{name}: tiles of weights share registers"
        resident = {first + n for first in weights for n in range(4)}
        assert not [text for text in loop if compiled.written(text) & resident], (
            f"{name} writes over a weight"
        )
        chains = int(re.search(r"Li(\d)E", name)[1])
        assert sum("LDSM.16.M88.4" in text for text in loop) == 32 // chains // 2, name
        assert not [text for text in loop if re.search(r"\bLD[GL]?\b", text)], f"{name} loads weights"
