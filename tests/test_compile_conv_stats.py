"""The Triton convolutions compile for GPUs without spilling, and their products run on tensor cores.

No GPU is needed. The compilers run in subprocesses without the interpreter, see triton_aot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fuseblock.kernels import conv2d_stats, conv_transpose2d_subpixel

from fuseblock._activations import number
from fuseblock.launch.triton_conv_stats import COMBINE_BLOCKS, gpu_blocks, steps_by_row, tiles

from .test_compile_triton import ARCHITECTURES, STATE, TRITON_NAME, compile_without_spills
from .triton_aot import SHARED_LIMIT


def _job(
    module: Any,
    kernel: str,
    arch: int,
    types: dict[str, str],
    options: dict[str, int],
    whole: set[str],
    **constants: Any,
) -> dict[str, Any]:
    signature: dict[str, str] = {}
    for name in getattr(module, kernel).arg_names:
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
    divisible = [n for n, t in signature.items() if t.startswith("*") or n in whole]
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


#: Of the norm of whose backward a convolution is a part; all but the first of each channel.
NORM_POINTERS = ("norm_x_ptr", "mean_ptr", "invstd_ptr", "norm_weight_ptr", "norm_bias_ptr")


@dataclass(frozen=True)
class Around:
    """What a convolution runs along with itself, of how many channels."""

    statistics: bool = True
    before: str | None = None
    activation: str = "identity"
    bias: bool = True
    channels: int = 64
    out_channels: int = 64
    is_tall: bool = False
    norm: bool = False

    def constants(self) -> dict[str, Any]:
        absent = {"bias_ptr": self.bias, "partial_ptr": self.statistics}
        absent |= dict.fromkeys(("scale_ptr", "shift_ptr"), self.before is not None)
        absent |= dict.fromkeys(NORM_POINTERS, self.norm)
        numbers = {"ACT": number(self.activation), "ACT_BEFORE": number(self.before or "identity")}
        slopes = dict.fromkeys(("SLOPE", "SLOPE_BEFORE"), 0.2)
        return {name: None for name, is_there in absent.items() if not is_there} | numbers | slopes


def _conv_jobs(
    arch: int, dtype: torch.dtype, precision: str, taps: int, channels_last: bool, around: Around
) -> Iterator[dict[str, Any]]:
    """Both convolutions; the transposed one where it has so many taps."""
    name = TRITON_NAME[dtype]
    types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr", "norm_x_ptr"), f"*{name}")
    types |= dict.fromkeys(("scale_ptr", "shift_ptr", "partial_ptr", *NORM_POINTERS[1:]), f"*{STATE[name]}")
    constants = {"CHANNELS_LAST": channels_last, "DTYPE": STATE[name], "PRECISION": precision}
    constants |= around.constants()
    sizes = around.channels, around.out_channels
    strided = around.before is not None and not channels_last
    whole = {n for n, size in zip(("channels", "out_channels"), sizes, strict=True) if size % 16 == 0}
    if taps == 4:
        blocks = gpu_blocks(dtype, precision, 2, *sizes, strided, around.is_tall)
        yield _job(
            conv_transpose2d_subpixel, "conv_transpose2d_subpixel_fwd_kernel", arch, types, blocks.options, whole,
            **constants, **blocks.constants,
        )  # fmt: skip
    row = steps_by_row(around.channels, taps)
    step = taps * around.channels if row else around.channels
    layout = torch.channels_last if channels_last else torch.contiguous_format
    accumulators = tiles(around.norm, layout)
    blocks = gpu_blocks(dtype, precision, accumulators, step, around.out_channels, strided, around.is_tall)
    constants |= {"KH": taps, "KW": taps, "ROW": row, **blocks.constants}
    # Integers that are 1 are constants for Triton: padding by 1, stride 1 of three taps, no groups.
    constants |= {"pad_y": 1, "pad_x": 1} | ({"stride_y": 1, "stride_x": 1} if taps == 3 else {})
    constants |= {} if around is GROUPED else {"groups": 1}
    yield _job(conv2d_stats, "conv2d_stats_fwd_kernel", arch, types, blocks.options, whole, **constants)


def _combine_job(arch: int, state: str) -> dict[str, Any]:
    types = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), f"*{state}")
    block_r, block_c = COMBINE_BLOCKS
    constants = {"BLOCK_PIXELS": 64, "VALUES": 2, "DTYPE": state, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return _job(conv2d_stats, "combine_stats_kernel", arch, types, {}, {"channels"}, **constants)


#: Between two norms; the first and last layers of an image network; a group of 16 channels; a wide convolution of each kind.
STATISTICS = Around(bias=False)
TALL = Around(bias=False, is_tall=True)
BETWEEN_NORMS = Around(before="leaky_relu")
NORM_BACKWARD = Around(bias=False, activation="leaky_relu", norm=True)
FROM_IMAGE = Around(statistics=False, activation="leaky_relu", channels=3)
TO_IMAGE = Around(statistics=False, activation="tanh", out_channels=3)
GROUPED = Around(statistics=False, activation="leaky_relu", channels=16, out_channels=16)


def _usual_jobs() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        yield _combine_job(arch, "fp32")
        yield from _conv_jobs(arch, torch.bfloat16, "ieee", 4, True, STATISTICS)
    yield from _conv_jobs(90, torch.float16, "ieee", 4, True, BETWEEN_NORMS)
    yield from _conv_jobs(80, torch.float32, "tf32", 3, True, STATISTICS)
    yield from _conv_jobs(90, torch.float32, "ieee", 3, False, FROM_IMAGE)
    yield from _conv_jobs(90, torch.bfloat16, "ieee", 4, True, TO_IMAGE)
    yield from _conv_jobs(100, torch.bfloat16, "ieee", 3, True, FROM_IMAGE)
    yield from _conv_jobs(80, torch.bfloat16, "ieee", 4, True, TALL)
    yield from _conv_jobs(100, torch.bfloat16, "ieee", 3, True, GROUPED)
    for arch, taps in ((80, 3), (90, 4), (100, 3)):
        yield from _conv_jobs(arch, torch.bfloat16, "ieee", taps, True, NORM_BACKWARD)


def _all_jobs() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        for state in ("fp32", "fp64"):
            yield _combine_job(arch, state)
        kinds = [(torch.float32, "tf32"), *((d, "ieee") for d in TRITON_NAME)]
        for (dtype, precision), taps, last in itertools.product(kinds, (3, 4), (True, False)):
            smooth = replace(NORM_BACKWARD, activation="tanh")
            for around in (Around(), BETWEEN_NORMS, FROM_IMAGE, TO_IMAGE, GROUPED, NORM_BACKWARD, smooth):
                yield from _conv_jobs(arch, dtype, precision, taps, last, around)
        for dtype, taps in itertools.product((torch.float16, torch.bfloat16), (3, 4)):
            for around in (TALL, replace(BETWEEN_NORMS, is_tall=True)):
                yield from _conv_jobs(arch, dtype, "ieee", taps, True, around)


def _check(jobs: list[dict[str, Any]], tmp_path: Path, record: Any) -> None:
    results, report = compile_without_spills(jobs, tmp_path, record)
    for job, result in zip(jobs, results, strict=True):
        assert result["shared"] <= SHARED_LIMIT[job["arch"]], report
        if "PRECISION" in job["constants"]:
            narrow = (
                job["signature"]["x_ptr"] in ("*bf16", "*fp16") or job["constants"]["PRECISION"] == "tf32"
            )
            assert result["tensor_cores"] or not narrow, f"no tensor cores: {result['name']}"
        if "norm_x_ptr" in job["divisible"] and job["signature"]["norm_x_ptr"] in ("*bf16", "*fp16"):
            assert min(result["loads"], result["stores"]) == 16, f"narrow accesses: {result['name']}"


def test_usual_configurations(tmp_path: Path, record_property: Any) -> None:
    _check(list(_usual_jobs()), tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_configurations(tmp_path: Path, record_property: Any) -> None:
    _check(list(_all_jobs()), tmp_path, record_property)
