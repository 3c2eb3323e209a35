"""The Triton convolutions with statistics compile for GPUs without spilling, and their products run on tensor cores.

No GPU is needed. The compilers run in subprocesses without the interpreter, see triton_aot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fuseblock.kernels import conv2d_stats, conv_transpose2d_subpixel

from fuseblock.launch.triton_conv_stats import COMBINE_BLOCKS, gpu_blocks

from .test_compile_triton import ARCHITECTURES, STATE, TRITON_NAME, _compile
from .triton_aot import SHARED_LIMIT

#: Sizes that are multiples of 16 where channels are.
CHANNELS = {"channels", "out_channels"}


def _job(
    module: Any, kernel: str, arch: int, types: dict[str, str], options: dict[str, int], **constants: Any
) -> dict[str, Any]:
    signature: dict[str, str] = {}
    for name in getattr(module, kernel).arg_names:
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
    divisible = [n for n, t in signature.items() if t.startswith("*") or n in CHANNELS]
    shown = " ".join(f"{k}={v}" for k, v in constants.items())
    return {
        "name": f"{kernel} sm_{arch} {shown}",
        "module": module.__name__,
        "kernel": kernel,
        "arch": arch,
        "signature": signature,
        "constants": constants,
        "divisible": divisible,
        "options": options,
    }


def _conv_jobs(
    arch: int, dtype: torch.dtype, precision: str, taps: int, channels_last: bool, bias: bool
) -> Iterator[dict[str, Any]]:
    name = TRITON_NAME[dtype]
    types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), f"*{name}") | {
        "partial_ptr": f"*{STATE[name]}"
    }
    constants = {"CHANNELS_LAST": channels_last, "DTYPE": STATE[name], "PRECISION": precision}
    if not bias:
        constants["bias_ptr"] = None
    blocks = gpu_blocks(dtype, precision, accumulators=2)
    yield _job(
        conv_transpose2d_subpixel, "conv_transpose2d_subpixel_fwd_kernel", arch, types, blocks.options,
        **constants, **blocks.constants,
    )  # fmt: skip
    blocks = gpu_blocks(dtype, precision, accumulators=1)
    constants |= {"KH": taps, "KW": taps, **blocks.constants}
    yield _job(conv2d_stats, "conv2d_stats_fwd_kernel", arch, types, blocks.options, **constants)


def _combine_job(arch: int, state: str) -> dict[str, Any]:
    types = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), f"*{state}")
    block_r, block_c = COMBINE_BLOCKS
    constants = {"BLOCK_PIXELS": 64, "VALUES": 2, "DTYPE": state, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return _job(conv2d_stats, "combine_stats_kernel", arch, types, {}, **constants)


def _usual_jobs() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        yield _combine_job(arch, "fp32")
        yield from _conv_jobs(arch, torch.bfloat16, "ieee", 4, True, False)
    yield from _conv_jobs(90, torch.float16, "ieee", 3, False, True)
    yield from _conv_jobs(80, torch.float32, "tf32", 3, True, False)
    yield from _conv_jobs(80, torch.float32, "ieee", 3, False, True)
    yield from _conv_jobs(90, torch.float64, "ieee", 3, True, True)


def _all_jobs() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        for state in ("fp32", "fp64"):
            yield _combine_job(arch, state)
        kinds = [(torch.float32, "tf32"), *((d, "ieee") for d in TRITON_NAME)]
        for (dtype, precision), taps, last in itertools.product(kinds, (3, 4), (True, False)):
            yield from _conv_jobs(arch, dtype, precision, taps, last, True)


def _check(jobs: list[dict[str, Any]], tmp_path: Path, record: Any) -> None:
    results = _compile(jobs, tmp_path)
    report = "\n".join(
        f"{r['registers']:4} registers, stack {r['stack']}, shared {r['shared']:6}: {r['name']}"
        for r in results
    )
    record("triton_resources", report)
    assert not [r["name"] for r in results if r["stack"] > 0], report
    for job, result in zip(jobs, results, strict=True):
        assert result["shared"] <= SHARED_LIMIT[job["arch"]], report
        if "PRECISION" in job["constants"]:
            narrow = (
                job["signature"]["x_ptr"] in ("*bf16", "*fp16") or job["constants"]["PRECISION"] == "tf32"
            )
            assert result["tensor_cores"] or not narrow, f"no tensor cores: {result['name']}"


def test_usual_configurations(tmp_path: Path, record_property: Any) -> None:
    _check(list(_usual_jobs()), tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_configurations(tmp_path: Path, record_property: Any) -> None:
    _check(list(_all_jobs()), tmp_path, record_property)
