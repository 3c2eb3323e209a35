"""Spectral norm in the performance model: one launch serves all layers of a model."""

from __future__ import annotations

from benchmarks.model import Family, Kernel

_DCGAN_D = (
    (64, 3),
    (128, 64),
    (256, 128),
    (512, 256),
    (1, 512),
)  # output and input channels of 4 x 4 convolutions

SPECTRAL = Family(
    "Spectral norm of all layers",
    {
        "W": "elements of all weights",
        "R": "rows of all layers' matrices",
        "C": "their columns",
        "b": "bytes of an element",
        "i": "1 where the power iteration goes on (training), else 0",
    },
    "the discriminator of DCGAN-64, float32, one power iteration",
    {
        "W": sum(16 * out * channels for out, channels in _DCGAN_D),
        "R": sum(out for out, _ in _DCGAN_D),
        "C": sum(16 * channels for _, channels in _DCGAN_D),
        "b": 4,
        "i": 1,
    },
    (
        Kernel(
            "spectral_norm_rows",
            "b*W + 4*R*(1 - i)",
            "4*R*i",
            again="4*C",
            flops="2*W",
            triton="spectral_norm_rows_kernel",
        ),
        Kernel(
            "spectral_norm_columns",
            "b*W",
            "4*C",
            again="4*R",
            flops="2*W",
            triton="spectral_norm_columns_kernel",
        ),
        Kernel(
            "spectral_norm_scale",
            "b*W + 4*(R + C)",
            "b*W + 4*(1 + i)*(R + C)",
            flops="W",
            triton="spectral_norm_scale_kernel",
        ),
        Kernel("spectral_norm_inner", "2*b*W", "0", flops="2*W", triton="spectral_norm_inner_kernel"),
        Kernel(
            "spectral_norm_gradient",
            "b*W + 4*R",
            "b*W",
            again="4*C",
            flops="3*W",
            triton="spectral_norm_gradient_kernel",
        ),
    ),
    note="Sums of blocks of rows or columns are left out: below a hundredth of the weights.",
)
