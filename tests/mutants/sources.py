"""Which files have mutants, how a mutant of each is made to run, and which tests have to notice it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_CPU = ("tests/ops/test_lstm_recurrence.py", "tests/ops/test_lstm_gates.py")
_NOT_CPU = (
    "not triton and not cuda and not reference and not bad_input and not opcheck and not seventy and not auto"
)


@dataclass(frozen=True)
class Source:
    """A file and its tests.

    Attributes:
        kit: ``python`` and ``triton`` files are only replaced, those of ``emulator`` and ``cpu`` are compiled.
        stages: arguments of the pytest runs, one after the other, those that find most mutants first.
        barrier_stages: the runs for removed barriers, where `stages` runs on one thread and cannot tell.
        tiers: of the recurrence on GPUs, where the tests run these alone: no other kernels are compiled.
    """

    path: str
    kit: str
    stages: tuple[tuple[str, ...], ...]
    barrier_stages: tuple[tuple[str, ...], ...] = ()
    tiers: tuple[str, ...] = ()


def _selected(expression: str, *files: str) -> tuple[str, ...]:
    return (*files, "-k", expression)


def _resident(path: str, *tiers: str) -> Source:
    """Kernels of the recurrence with resident weights. Long sequences and large layers find nothing that others do not."""
    quick = "not 33 and not 512 and not 768 and not declined and not chosen"
    stages = tuple(
        (*_selected(quick, f"tests/ops/test_lstm_recurrence_{tier}.py"), "-m", "not slow") for tier in tiers
    )
    return Source(path, "emulator", stages, tiers=tiers)


_LAYER_CUDA = (
    (*_selected("not 33 and not bfloat16", "tests/ops/test_lstm_layer_cuda.py"), "-m", "not slow"),
    _selected("parity and bfloat16 and not 33 and not every", "tests/ops/test_lstm_layer_cuda.py"),
)
_EMULATOR = (("tests/emulator/test_lstm_gates_emulated.py",),)
_CPU_GATES = (
    _selected(_NOT_CPU, "tests/ops/test_lstm_gates.py"),
    _selected("gates", "tests/ops/test_cpu_bounds.py"),
)
_CPU_RECURRENCE = (
    _selected(f"{_NOT_CPU} and not odd_sizes", "tests/ops/test_lstm_recurrence.py"),
    _selected("odd_sizes", "tests/ops/test_lstm_recurrence.py"),
    _selected("recurrence", "tests/ops/test_cpu_bounds.py"),
)
_CPU_LAYER = (("tests/ops/test_lstm_layer_cpu.py",), _selected("layer", "tests/ops/test_cpu_bounds.py"))
_THREADS = (("tests/test_cpu_threads.py",),)
_REFERENCE = (_selected("reference or gradgradcheck_of_packed", *_CPU),)
_TRITON = (
    _selected("float64 or (persistent and float32)", "tests/ops/test_triton_kernels.py"),
    ("tests/ops/test_triton_kernels.py",),
    _selected("triton", "tests/ops/test_lstm_gates.py"),
)
_FUSED_STEP = (
    _selected("fused_step and (T2-B8 or T7-B3)", "tests/ops/test_triton_kernels.py"),
    (*_selected("fused", "tests/ops/test_triton_kernels.py"), "-m", "not slow"),
    _selected("strided or inactive or infinity or chosen", "tests/ops/test_triton_kernels.py"),
)

_SPECTRAL_NORM = (("tests/test_spectral_norm.py",), ("tests/nn/test_spectral_norm.py",))
_NORM = "tests/ops/test_batch_norm_act_kernels.py"
_NORM_CUDA = (_selected("cuda", _NORM), _selected("threads", _NORM))
_NORM_WHOLE = (("tests/ops/test_batch_norm_act_whole.py",),)
_INSTANCE_NORM = "tests/ops/test_instance_norm_act.py"
_NORM_TRITON = (
    _selected("triton and float64", _NORM),
    _selected("triton", _NORM),
    _selected("triton", _INSTANCE_NORM),
)

_NORM_CPU = (
    _selected("not triton and not cuda and not reference", "tests/ops/test_batch_norm_act.py"),
    ("tests/ops/test_batch_norm_act_passes.py",),
    _selected("not triton and not cuda and not reference", _INSTANCE_NORM),
)

_IMAGES = "tests/ops/test_upfirdn2d.py"
_IMAGES_CPU = (_selected("cpu or threads", _IMAGES), ("tests/ops/test_upfirdn2d_pixels.py",))
_IMAGES_CUDA = (_selected("cuda", _IMAGES),)
_CONV_STATS = ("tests/ops/test_conv2d_stats.py", "tests/ops/test_conv_transpose2d_subpixel.py")
_CONV_ACT, _CONV_BLOCKS = "tests/ops/test_conv2d_act.py", "tests/nn/test_fused_convolution.py"
_EXPLAIN = "tests/nn/test_explain_block.py"
_NORM_CONV, _NORM_CONV_BLOCKS = "tests/ops/test_norm_act_conv_bwd.py", "tests/nn/test_norm_convolution.py"
_CONV_TRITON = (
    _selected("not slow", "tests/ops/test_conv_odd_sizes.py"),
    _selected("triton or many_blocks", *_CONV_STATS, _CONV_ACT, _NORM_CONV),
)

_BIAS = "tests/ops/test_bias_act.py"
_BIAS_CPU = (_selected("not triton and not cuda and not reference", _BIAS),)

SOURCES = [
    Source("csrc/math/lstm_gates.h", "emulator", _EMULATOR),
    Source("csrc/cuda/lstm_gates.cuh", "emulator", _EMULATOR),
    Source("csrc/cuda/lstm_gates.cu", "emulator", _EMULATOR),
    Source("csrc/cuda/vector.h", "emulator", _EMULATOR),
    Source("python/fuseblock/reference/lstm_gates.py", "python", _REFERENCE),
    Source("python/fuseblock/reference/lstm_recurrence.py", "python", _REFERENCE),
    Source("python/fuseblock/reference/_adjoint.py", "python", (("tests/ops/test_adjoint.py",), *_REFERENCE)),
    Source("python/fuseblock/launch/per_step.py", "python", (("tests/ops/test_per_step.py",),)),
    Source(
        "python/fuseblock/ops/_recurrent_weight_grad.py",
        "python",
        (
            ("tests/ops/test_recurrent_weight_grad.py",),
            _selected("gradgradcheck and (cpu or packed)", "tests/ops/test_lstm_recurrence.py"),
        ),
    ),
    Source(
        "python/fuseblock/_ragged.py", "python", (("tests/test_ragged.py",), ("tests/nn/test_lengths.py",))
    ),
    Source(
        "python/fuseblock/_convolution.py",
        "python",
        (("tests/test_convolution.py",), ("tests/nn/test_conv.py",)),
    ),
    Source("python/fuseblock/_rectifier.py", "python", (("tests/nn/test_activation.py",),)),
    Source("python/fuseblock/nn/activation.py", "python", (("tests/nn/test_activation.py",),)),
    *(
        Source(f"python/fuseblock/{room}/{name}.py", "python", _SPECTRAL_NORM)
        for room, name in (
            ("ops", "spectral_norm"),
            ("reference", "spectral_norm"),
            ("functional", "_spectral"),
        )
    ),
    Source("kernels/spectral_norm.py", "triton", (_selected("triton", "tests/test_spectral_norm.py"),)),
    Source(
        "python/fuseblock/nn/spectral_norm.py",
        "python",
        (("tests/nn/test_spectral_norm.py",), ("tests/nn/test_spectral_norm_devices.py",)),
    ),
    Source("csrc/math/activations.h", "cpu", _CPU_GATES),
    Source("csrc/cpu/gates_kernels.h", "cpu", _CPU_GATES + _CPU_RECURRENCE),
    Source("csrc/cpu/recurrence_fwd.h", "cpu", _CPU_RECURRENCE, _THREADS),
    Source("csrc/cpu/recurrence_bwd.h", "cpu", _CPU_RECURRENCE, _THREADS),
    Source("csrc/cpu/recurrence_bwd_bwd.h", "cpu", _CPU_RECURRENCE, _THREADS),
    Source("csrc/cpu/layer_fwd.h", "cpu", _CPU_LAYER, _THREADS),
    Source("csrc/cpu/layer_bwd.h", "cpu", _CPU_LAYER, _THREADS),
    Source("csrc/cpu/sweep.h", "cpu", _CPU_RECURRENCE, _THREADS),
    Source("csrc/cpu/tile_gemm.h", "cpu", _CPU_RECURRENCE),
    Source("csrc/cpu/plan.h", "cpu", _CPU_LAYER + _CPU_RECURRENCE),
    Source("csrc/cpu/lstm_layer.cpp", "cpu", _CPU_LAYER),
    Source("csrc/cpu/lstm_recurrence.cpp", "cpu", _CPU_RECURRENCE + _THREADS),
    Source("csrc/cuda/grid_barrier.h", "emulator", (("tests/emulator/test_grid.py", "-m", "not slow"),)),
    _resident("csrc/cuda/lstm_recurrence_views.cuh", "block"),
    _resident("csrc/cuda/lstm_recurrence_block.cuh", "block"),
    _resident("csrc/cuda/lstm_recurrence_block_fwd_float32.cu", "block"),
    _resident("csrc/cuda/lstm_recurrence_block_bwd_float32.cu", "block"),
    _resident("csrc/cuda/lstm_recurrence_block_fwd.cuh", "block"),
    _resident("csrc/cuda/lstm_recurrence_block_fwd.cu", "block"),
    _resident("csrc/cuda/lstm_recurrence_block_bwd.cuh", "block"),
    _resident("csrc/cuda/lstm_recurrence_block_bwd.cu", "block"),
    Source("csrc/cuda/lstm_recurrence_block_layer.cuh", "emulator", _LAYER_CUDA, tiers=("block",)),
    Source("csrc/cuda/lstm_recurrence_block_layer.cu", "emulator", _LAYER_CUDA, tiers=("block",)),
    _resident("csrc/cuda/lstm_recurrence_operands.cuh", "block"),
    _resident("csrc/cuda/lstm_recurrence_tiles.cuh", "cluster", "grid"),
    _resident("csrc/cuda/lstm_recurrence_cluster.cuh", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_cluster_fwd.cuh", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_cluster_fwd.cu", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_cluster_bwd.cuh", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_cluster_bwd.cu", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_cluster_fwd_float32.cu", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_cluster_bwd_float32.cu", "cluster"),
    _resident("csrc/cuda/lstm_recurrence_grid.cuh", "grid"),
    _resident("csrc/cuda/lstm_recurrence_grid_fwd.cuh", "grid"),
    _resident("csrc/cuda/lstm_recurrence_grid_bwd.cuh", "grid"),
    _resident("csrc/cuda/lstm_recurrence_grid_plan.h", "grid"),
    _resident("csrc/cuda/lstm_recurrence_grid_fwd_float32.cu", "grid"),
    _resident("csrc/cuda/lstm_recurrence_grid_bwd_float32.cu", "grid"),
    Source(
        "python/fuseblock/launch/lstm_grid.py",
        "python",
        (("tests/ops/test_lstm_recurrence_grid.py", "-m", "not slow"),),
    ),
    Source(
        "python/fuseblock/launch/resident_recurrence.py",
        "python",
        (("tests/ops/test_lstm_recurrence_block.py", "-m", "not slow"),),
    ),
    Source("python/fuseblock/launch/cuda_lstm_layer.py", "python", _LAYER_CUDA[:1]),
    Source("csrc/cuda/channels.cuh", "emulator", _NORM_CUDA + _NORM_WHOLE),
    Source("csrc/cuda/channel_grid.h", "emulator", _NORM_CUDA + _NORM_WHOLE),
    Source("csrc/cuda/batch_norm_act_point.cuh", "emulator", _NORM_CUDA + _NORM_WHOLE),
    Source("csrc/cuda/batch_norm_act.cuh", "emulator", _NORM_CUDA + _NORM_WHOLE),
    Source("csrc/cuda/batch_norm_act_second.cuh", "emulator", _NORM_CUDA),
    Source("csrc/cuda/batch_norm_act.cu", "emulator", _NORM_CUDA + _NORM_WHOLE),
    Source("csrc/cuda/batch_norm_act_resident.cuh", "emulator", _NORM_WHOLE),
    Source("csrc/cuda/batch_norm_act_resident.cu", "emulator", _NORM_WHOLE),
    Source("csrc/math/scalar.h", "emulator", _NORM_CUDA + _EMULATOR),
    Source("csrc/math/pointwise.h", "cpu", _NORM_CPU),
    Source("csrc/cpu/pointwise_simd.h", "cpu", _NORM_CPU),
    Source("csrc/cpu/batch_norm_act_kernels.h", "cpu", _NORM_CPU),
    Source("csrc/cpu/batch_norm_act.cpp", "cpu", _NORM_CPU),
    Source(
        "python/fuseblock/launch/batch_norm_act.py",
        "python",
        (("tests/test_sync_batch_norm.py",), _selected("triton", "tests/ops/test_batch_norm_act.py")),
    ),
    Source(
        "python/fuseblock/reference/batch_norm_act.py",
        "python",
        (
            _selected("reference or third", "tests/ops/test_batch_norm_act.py"),
            ("tests/test_sync_batch_norm.py",),
        ),
    ),
    Source(
        "python/fuseblock/_batch_norm_node.py",
        "python",
        (
            _selected(
                "not triton and not cuda and not cpu and not reference", "tests/ops/test_batch_norm_act.py"
            ),
        ),
    ),
    Source("kernels/batch_norm_act.py", "triton", _NORM_TRITON),
    Source("kernels/channel_tiles.py", "triton", _NORM_TRITON),
    Source("kernels/pointwise.py", "triton", _NORM_TRITON),
    Source("kernels/activations.py", "triton", _TRITON),
    Source("kernels/lstm_gates.py", "triton", _TRITON),
    Source("kernels/lstm_recurrence.py", "triton", _TRITON[:2]),
    Source("kernels/lstm_recurrence_step.py", "triton", _FUSED_STEP),
    Source("python/fuseblock/launch/triton_lstm_recurrence_step.py", "python", _FUSED_STEP),
    Source("csrc/cpu/upfirdn2d_kernels.h", "cpu", _IMAGES_CPU),
    Source("csrc/cpu/upfirdn2d_pixels.h", "cpu", _IMAGES_CPU),
    Source("csrc/cpu/upfirdn2d.cpp", "cpu", _IMAGES_CPU),
    Source("csrc/cuda/upfirdn2d.cuh", "emulator", _IMAGES_CUDA),
    Source("csrc/cuda/upfirdn2d.cu", "emulator", _IMAGES_CUDA),
    Source("kernels/upfirdn2d.py", "triton", (_selected("triton", _IMAGES),)),
    Source(
        "python/fuseblock/reference/upfirdn2d.py", "python", (_selected("reference or opcheck", _IMAGES),)
    ),
    Source("python/fuseblock/ops/upfirdn2d.py", "python", ((_IMAGES, "-k", "not cuda"),)),
    Source("python/fuseblock/functional/_upfirdn2d.py", "python", ((_IMAGES, "-k", "not cuda"),)),
    Source("python/fuseblock/ops/_conv_stats.py", "python", (_selected("not triton", *_CONV_STATS),)),
    Source("python/fuseblock/ops/conv2d_act.py", "python", (_selected("not triton", _CONV_ACT),)),
    Source(
        "python/fuseblock/ops/norm_act_conv_bwd.py",
        "python",
        (_selected("not triton and not all_sizes", _NORM_CONV),),
    ),
    Source("python/fuseblock/_conv_engine.py", "python", ((_CONV_BLOCKS,),)),
    Source(
        "python/fuseblock/nn/_fused_convolution.py", "python", ((_CONV_BLOCKS, _NORM_CONV_BLOCKS, _EXPLAIN),)
    ),
    Source("python/fuseblock/_norm_convolution.py", "python", ((_NORM_CONV_BLOCKS,),)),
    Source("kernels/conv2d_stats.py", "triton", _CONV_TRITON),
    Source("kernels/conv_transpose2d_subpixel.py", "triton", _CONV_TRITON),
    Source("csrc/cuda/bias_act.cuh", "emulator", (_selected("cuda", _BIAS),)),
    Source("csrc/cuda/bias_act.cu", "emulator", (_selected("cuda", _BIAS),)),
    Source("csrc/math/bias_act.h", "cpu", _BIAS_CPU),
    Source("csrc/cpu/bits.h", "cpu", _BIAS_CPU),
    Source("csrc/cpu/bias_act_kernels.h", "cpu", _BIAS_CPU),
    Source("csrc/cpu/bias_act.cpp", "cpu", _BIAS_CPU),
    Source("kernels/bias_act.py", "triton", (_selected("triton", _BIAS),)),
    Source("python/fuseblock/reference/bias_act.py", "python", (_selected("reference or third", _BIAS),)),
    Source("python/fuseblock/functional/_minibatch.py", "python", (("tests/test_minibatch_stddev.py",),)),
]


def matching(pattern: str) -> list[Source]:
    """The sources whose path matches a shell pattern, or contains it."""
    return [s for s in SOURCES if fnmatch(s.path, pattern) or pattern in s.path]
