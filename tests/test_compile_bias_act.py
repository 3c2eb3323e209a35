"""The Triton kernels of bias_act compile for GPUs without spilling. No GPU is needed: see triton_aot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fuseblock.kernels import bias_act as kernels

from fuseblock._activations import number
from fuseblock.launch.triton_bias_act import FORWARD_WARPS, TILE, WARPS, gpu_tile

from .test_compile_triton import STATE, compile_without_spills

STATE_POINTERS = {"bias_ptr", "slope_ptr", "v_bias_ptr", "v_slope_ptr", "sums_ptr"}
#: Pointers that a kind of activation leaves out.
ABSENT = {
    "leaky_relu": {"x_ptr", "bias_ptr", "slope_ptr", "dy_ptr", "a_x_ptr", "v_slope_ptr"},
    "prelu": {"mask_ptr"},
    "silu": {"mask_ptr", "slope_ptr", "v_slope_ptr"},
}


def _job(kernel: str, arch: int, dtype: str, activation: str, channels_last: bool) -> dict[str, Any]:
    forward, backward = kernel == "bias_act_fwd_kernel", kernel == "bias_act_bwd_kernel"
    names = getattr(kernels, kernel).arg_names
    absent = ABSENT[activation] - ({"x_ptr", "bias_ptr"} if forward else {"dy_ptr"} if backward else set())
    block_m, block_c = gpu_tile(96, channels_last, int(dtype[-2:]) // 8)
    constants: dict[str, Any] = dict.fromkeys(absent & set(names)) | {
        "ACT": number(activation),
        "SLOPE": 0.2,
        "GAIN": 1.4,
        "CLAMPED": True,
        "CLAMP": 256.0,
        "CHANNELS_LAST": channels_last,
        "INDEX64": False,
        "DTYPE": STATE[dtype],
        **({"BLOCK": TILE} if forward else {"BLOCK_M": block_m, "BLOCK_C": block_c}),
    }
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "mask_ptr":
            signature[name] = "*u8"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (STATE[dtype] if name in STATE_POINTERS else dtype)
        else:
            signature[name] = "i32"
    full = {
        "x_ptr",
        "y_ptr",
        "dy_ptr",
        "dx_ptr",
        "v_ptr",
        "a_dy_ptr",
        "a_x_ptr",
        "channels",
        "inner",
        "count",
        "m_count",
    }
    return {
        "name": f"{kernel} sm_{arch} {dtype} {activation} channels_last={channels_last}",
        "module": kernels.__name__,
        "kernel": kernel,
        "arch": arch,
        "signature": signature,
        "constants": constants,
        "divisible": [n for n in names if n in full and n not in constants],
        "options": {"num_warps": FORWARD_WARPS if forward else WARPS},
    }


def _jobs() -> Iterator[dict[str, Any]]:
    for arch, dtype in [(80, "bf16"), (90, "bf16"), (100, "bf16"), (90, "fp32"), (90, "fp64")]:
        yield _job("bias_act_fwd_kernel", arch, dtype, "leaky_relu", channels_last=True)
        for kernel, (activation, last) in itertools.product(
            ("bias_act_bwd_kernel", "bias_act_bwd_bwd_kernel"),
            [("leaky_relu", False), ("prelu", True), ("silu", False)],
        ):
            yield _job(kernel, arch, dtype, activation, channels_last=last)


def test_kernels_do_not_spill(tmp_path: Path, record_property: Any) -> None:
    results, report = compile_without_spills(list(_jobs()), tmp_path, record_property)
    narrow = {r["name"]: (r["loads"], r["stores"]) for r in results if min(r["loads"], r["stores"]) < 16}
    assert not narrow, f"bytes of the widest loads and stores: {narrow}\n{report}"
