"""Every Triton kernel, in every configuration that the launchers choose, compiles for GPUs without spilling registers.

No GPU is needed. The compilers run in subprocesses without the interpreter, see triton_aot.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fuseblock.kernels import (
    batch_norm_act,
    channel_tiles,
    lstm_gates,
    lstm_recurrence,
    lstm_recurrence_step,
)

from fuseblock._activations import number
from fuseblock.launch import _triton, triton_batch_norm_act
from fuseblock.launch.triton_lstm_recurrence import (
    PersistentConfig,
    persistent_config,
    prefetches,
)
from fuseblock.launch.triton_lstm_recurrence_step import gpu_step_config

from .triton_aot import SHARED_LIMIT

ARCHITECTURES = (80, 90, 100)
TRITON_NAME = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STATE = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}

#: Arguments of each kernel that hold cell states or their gradients, in the state dtype; others have the inputs' dtype.
STATE_POINTERS = {
    "lstm_gates_fwd_kernel": {"c_ptr", "c_new_ptr"},
    "lstm_gates_bwd_kernel": {"c_ptr", "c_new_ptr", "dc_ptr", "d_c_ptr", "dc_prev_ptr", "dc_total_ptr"},
    "lstm_gates_bwd_bwd_kernel": {
        "c_ptr", "c_new_ptr", "dc_ptr", "v_dc_prev_ptr", "a_dc_ptr", "a_c_ptr", "a_c_new_ptr",
    },
    "lstm_recurrence_fwd_kernel": {"c0_ptr", "c_n_ptr", "c_ptr"},
    "lstm_recurrence_bwd_kernel": {"dc_n_ptr", "d_c_ptr", "c_ptr", "c0_ptr", "dc0_ptr"},
    "lstm_recurrence_step_fwd_kernel": {"c_n_ptr", "c_ptr"},
    "lstm_recurrence_step_bwd_kernel": {"d_c_ptr", "c_ptr", "c0_ptr", "dc0_ptr"},
}  # fmt: skip
_PER_CHANNEL = {
    "mean_ptr",
    "invstd_ptr",
    "weight_ptr",
    "bias_ptr",
    "slope_ptr",
    "k_ptr",
    "partial_ptr",
    "out_ptr",
}
STATE_POINTERS |= {k: _PER_CHANNEL for k in vars(batch_norm_act) if k.endswith("_kernel")}

#: Pointers of other types.
FIXED_POINTERS = {"lengths_ptr": "*i64", "mask_ptr": "*u8"}
#: Integers that are not specialised on divisibility.
NOT_SPECIALISED = ("rows", "t", "step", "n_steps", "batch", "samples", "chunks", "programs")

#: Pointers that the op lstm_gates leaves out; the recurrence's steps may need all of them.
ABSENT_IN_OP = {
    "lstm_gates_fwd_kernel": {"acts_ptr", "h_state_ptr", "lengths_ptr"},
    "lstm_gates_bwd_kernel": {
        "c_new_ptr", "dy_ptr", "d_c_ptr", "ext_ptr", "dm_keep_ptr", "dc_total_ptr", "lengths_ptr",
    },
    "lstm_gates_bwd_bwd_kernel": {"c_new_ptr", "ext_ptr", "a_ext_ptr", "a_c_new_ptr", "a_dm_state_ptr", "lengths_ptr"},
}  # fmt: skip


def _job(
    module: Any,
    kernel: str,
    arch: int,
    dtype: str,
    absent: set[str],
    aligned: bool,
    options: dict[str, int | None],
    shared: int = 0,
    **constants: Any,
) -> dict[str, Any]:
    """A job of triton_aot, with pointers and integers typed by their names."""
    values: dict[str, Any] = dict.fromkeys(absent) | constants
    if "ALIGNED" in getattr(module, kernel).arg_names:
        values["ALIGNED"] = aligned
    signature, divisible = {}, []
    for name in getattr(module, kernel).arg_names:
        if name in values:
            signature[name] = "constexpr"
        elif name in FIXED_POINTERS:
            signature[name] = FIXED_POINTERS[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + (STATE[dtype] if name in STATE_POINTERS[kernel] else dtype)
        else:
            signature[name] = "i32"
            if aligned and name not in NOT_SPECIALISED:
                divisible.append(name)
    shown = ", ".join(f"{k}={v}" for k, v in constants.items())
    without = f" without {sorted(absent)}" if absent else ""
    return {
        "name": f"{kernel} sm_{arch} {dtype} aligned={aligned} {shown}{without}",
        "module": module.__name__,
        "kernel": kernel,
        "arch": arch,
        "signature": signature,
        "constants": values,
        "divisible": divisible,
        "options": options,
        "shared": shared,
    }


def _step_jobs(arch: int, dtype: str, hidden: int, aligned: bool) -> Iterator[dict[str, Any]]:
    block_r, block_h = _triton.gpu_step_blocks(hidden)
    common = {"DTYPE": STATE[dtype], "BLOCK_R": block_r, "BLOCK_H": block_h}
    options: dict[str, int | None] = {"num_warps": _triton.step_warps(aligned)}
    for kernel, op in itertools.product(ABSENT_IN_OP, (True, False)):
        from_pre = {} if kernel == "lstm_gates_fwd_kernel" else {"FROM_PRE": op}
        absent = ABSENT_IN_OP[kernel] if op else set()
        yield _job(lstm_gates, kernel, arch, dtype, absent, aligned, options, **from_pre, **common)


def _persistent_jobs(
    arch: int, dtype: torch.dtype, hidden: int, aligned: bool, precision: str
) -> Iterator[dict[str, Any]]:
    config = persistent_config(dtype, hidden)
    assert isinstance(config, PersistentConfig)
    common = {"PRECISION": precision, "BLOCK_B": 16, "BLOCK_H": config.block_h}
    extra = torch.empty(0)
    variants: tuple[tuple[str, set[str], bool], ...] = (
        ("lstm_recurrence_fwd_kernel", set(), prefetches(hidden)),
        ("lstm_recurrence_bwd_kernel", {"d_gates_ptr", "d_c_ptr"}, prefetches(hidden)),
        ("lstm_recurrence_bwd_kernel", set(), prefetches(hidden, extra, extra)),
    )
    for kernel, absent, prefetch in variants:
        yield _job(
            lstm_recurrence, kernel, arch, TRITON_NAME[dtype], absent, aligned, config.options, config.shared,
            PREFETCH=prefetch, **common,
        )  # fmt: skip


def _fused_step_jobs(
    arch: int, dtype: torch.dtype, batch: int, hidden: int, precision: str = "ieee"
) -> Iterator[dict[str, Any]]:
    for kernel in ("fwd", "bwd"):
        backward = kernel == "bwd"
        config = gpu_step_config(dtype, batch, hidden, backward=backward)
        yield _job(
            lstm_recurrence_step, f"lstm_recurrence_step_{kernel}_kernel", arch, TRITON_NAME[dtype], set(),
            hidden % 16 == 0, {"num_warps": config.num_warps, "num_stages": config.num_stages},
            config.shared(dtype, backward=backward), PRECISION=precision, BLOCK_B=config.block_b,
            BLOCK_H=config.block_h, BLOCK_K=config.block_k, PARTS=config.parts,
        )  # fmt: skip


def _one_unit_jobs() -> Iterator[dict[str, Any]]:
    """H = 1: Triton turns integer arguments that are 1 into constants, which know fewer methods."""
    one = {"hidden": 1, "BLOCK_H": 16}
    for kernel in ABSENT_IN_OP:
        from_pre = {} if kernel == "lstm_gates_fwd_kernel" else {"FROM_PRE": False}
        strides = {n: 1 for n in getattr(lstm_gates, kernel).arg_names if n.startswith("stride_")}
        constants = from_pre | one | strides | {"DTYPE": "fp32", "BLOCK_R": 32}
        yield _job(lstm_gates, kernel, 90, "fp32", set(), False, {}, 65536, **constants)
    for kernel in ("lstm_recurrence_fwd_kernel", "lstm_recurrence_bwd_kernel"):
        constants = one | {"PRECISION": "ieee", "PREFETCH": True, "BLOCK_B": 16}
        yield _job(lstm_recurrence, kernel, 90, "fp32", set(), False, {}, 65536, **constants)
    for kernel in ("lstm_recurrence_step_fwd_kernel", "lstm_recurrence_step_bwd_kernel"):
        constants = one | {"PRECISION": "ieee", "BLOCK_B": 16, "BLOCK_K": 16, "PARTS": 2}
        yield _job(lstm_recurrence_step, kernel, 90, "fp32", set(), False, {}, 65536, **constants)


def _norm_jobs(
    arch: int, dtype: str, aligned: bool, row: int, layout: int, activation: str, saved: str
) -> Iterator[dict[str, Any]]:
    """The six kernels of batch_norm_act where rows of tiles have `row` elements; `saved`: what is kept of a residual."""
    absent = {
        "residual_ptr": saved != "residual",
        "mask_ptr": saved != "mask",
        "slope_ptr": activation != "prelu",
    }
    absent |= {
        "v_residual_ptr": saved == "",
        "dresidual_ptr": saved == "",
        "a_residual_ptr": saved != "residual",
    }
    activated = {"ACT": number(activation), "NEGATIVE_SLOPE": 0.01, "ONE_SLOPE": False}
    many = activation in ("prelu", "silu", "tanh", "elu")
    sums = {"SUMS": 5 if not many else 12 if saved else 10}
    for kernel in sorted(k for k in STATE_POINTERS if k.startswith("batch_norm_act") and "combine" not in k):
        state = torch.float64 if dtype == "fp64" else torch.float32
        tile = triton_batch_norm_act.TILE
        if "bwd_bwd" in kernel:
            tile = triton_batch_norm_act.second_tile(state, sums="reduce" in kernel)
        tile = triton_batch_norm_act.tile_elements(tile, state)
        block, other = triton_batch_norm_act.gpu_blocks(layout, row, 1 << 20, tile)
        rows_first = layout == channel_tiles.ROWS.value
        blocks = {"BLOCK_C": other if rows_first else block, "BLOCK_S": block if rows_first else other}
        constants = blocks | {"LAYOUT": layout, "DTYPE": STATE[dtype]}
        if kernel != "batch_norm_act_stats_kernel":
            constants |= activated | (sums if "bwd_bwd_reduce" in kernel else {})
        missing = {p for p, is_absent in absent.items() if is_absent}
        if kernel == "batch_norm_act_fwd_kernel" and saved == "mask":
            missing -= {"residual_ptr"}
        missing &= set(getattr(batch_norm_act, kernel).arg_names)
        yield _job(
            batch_norm_act, kernel, arch, dtype, missing, aligned, {"num_warps": 4}, 65536, **constants
        )


def _flat_and_combining_jobs(arch: int) -> Iterator[dict[str, Any]]:
    flat = {"LAYOUT": channel_tiles.FLAT.value, "BLOCK_C": 1, "BLOCK_S": triton_batch_norm_act.TILE}
    constants = flat | {"ACT": number("relu"), "NEGATIVE_SLOPE": 0.01, "ONE_SLOPE": False, "DTYPE": "fp32"}
    options: dict[str, int | None] = {"num_warps": 4}
    forward = "batch_norm_act_fwd_kernel"
    yield _job(batch_norm_act, forward, arch, "bf16", {"slope_ptr"}, False, options, 65536, **constants)
    combining = {"BLOCK_C": 32, "BLOCK_P": triton_batch_norm_act.COMBINE_TILE // 32}
    for dtype in ("fp32", "fp64"):
        constants = combining | {"DTYPE": dtype}
        kernel = "batch_norm_act_combine_kernel"
        yield _job(batch_norm_act, kernel, arch, dtype, set(), False, options, 65536, **constants)


def _usual_norm_jobs() -> Iterator[dict[str, Any]]:
    """The largest sums and tiles; misaligned rows."""
    rows, last = channel_tiles.ROWS.value, channel_tiles.CHANNELS_LAST.value
    for arch in ARCHITECTURES:
        yield from _norm_jobs(arch, "bf16", True, 128, last, "silu", "residual")
    yield from _norm_jobs(90, "fp32", True, 4096, rows, "prelu", "residual")
    yield from _norm_jobs(90, "fp64", True, 64, last, "silu", "residual")
    yield from _norm_jobs(90, "bf16", False, 49, rows, "leaky_relu", "mask")
    yield from _norm_jobs(90, "bf16", True, 128, channel_tiles.SAMPLES_LAST.value, "silu", "")
    yield from _flat_and_combining_jobs(90)


def _all_norm_jobs() -> Iterator[dict[str, Any]]:
    for arch, dtype, layout, row in itertools.product(ARCHITECTURES, STATE, (0, 1), (16, 64, 4096)):
        for activation, saved in (("identity", ""), ("leaky_relu", "mask"), ("prelu", "residual")):
            yield from _norm_jobs(arch, dtype, True, row, layout, activation, saved)
    for arch, dtype, activation in itertools.product(ARCHITECTURES, STATE, ("silu", "tanh", "elu")):
        for layout, row in ((0, 49), (1, 3)):
            yield from _norm_jobs(arch, dtype, False, row, layout, activation, "residual")
        for aligned, row in ((True, 64), (False, 3)):
            yield from _norm_jobs(arch, dtype, aligned, row, channel_tiles.SAMPLES_LAST.value, activation, "")
    for arch in ARCHITECTURES:
        yield from _flat_and_combining_jobs(arch)


def _usual_jobs() -> Iterator[dict[str, Any]]:
    """The largest tiles; float64 on one architecture, and not float16, whose code is bfloat16's."""
    yield from _one_unit_jobs()
    yield from _usual_norm_jobs()
    yield from _step_jobs(90, "fp64", hidden=128, aligned=True)
    for arch, dtype in itertools.product(ARCHITECTURES, ("fp32", "bf16")):
        yield from _step_jobs(arch, dtype, hidden=128, aligned=True)
    for arch in ARCHITECTURES:
        yield from _persistent_jobs(arch, torch.bfloat16, 128, True, "ieee")
        yield from _persistent_jobs(arch, torch.bfloat16, 63, False, "ieee")
        yield from _persistent_jobs(arch, torch.float32, 63, False, "ieee")
        yield from _fused_step_jobs(arch, torch.bfloat16, 128, 256)
    yield from _fused_step_jobs(90, torch.bfloat16, 16, 256)
    yield from _fused_step_jobs(90, torch.float32, 32, 256)
    yield from _fused_step_jobs(90, torch.bfloat16, 16, 100)


def _all_jobs() -> Iterator[dict[str, Any]]:
    yield from _all_norm_jobs()
    for arch, dtype, hidden in itertools.product(ARCHITECTURES, STATE, (16, 32, 64, 128)):
        for aligned in (True, False):
            yield from _step_jobs(arch, dtype, hidden, aligned)
    for arch, hidden in itertools.product(ARCHITECTURES, (16, 32, 64, 15, 31, 63)):
        aligned = hidden % 16 == 0
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield from _persistent_jobs(arch, dtype, hidden, aligned, "ieee")
        yield from _persistent_jobs(arch, torch.float32, hidden, aligned, "tf32")
    for arch, dtype in itertools.product(ARCHITECTURES, (torch.bfloat16, torch.float16)):
        yield from _persistent_jobs(arch, dtype, 128, True, "ieee")
    for arch, batch, hidden in itertools.product(ARCHITECTURES, (16, 32, 64, 128), (256, 100)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield from _fused_step_jobs(arch, dtype, batch, hidden)
        yield from _fused_step_jobs(arch, torch.float32, batch, hidden, "tf32")


def _compile(jobs: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    root = Path(__file__).resolve().parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_aot", str(file)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def compile_without_spills(
    jobs: list[dict[str, Any]], tmp_path: Path, record: Any
) -> tuple[list[dict[str, Any]], str]:
    """What each job gave, and a report of all, which is recorded."""
    results = _compile(jobs, tmp_path)
    assert [r["name"] for r in results] == [j["name"] for j in jobs]
    report = "\n".join(
        f"{r['registers']:4} registers, stack {r['stack']}, shared {r['shared']:6}: {r['name']}"
        for r in results
    )
    record("triton_resources", report)
    spilling = [r["name"] for r in results if r["stack"] > 0]
    assert not spilling, f"spilling: {spilling}\n{report}"
    return results, report


def _check(jobs: list[dict[str, Any]], tmp_path: Path, record: Any) -> None:
    results, report = compile_without_spills(jobs, tmp_path, record)
    for job, result in zip(jobs, results, strict=True):
        assert result["shared"] <= job["shared"] <= SHARED_LIMIT[job["arch"]], report
        # Alignment must reach the memory instructions, through masks and strides.
        assert result["wide"] or not job["constants"].get("ALIGNED"), f"narrow accesses: {result['name']}"
        if job["module"] == batch_norm_act.__name__ and job["constants"].get("ALIGNED"):
            # Of the second order's sums, a thread has four elements.
            narrow = "bwd_bwd_reduce" in job["kernel"] and job["signature"]["x_ptr"] in ("*bf16", "*fp16")
            least = 8 if narrow else 16
            assert result["loads"] >= least, f"loads of {result['loads']} bytes: {result['name']}"
            outputs = "reduce" not in job["kernel"] and "stats" not in job["kernel"]
            assert not outputs or result["stores"] >= least, (
                f"stores of {result['stores']} bytes: {result['name']}"
            )
        if job["module"] == lstm_recurrence_step.__name__ and job["constants"]["ALIGNED"]:
            assert result["wide_copies"], f"operands are not copied in 16 bytes: {result['name']}"
            halves = job["signature"]["w_hh_ptr"] != "*fp32"
            assert result["tensor_cores"] or not halves, f"no tensor cores: {result['name']}"


def test_usual_configurations_do_not_spill(tmp_path: Path, record_property: Any) -> None:
    _check(list(_usual_jobs()), tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_configurations_do_not_spill(tmp_path: Path, record_property: Any) -> None:
    _check(list(_all_jobs()), tmp_path, record_property)
