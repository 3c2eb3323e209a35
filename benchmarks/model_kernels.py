"""The registry of the performance model: every GPU kernel's traffic and operations, by family.

A new kernel is one `Kernel` here and one case in tests/ops/test_counted_passes.py, which holds the formulas against what
the kernel loads and stores.
"""

from __future__ import annotations

import re

from benchmarks.model import Family, Kernel
from benchmarks.model_spectral import SPECTRAL

_BITS = {"b": "bytes of an element", "s": "bytes of an element of c: 4 with 16-bit gates, else b"}

GATES = Family(
    "LSTM cell",
    {"U": "rows times hidden units", **_BITS},
    "65,536 rows of 128 units, bfloat16",
    {"U": 65_536 * 128, "b": 2, "s": 4},
    (
        Kernel(
            "lstm_gates",
            "(4*b + s)*U",
            "(b + s)*U",
            flops="30*U",
            cuda="lstm_step_fwd_kernel",
            triton="lstm_gates_fwd_kernel",
        ),
        Kernel(
            "lstm_gates_bwd",
            "(5*b + 2*s)*U",
            "(4*b + s)*U",
            flops="60*U",
            cuda="lstm_step_bwd_kernel",
            triton="lstm_gates_bwd_kernel",
        ),
        Kernel(
            "lstm_gates_bwd_bwd",
            "(9*b + 3*s)*U",
            "(5*b + 2*s)*U",
            flops="110*U",
            cuda="lstm_step_bwd_bwd_kernel",
            triton="lstm_gates_bwd_bwd_kernel",
        ),
    ),
    note="Pre-activations come in; both states go out. Backward and second order compute the activations again.",
)

_RESIDENT_FWD = {
    "reads": "4*b*U + (b + s)*Q",
    "again": "4*b*D*H*H",
    "writes": "(b + k*(4*b + s))*U + (b + s)*Q",
    "flops": "8*U*H + 30*U",
    "tensor": True,
}
_RESIDENT_BWD = {
    "reads": "(5*b + s)*U + (b + 2*s)*Q",
    "again": "4*b*D*H*H",
    "writes": "4*b*U + (b + s)*Q",
    "flops": "8*U*H + 40*U",
    "tensor": True,
}

RECURRENCE = Family(
    "LSTM recurrence",
    {
        "T": "time steps",
        "B": "batch",
        "D": "directions",
        "H": "hidden units",
        "U": "T B D H",
        "Q": "D B H, the units of a state",
        **_BITS,
        "k": "1 where gates and cell states are kept for backward, else 0",
        "I": "columns of a layer's input, of a small layer whose projection is part of the launch",
    },
    "T = 256, B = 128, H = 128, I = 32, one direction, bfloat16, kept for backward",
    {
        "T": 256,
        "B": 128,
        "D": 1,
        "H": 128,
        "I": 32,
        "U": 256 * 128 * 128,
        "Q": 128 * 128,
        "b": 2,
        "s": 4,
        "k": 1,
    },
    (
        Kernel(
            "block, cluster, grid tier: forward",
            **_RESIDENT_FWD,
            cuda="lstm_(block|cluster|grid)_fwd_kernel",
            triton="lstm_recurrence_fwd_kernel",
        ),
        Kernel(
            "block, cluster, grid tier: backward",
            **_RESIDENT_BWD,
            cuda="lstm_(block|cluster|grid)_bwd_kernel",
            triton="lstm_recurrence_bwd_kernel",
        ),
        Kernel(
            "block tier: forward of a layer",
            "(b + s)*Q",
            "(b + k*(4*b + s))*U + (b + s)*Q",
            again="b*T*B*I + 4*b*D*H*(H + I + 2)",
            flops="8*U*(H + I) + 30*U",
            tensor=True,
            cuda="lstm_block_fwd_kernel",
        ),
        Kernel(
            "per step: forward",
            "4*b*U + s*U",
            "(b + s + 4*b*k)*U",
            flops="30*U",
            launches="D*T",
            cuda="lstm_step_fwd_kernel",
            triton="lstm_gates_fwd_kernel",
        ),
        Kernel(
            "per step: backward",
            "(6*b + 3*s)*U",
            "(4*b + s)*U",
            flops="40*U",
            launches="D*T",
            cuda="lstm_step_bwd_kernel",
            triton="lstm_gates_bwd_kernel",
        ),
        Kernel(
            "per step: second order",
            "(9*b + 5*s)*U",
            "(9*b + 3*s)*U",
            flops="80*U",
            launches="D*T",
            cuda="lstm_step_bwd_bwd_kernel",
            triton="lstm_gates_bwd_bwd_kernel",
        ),
        Kernel(
            "fused step: forward",
            "5*b*U + s*U",
            "(b + s + k*(4*b + s))*U + b*Q",
            again="4*b*D*H*H*T",
            flops="8*U*H + 30*U",
            launches="T",
            tensor=True,
            triton="lstm_recurrence_step_fwd_kernel",
        ),
        Kernel(
            "fused step: backward",
            "(9*b + 3*s)*U",
            "(4*b + s)*U + b*Q",
            again="4*b*D*H*H*(T + 1)",
            flops="8*U*H + 40*U",
            launches="T + 1",
            tensor=True,
            triton="lstm_recurrence_step_bwd_kernel",
        ),
    ),
    note="Steps wait for each other: T times a step's latency is a floor, too, and mostly the higher one. The design "
    "assumes 0.75 to 0.95 us a step in a cluster and 1.2 to 1.3 us in the grid at H = 1,024 (not measured). Left out: what "
    "the grid's blocks tell each other through L2; of the per-step recurrence its products, one call a step and direction. "
    "Its second order repeats the backward steps, too. "
    "The fused step reads W_hh once a step, which L2 holds where it is not too large.",
)

_CHANNELS = "4 floats of a channel"
NORM = Family(
    "Batch norm, instance norm and activation",
    {
        "E": "elements",
        "C": "channels (of instance norm: of every sample)",
        "b": "bytes of an element",
        "P": "blocks that share a channel, each of which writes its own sums",
        "r": "1 with a residual (in backward: where the residual itself is kept), else 0",
        "m": "1 where a mask of one bit an element is kept of it, else 0",
        "d": "1 where the residual's gradient is wanted, else 0",
        "v": "1 with a cotangent of the residual's gradient, else 0",
        "n": "sums of a channel: 2, prelu 3; second order 5, prelu and smooth activations 10 or 12",
    },
    "64 x 64 x 128 x 128, bfloat16, LeakyReLU: the last hidden layer of DCGAN-128's generator",
    {
        "E": 64 * 64 * 128 * 128,
        "C": 64,
        "b": 2,
        "P": 9,
        "r": 0,
        "m": 0,
        "d": 0,
        "v": 0,
        "n": 2,
    },
    (
        Kernel(
            "batch_norm_act_stats",
            "b*E",
            "12*P*C",
            flops="10*E",
            cuda="batch_norm_act_stats_kernel",
            triton="batch_norm_act_stats_kernel",
        ),
        Kernel(
            "batch_norm_act_combine_stats",
            "12*P*C",
            "8*C",
            flops="12*P*C",
            cuda="batch_norm_act_combine_kernel",
            triton="batch_norm_act_combine_kernel",
        ),
        Kernel(
            "batch_norm_act_fwd",
            "(1 + r)*b*E",
            "b*E + m*E/8",
            again="16*C",
            flops="(6 + r)*E",
            cuda="batch_norm_act_fwd(_masked)?_kernel",
            triton="batch_norm_act_fwd_kernel",
        ),
        Kernel(
            "batch_norm_act_bwd_reduce",
            "(2 + r)*b*E + m*E/8",
            "4*n*P*C",
            again="16*C",
            flops="(9 + r)*E",
            cuda="batch_norm_act_bwd_reduce_kernel",
            triton="batch_norm_act_bwd_reduce_kernel",
        ),
        Kernel(
            "batch_norm_act_combine_sums",
            "4*n*P*C",
            "4*n*C",
            flops="n*P*C",
            cuda="batch_norm_act_combine_kernel",
        ),
        Kernel(
            "batch_norm_act_bwd",
            "(2 + r)*b*E + m*E/8",
            "(1 + d)*b*E",
            again="28*C",
            flops="(9 + r)*E",
            cuda="batch_norm_act_bwd_kernel",
            triton="batch_norm_act_bwd_kernel",
        ),
        Kernel(
            "batch_norm_act_whole_fwd",
            "(1 + r)*b*E",
            "b*E + m*E/8 + 12*C",
            again="8*C",
            flops="(12 + r)*E",
            cuda="batch_norm_act_whole_fwd_kernel",
        ),
        Kernel(
            "batch_norm_act_whole_bwd",
            "2*b*E",
            "(1 + d)*b*E + 4*n*C",
            again="r*b*E + m*E/8 + 16*C",
            flops="(17 + 2*r)*E",
            cuda="batch_norm_act_whole_bwd_kernel",
        ),
        Kernel(
            "batch_norm_act_bwd_bwd_reduce",
            "(3 + r + v)*b*E + m*E/8",
            "4*n*P*C",
            again="16*C",
            flops="(8 + 2*n)*E",
            cuda="batch_norm_act_bwd_bwd_reduce_kernel",
            triton="batch_norm_act_bwd_bwd_reduce_kernel",
        ),
        Kernel(
            "batch_norm_act_bwd_bwd",
            "(3 + r + v)*b*E + m*E/8",
            "(2 + r)*b*E",
            again="52*C",
            flops="20*E",
            cuda="batch_norm_act_bwd_bwd_kernel",
            triton="batch_norm_act_bwd_bwd_kernel",
        ),
    ),
    note=f"Read again: {_CHANNELS} in float32, coefficients of backward 3 and of the second order 9 more. The wholes take "
    "the place of three launches where a channel fits into the shared memory of a cluster's blocks. What PyTorch launches "
    'between these kernels: "Blocks of GANs".',
)

BIAS_ACT = Family(
    "Bias, activation, gain and clamp",
    {
        "E": "elements",
        "C": "channels",
        "b": "bytes of an element",
        "m": "bits an element that are kept: 0 to 2",
        "x": "1 where x is kept instead (prelu and smooth activations), else 0",
        "P": "blocks that share a channel",
        "n": "sums of a channel: of the bias 1, of prelu's slope 1",
    },
    "32 x 64 x 256 x 256, bfloat16, LeakyReLU: StyleGAN2-256's discriminator",
    {"E": 32 * 64 * 256 * 256, "C": 64, "b": 2, "m": 1, "x": 0, "P": 32, "n": 1},
    (
        Kernel(
            "bias_act",
            "b*E",
            "b*E + m*E/8",
            again="4*C",
            flops="4*E",
            cuda="bias_act_fwd(_masked)?_kernel",
            triton="bias_act_fwd_kernel",
        ),
        Kernel(
            "bias_act_bwd",
            "(1 + x)*b*E",
            "b*E + 4*n*P*C",
            again="m*E/8 + 8*x*C",
            flops="(4 + 8*x)*E",
            cuda="bias_act_bwd_kernel",
            triton="bias_act_bwd_kernel",
        ),
        Kernel(
            "bias_act_bwd_bwd",
            "(1 + 2*x)*b*E",
            "(1 + x)*b*E + 4*n*x*P*C",
            again="m*E/8 + 8*x*C + 4*C",
            flops="(4 + 16*x)*E",
            cuda="bias_act_bwd_bwd_kernel",
            triton="bias_act_bwd_bwd_kernel",
        ),
        Kernel("bias_act_sum", "4*n*P*C", "4*n*C", flops="n*P*C", cuda="bias_act_sum_kernel"),
    ),
)

IMAGES = Family(
    "Resampling: upfirdn2d",
    {
        "X": "samples of x",
        "Y": "samples of y",
        "b": "bytes of a sample",
        "K": "taps of the filter",
        "u": "product of the upsampling factors",
    },
    "32 x 64 x 256 x 256 blurred by 4 x 4 taps, bfloat16",
    {"X": 32 * 64 * 256 * 256, "Y": 32 * 64 * 256 * 256, "b": 2, "K": 16, "u": 1},
    (
        Kernel(
            "upfirdn2d",
            "0",
            "b*Y",
            again="b*X + 4*K",
            flops="2*K/u*Y",
            cuda="upfirdn2d(_row|_tile)?_kernel",
            triton="upfirdn2d(_row|_tile)?_kernel",
        ),
    ),
    note="Neighbouring outputs share their inputs: one sample is loaded up to K/u times, from the first cache.",
)

_CONVOLUTION = {
    "reads": "g*b*Y",
    "again": "b*(X + W) + 8*p*C + 16*g*O",
    "writes": "b*Y + 8*q*P*O",
    "flops": "2*K*Y + 3*p*X + 6*(q + g)*Y",
    "tensor": True,
}

CONVOLUTION = Family(
    "Convolutions in Triton",
    {
        "X": "elements of x",
        "Y": "elements of y",
        "W": "elements of the weight",
        "C": "channels of x",
        "O": "channels of y",
        "b": "bytes of an element",
        "K": "products of an output: taps (conv_transpose2d_subpixel: 4) times channels of a group",
        "p": "1 where the norm and activation before run along (scale and shift, float32), else 0",
        "q": "1 where the statistics of y are taken along, else 0: then bias and activation may be",
        "g": "1 in a norm's backward, which reads the norm's input and writes sums (q is 1), else 0",
        "P": "blocks of pixels, each of which writes statistics of its own",
    },
    "results of 64 x 96 x 128 x 128 from 96 channels (3 x 3, or transposed), bfloat16, prologue and statistics: SNGAN-128",
    {
        "X": 64 * 96 * 128 * 128,
        "Y": 64 * 96 * 128 * 128,
        "W": 9 * 96 * 96,
        "C": 96,
        "O": 96,
        "b": 2,
        "K": 9 * 96,
        "p": 1,
        "q": 1,
        "g": 0,
        "P": 64 * 128 * 128 // 64,
    },
    (
        Kernel("conv2d_stats, conv2d_act", **_CONVOLUTION, triton="conv2d_stats_fwd_kernel"),
        Kernel(
            "conv_transpose2d_subpixel",
            **_CONVOLUTION,
            triton="conv_transpose2d_subpixel_fwd_kernel",
            sizes={"X": 64 * 96 * 64 * 64, "W": 16 * 96 * 96, "K": 4 * 96, "P": 64 * 128 * 128 // 128},
        ),
        Kernel("norm_act_conv_bwd", **_CONVOLUTION, triton="conv2d_stats_fwd_kernel", sizes={"p": 0, "g": 1}),
        Kernel(
            "combine_stats",
            "0",
            "8*O",
            again="8*P*O",
            flops="8*P*O",
            triton="combine_stats_kernel",
        ),
    ),
    note="x is loaded once for every tap and block of output channels, the weight once for every block of pixels: from "
    "cache after the first time. The weight is copied into the kernels' order before: W elements read and written in a "
    "launch of PyTorch's that is not counted here; another adds up the sums of a norm's backward. `norm_act_conv_bwd` "
    "is the input gradient of a convolution, `batch_norm_act_bwd` follows it.",
)

FAMILIES = (GATES, RECURRENCE, NORM, BIAS_ACT, IMAGES, CONVOLUTION, SPECTRAL)


def is_known(function: str, backend: str) -> bool:
    """Whether a kernel's function, "cuda" or "triton", is in the registry."""
    patterns = (getattr(kernel, backend) for family in FAMILIES for kernel in family.kernels)
    return any(pattern is not None and re.fullmatch(pattern, function) for pattern in patterns)
