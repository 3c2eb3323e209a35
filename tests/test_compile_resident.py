"""Machine code of the recurrence's tiers that spread over several blocks: weights stay where they are, accesses are wide.

Needs no GPU; see test_compile_cuda.py.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from fuseblock.launch import lstm_grid

from .ops.resident_cases import cluster_classes
from .test_compile_cuda import ARCHITECTURES, ROOT, instructions, sass, written

Code = list[tuple[int, str]]


def loops_around_mma(code: Code) -> list[list[str]]:
    """The instructions of every loop that holds all mma, the smallest first.

    What jumps back from behind the end of the kernel is no loop: it returns from code that was moved out of the way.
    """
    end = next(at for at, text in code if text == "EXIT")
    mma = [at for at, text in code if "HMMA" in text]
    jumps = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code if at < end]
    loops = [
        (int(to[1], 16), at)
        for at, to in jumps
        if to is not None and int(to[1], 16) <= mma[0] and at > mma[-1]
    ]
    loops.sort(key=lambda loop: loop[1] - loop[0])
    return [[text for at, text in code if start <= at <= end] for start, end in loops]


def weight_tiles(loop: list[str]) -> set[int]:
    """First of the four registers of each left operand of mma."""
    found = (re.search(r"HMMA\S* R\d+, R(\d+)", text) for text in loop)
    return {int(operand[1]) for operand in found if operand is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_grid_tier(direction: str, architecture: str) -> None:
    """A step reads 32 tiles of weights from registers that nothing writes, others from shared memory, 16 bytes a lane."""
    kernels = sass(ROOT / "csrc" / "cuda" / f"lstm_recurrence_grid_{direction}.cu", architecture)
    seen = set()
    for code in kernels:
        name = code.split("\n", 1)[0]
        steps = int(re.search(r"ELi(\d+)EEE", name)[1])
        product, time, *_ = loops_around_mma(instructions(code))
        assert sum("HMMA.16816" in text for text in product) == 2 * steps, name
        over = set().union(*map(written, time))
        resident = [tile for tile in weight_tiles(product) if over.isdisjoint(range(tile, tile + 4))]
        assert len(resident) == min(2 * steps, 32), f"{name} writes over weights"
        assert sum("LDS.128" in text for text in product) == max(0, 2 * steps - 32), name
        assert sum("LDSM.16.M88.4" in text for text in product) == (
            steps if direction == "bwd" else steps // 2
        ), name
        assert not [text for text in time if re.search(r"\b(LDL|STL|LDG)\b", text) and text in product], name
        # gx, y and gates; gates, dy and d(gx). And what blocks exchange.
        loads, stores, copies = (
            sum(kind in text for text in time) for kind in ("LDG.E.128", "STG.E.128", "LDGSTS.E.BYPASS.128")
        )
        assert loads >= (1 if direction == "fwd" else 2), f"{name}: {loads} loads of 16 bytes"
        assert stores >= 3, f"{name}: {stores} stores of 16 bytes"
        assert copies >= 1, name
        assert any(re.search(r"REDG?\.E\.ADD\S*\.STRONG\.GPU", text) for text in time), name
        seen.add(steps)
    assert seen == set(lstm_grid.CLASSES[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_grid_tier_in_float32(direction: str, architecture: str) -> None:
    """Tensor cores in one pass or three; 28 tiles of weights in registers, others 16 bytes a lane; no local memory."""
    seen = set()
    for code in sass(ROOT / "csrc" / "cuda" / f"lstm_recurrence_grid_{direction}_float32.cu", architecture):
        name = code.split("\n", 1)[0]
        passes, steps = map(int, re.search(r"kernelIfLi(\d)ELi(\d+)EEE", name).groups())
        product, time, *_ = loops_around_mma(instructions(code))
        assert sum("HMMA.1688.F32.TF32" in text for text in product) == passes * 2 * steps, name
        assert sum("LDS.128" in text for text in product) == max(0, 2 * steps - 28), name
        over = set().union(*map(written, time))
        if passes == 1:  # three multiply what they have split, which is written in every step
            resident = [tile for tile in weight_tiles(product) if over.isdisjoint(range(tile, tile + 4))]
            assert len(resident) == min(2 * steps, 28), f"{name} writes over weights"
        assert not [text for text in time if re.search(r"\b(LDL|STL)\b", text)], name
        assert sum("LDG.E.128" in text for text in time) >= (1 if direction == "fwd" else 2), name
        assert sum("STG.E.128" in text for text in time) >= 3, name
        seen.add((passes, steps))
    assert seen == set(itertools.product((1, 3), lstm_grid.CLASSES[4]))


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_cluster_tier(direction: str, dtype: torch.dtype, architecture: str) -> None:
    """Weights in registers that a step does not write, others in shared memory; what blocks exchange leaves as st.async."""
    float32, classes = dtype == torch.float32, cluster_classes(dtype)
    stem = f"lstm_recurrence_cluster_{direction}{'_float32' if float32 else ''}"
    seen = set()
    for code in sass(ROOT / "csrc" / "cuda" / f"{stem}.cu", architecture):
        name = code.split("\n", 1)[0]
        found = re.search(r"ClassILi(\d+)\S*?EELi(\d)ELb(\d)ELi(\d)E", name).groups()
        hidden, tiles, aligned, passes = map(int, found)
        blocks, parts, *registers = classes[hidden]
        weights = hidden * dtype.itemsize // 16 // parts
        held = min(weights, registers[tiles if aligned else 0])
        loops = loops_around_mma(instructions(code))
        product, time = loops[0], loops[-1]
        rows_at_once = tiles if direction == "fwd" else 1
        mma = "HMMA.1688.F32.TF32" if float32 else "HMMA.16816"
        assert sum(mma in text for text in product) == passes * weights * rows_at_once, name
        over = set().union(*map(written, time))
        if passes == 1:  # three multiply what they have split, which is written in every step
            resident = [tile for tile in weight_tiles(product) if over.isdisjoint(range(tile, tile + 4))]
            assert len(resident) == held, f"{name}: {len(resident)} tiles of weights stay in registers"
        assert sum("LDS.128" in text for text in product) >= weights - held, name
        assert not [text for text in time if re.search(r"\b(LDL|STL)\b", text)], f"{name} spills"
        # A cell tile's h is 8 rows of 8 units, 16 bytes a lane; of dgates a lane has 16 bytes for each result.
        sends = blocks * dtype.itemsize // 8 if direction == "fwd" else blocks // (2 * parts)
        assert sum("STAS.128" in text for text in time) >= sends, name
        assert any("SYNCS.PHASECHK" in text for text in time), name
        if aligned or float32:
            # gx, y and gates; gates, dy and d(gx)
            loads, stores = (sum(kind in text for text in time) for kind in ("LDG.E.128", "STG.E.128"))
            assert loads >= (1 if direction == "fwd" else 2), f"{name}: {loads} loads of 16 bytes"
            assert stores >= (2 if direction == "fwd" else 1), f"{name}: {stores} stores of 16 bytes"
        seen.add((hidden, tiles, aligned, passes))
    kinds = [(1, 0, 1), (1, 0, 3)] if float32 else [(1, 0, 1), (1, 1, 1), (2, 1, 1)]
    assert seen == {(hidden, *kind) for hidden in classes for kind in kinds}
