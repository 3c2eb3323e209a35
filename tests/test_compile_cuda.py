"""Every CUDA source compiles for every architecture without spilling, and the vectorised kernels move 16 bytes at a time.

Needs no GPU. The machine code is that of the objects under build/native, from which the library was linked. What has no
current object is compiled here, which needs nvcc, and kept under build/compile_cuda, named by a hash of what went into it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "compile_cuda"
SELF_TEST = ROOT / "tests" / "emulator" / "self_test"
CUDA = ROOT / "csrc" / "cuda"
SOURCES = [*sorted(CUDA.glob("*.cu")), *sorted(SELF_TEST.glob("*.cu"))]
ARCHITECTURES = ["80", "90a", "100"]
#: Three blocks of 128 threads fit on a multiprocessor (65,536 registers, given out by 8 a thread).
MOST_REGISTERS = 168
#: Kernels that keep weights in registers have a multiprocessor for each of their blocks, of at most 256 threads.
MOST_REGISTERS_RESIDENT = 255


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc was not found (no CUDA_HOME, not on PATH)")
    return found


def cuobjdump() -> str:
    """CUDA's, or the copy that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which("cuobjdump", path=Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip("cuobjdump was not found (neither on PATH nor in triton)")
    return found


def built(source: Path) -> Path | None:
    """The object that the build made of a source, unless something that it was made of has changed since."""
    made = ROOT / "build" / "native" / f"{source.relative_to(ROOT)}.o"
    depfile = Path(f"{made}.d")
    if not (made.exists() and depfile.exists()):
        return None
    inputs = map(Path, depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split())
    time = made.stat().st_mtime_ns
    return made if all(file.exists() and file.stat().st_mtime_ns <= time for file in inputs) else None


def compile_cubin(source: Path, architecture: str) -> Path:
    """The machine code of one source; a spill is an error."""
    command = [
        nvcc(),
        "-std=c++20",
        "-O3",
        "-cubin",
        f"-arch=sm_{architecture}",
        f"-I{ROOT / 'csrc'}",
        str(source),
    ]
    command += ["-Xptxas=-v,--warn-on-spills,--warning-as-error"]
    digest = hashlib.sha256("\0".join(command).encode())
    headers = [file for room in ("cuda", "math") for file in (ROOT / "csrc" / room).glob("*.[hc]*")]
    headers += [*source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
    for file in sorted([*headers, source]):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    target = CACHE / f"{source.stem}-sm_{architecture}-{digest.hexdigest()[:16]}.cubin"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source.stem}-sm_{architecture}-*.cubin"):
            old.unlink()
        new = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        os.replace(new, target)
    return target


def dump(source: Path, architecture: str, what: str) -> str:
    code = built(source) or compile_cubin(source, architecture)
    command = [cuobjdump(), "-arch", f"sm_{architecture}", what, str(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass(source: Path, architecture: str) -> list[str]:
    """The machine code of every kernel, its name first."""
    return re.split(r"\n\s*Function : ", dump(source, architecture, "--dump-sass"))[1:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, architecture: str) -> None:
    usage = dump(source, architecture, "--dump-resource-usage")
    kernels = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage)
    assert kernels, usage
    for name, registers, stack in kernels:
        assert int(stack) == 0, f"{name} for sm_{architecture} has {stack} bytes of stack"
        most = MOST_REGISTERS_RESIDENT if source.stem.startswith("lstm_recurrence_") else MOST_REGISTERS
        assert int(registers) <= most, f"{name} for sm_{architecture} takes {registers} registers"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectorised_kernels_move_16_bytes(architecture: str) -> None:
    kernels = sass(ROOT / "csrc" / "cuda" / "lstm_gates.cu", architecture)
    # The vector width is the first integer template argument: ...kernelI6__halffLi8E...
    widths = {code.split("\n", 1)[0]: int(re.search(r"Li(\d+)E", code)[1]) for code in kernels}
    assert set(widths.values()) == {1, 2, 4, 8}
    for code in kernels:
        name = code.split("\n", 1)[0]
        loads, stores = (len(re.findall(rf"{kind}\.E\.128", code)) for kind in ("LDG", "STG"))
        if widths[name] > 1:
            # The three kinds of kernel read at least the gates and c, and write at least h and c.
            assert loads >= 5, f"{name}: {loads} loads of 16 bytes"
            assert stores >= 2, f"{name}: {stores} stores of 16 bytes"
            assert not re.search(r"(LDG|STG)\.E\.(U8|U16|S16)", code), f"{name} moves single elements"
        else:
            assert loads == stores == 0


#: Kernels that walk over channels: family, kernel, type, N elements of a visit, L channels of them.
WALKING = re.compile(r"(batch_norm_act|bias_act)_(\w+?)_kernelI(d|f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E")
WALKING_KERNELS = {
    "batch_norm_act": {
        "stats",
        "fwd",
        "bwd_reduce",
        "bwd",
        "bwd_bwd_reduce",
        "bwd_bwd",
        "whole_fwd",
        "whole_bwd",
    },
    "bias_act": {"fwd", "bwd", "bwd_bwd"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", WALKING_KERNELS)
def test_norm_and_pointwise_kernels_move_16_bytes(family: str, architecture: str) -> None:
    """In both layouts, wherever rows are aligned: visits of one element are for the others, and for float64.

    The second order of a norm in 16 bit, channels last, keeps up to 14 values of each channel: two threads share eight
    channels, and the registers leave room for a second block.
    """
    seen = set()
    for code in (c for source in CUDA.glob(f"{family}*.cu") for c in sass(source, architecture)):
        name = code.split("\n", 1)[0]
        found = WALKING.search(name)
        if found is None or found[4] == "1":
            continue
        kernel, dtype, last = found[2], found[3], found[5] != "1"
        shared = found[5] not in ("1", found[4])
        assert shared == (last and dtype != "f" and family == "batch_norm_act" and "bwd_bwd" in kernel), name
        loads = "LDGSTS.E.BYPASS.128" if kernel.startswith("whole") else "LDG.E.128"
        assert loads in code, f"{name} has no loads of 16 bytes"
        assert not re.search(r"(LDG|STG)\.E\.[US]16", code), f"{name} moves single elements"
        assert "reduce" in kernel or kernel == "stats" or "STG.E.128" in code, f"{name}: narrow stores"
        seen.add((kernel, dtype, last))
    dtypes = ("f", "6__half", "13__nv_bfloat16")
    assert seen == {
        (k, dtype, last) for k in WALKING_KERNELS[family] for dtype in dtypes for last in (False, True)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_move_16_bytes(architecture: str) -> None:
    """Of upfirdn2d: pixels of whole vectors, and rows of them. Single elements are for others, and for unusual filters."""
    seen = set()
    for code in sass(CUDA / "upfirdn2d.cu", architecture):
        name = code.split("\n", 1)[0]
        found = re.search(r"(upfirdn2d(?:_\w+?)?)_kernelI(d|f|6__half|13__nv_bfloat16)Li(\d+)E", name)
        assert found, name
        loads, stores = ("LDG.E.128" in code, "STG.E.128" in code)
        assert loads == stores == (found[3] != "1"), f"{name}: 16 bytes loaded {loads}, stored {stores}"
        # Of a row's last vector the compiler loads what is used.
        assert found[3] == "1" or not re.search(r"STG\.E\.[US]16", code), f"{name} stores single elements"
        seen.add((found[1], found[2], found[3] != "1"))
    dtypes = ("f", "6__half", "13__nv_bfloat16")
    kinds = [("upfirdn2d", wide) for wide in (False, True)] + [
        ("upfirdn2d_tile", wide) for wide in (False, True)
    ]
    assert seen == {(kernel, dtype, wide) for kernel, wide in kinds for dtype in (*dtypes, "d")} | {
        ("upfirdn2d_row", dtype, True) for dtype in dtypes
    }


@pytest.mark.parametrize("architecture", ["90a", "100"])
def test_norms_in_one_launch_know_their_clusters(architecture: str) -> None:
    """Made of PTX that has no clusters, every block would take itself for the first of its channel."""
    kernels = sass(CUDA / "batch_norm_act_resident.cu", architecture)
    assert kernels
    for code in kernels:
        name = code.split("\n", 1)[0]
        assert "UCGABAR_ARV" in code and "UCGABAR_WAIT" in code, f"{name} has no barrier of a cluster"


#: Instructions of the self-tests' kernels, each of which is one wrapper of csrc/cuda.
WARP_INSTRUCTIONS = [
    r"HMMA\.16816\.F32 ",
    r"HMMA\.16816\.F32\.BF16",
    r"HMMA\.1688\.F32\.TF32",
    r"LDSM\.16\.M88 ",
    r"LDSM\.16\.M88\.2",
    r"LDSM\.16\.M88\.4",
    r"LDSM\.16\.MT88 ",
    r"MOVM\.16\.MT88",
    r"LDGSTS\.E\.BYPASS\.128",
    r"LDGDEPBAR",
    r"BAR\.SYNC\S* 0x1, 0x60",
    r"BAR\.ARV",
]


CLUSTER_INSTRUCTIONS = [
    r"SYNCS\.EXCH\.64",  # mbarrier.init
    r"SYNCS\.ARRIVE\.TRANS64",
    r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    r"UCGABAR_ARV",
    r"UCGABAR_WAIT",
    r"STAS",  # st.async
    r"UBLKCP\.S\.S",
    r"UBLKCP\.S\.G\.MULTICAST",
    r"UBLKCP\.G\.S",
    r"FENCE\.VIEW\.ASYNC",
]
GRID_INSTRUCTIONS = [r"REDG?\.E\.ADD\S*\.STRONG\.GPU", r"LDG?\.E\S*\.STRONG\.GPU", r"NANOSLEEP"]


@pytest.mark.parametrize(
    ("source", "architecture", "instructions"),
    [
        ("warp", "80", WARP_INSTRUCTIONS),
        ("warp", "90a", WARP_INSTRUCTIONS),
        ("cluster", "90a", CLUSTER_INSTRUCTIONS),
        ("grid", "80", GRID_INSTRUCTIONS),
        ("grid", "90a", GRID_INSTRUCTIONS),
    ],
)
def test_wrappers_are_single_instructions(source: str, architecture: str, instructions: list[str]) -> None:
    code = dump(SELF_TEST / f"{source}.cu", architecture, "--dump-sass")
    for instruction in instructions:
        assert re.search(instruction, code), f"{instruction} is not in sm_{architecture}'s code"


def test_kernels_of_clusters_are_empty_where_there_are_none() -> None:
    usage = dump(SELF_TEST / "cluster.cu", "80", "--dump-resource-usage")
    assert set(re.findall(r"SHARED:(\d+)", usage)) == {"0"}


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, text) of the machine code of a kernel."""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", code)]


def loop_around_mma(code: list[tuple[int, str]], before: int = 0) -> list[str]:
    """The instructions of the smallest loop that holds every mma but those `before` it."""
    mma = [at for at, text in code if "HMMA" in text][before:]
    loops = []
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump is not None and int(jump[1], 16) <= mma[0] and at > mma[-1]:
            loops.append((int(jump[1], 16), at))
    start, end = max(loops)
    return [text for at, text in code if start <= at <= end]


def written(text: str) -> set[int]:
    """Registers that an instruction writes."""
    found = re.match(r"(?:@!?U?P\w+\s+)?(\S+)\s+(?:P\w+,\s*)*R(\d+)\b", text)
    if found is None or re.match(r"ST|BAR|BRA|RED", found[1]):
        return set()
    wide = re.search(r"\.(64|128)\b|\.WIDE|HMMA|LDSM\S*\.4", found[1])
    count = 1 if wide is None else 2 if wide[0] in (".64", ".WIDE") else 4
    return set(range(int(found[2]), int(found[2]) + count))


def resident_weights(loop: list[str], passes: int) -> set[int]:
    """Registers of left operands of mma, in three passes of what is split to become one, that the loop does not load."""
    if passes == 1:
        tiles = {int(re.search(r"R\d+, R(\d+)", text)[1]) for text in loop if "HMMA" in text}
        used = {first + n for first in tiles for n in range(4)}
    else:
        used = {int(r) for text in loop for r in re.findall(r"\bR(\d+)(?:\.reuse)?, 0x1000\b", text)}
    return used - {r for text in loop if re.match(r"LDSM|LDS\.128", text) for r in written(text)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_weights_stay_in_registers(direction: str, architecture: str) -> None:
    """The time loop of the recurrence's block tier: mma, no reload of weights, 16-byte accesses."""
    parts = (direction, f"{direction}_float32", *(["layer"] if direction == "fwd" else []))
    sources = [ROOT / "csrc" / "cuda" / f"lstm_recurrence_block_{part}.cu" for part in parts]
    seen = set()
    for code in (code for source in sources for code in sass(source, architecture)):
        name = code.split("\n", 1)[0]
        kernel = re.search(
            r"block_(\w+)_kernelI(f|6__half|13__nv_bfloat16)Li(\d)ELi(\d+)ELi(\d)ELb(\d)E", name
        )
        if kernel[1] != direction:
            continue
        float32, layer = kernel[2] == "f", "Layer" in name
        passes, hidden, tiles, aligned = map(int, kernel.groups()[2:])
        instruction, k = ("HMMA.1688.F32.TF32", 8) if float32 else ("HMMA.16816", 16)
        of_input = 4 * 32 // k if layer else 0  # for each x, the first of which is there before the loop
        loop = loop_around_mma(instructions(code), of_input)
        mma = [text for text in loop if "HMMA" in text]
        assert len(mma) == 4 * tiles * passes * hidden // k + of_input, name
        assert all(instruction in text for text in mma), name
        resident = resident_weights(loop, passes)
        # Of float32 above H = 64, some tiles are in shared memory.
        held = {96: 26, 128: 33}.get(hidden, 4 * hidden // k) if float32 else 4 * hidden // k
        assert len(resident) == 4 * (held + of_input), f"{name}: {len(resident)} registers hold weights"
        for text in loop:
            assert not written(text) & resident, f"{name} writes over a weight: {text}"
        assert not [text for text in loop if re.search(r"\b(LDL|STL)\b", text)], f"{name} spills"
        if aligned:
            loads, stores = (sum(f"{kind}.E.128" in text for text in loop) for kind in ("LDG", "STG"))
            gates = (4 if float32 else 2) * tiles
            least = 1 if layer else gates + (direction == "bwd")
            assert loads >= least, f"{name}: {loads} loads of 16 bytes"
            assert stores >= (gates if direction == "bwd" else gates + tiles + 1), f"{name}: {stores} stores"
            narrow = [text for text in loop if re.search(r"(LDG|STG)\.E\.U16|\b(LD|ST)\.E|STG\.E\s", text)]
            # Of x, where 16 bytes are not aligned: by a branch.
            assert len(narrow) == (8 if layer else 0), f"{name}: {narrow}"
        seen.add((layer, float32, passes, hidden, tiles, aligned))
    two_tiles = (32, 64, 96, 128) if direction == "fwd" else (32, 64, 96)
    layers = ((32, 1), (64, 1), (96, 1), (128, 1), (128, 0)) if direction == "fwd" else ()
    assert seen == {
        *((False, False, 1, h, 1, a) for h in (32, 64, 96, 128) for a in (0, 1)),
        *((False, False, 1, h, 2, 1) for h in two_tiles),
        *((False, True, p, h, 1, a) for p in (1, 3) for h in (32, 64, 96, 128) for a in (0, 1)),
        *((True, False, 1, h, 1, a) for h, a in layers),
    }
