"""Instance normalisation with its activation: batch normalisation of a batch of one with N C channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ._norm import batch_norm_act


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    slope: Tensor | None = None,
) -> Tensor:
    """Instance normalisation and an activation, differentiable twice.

        y = act(weight (x - mean) / sqrt(var + eps) + bias)

    with mean and (biased) var over the pixels of every sample and channel, in float32 (float64 for float64).

    Args:
        x: (N, C, ...), any layout; y keeps it.
        weight, bias: (C,), or per sample (N, C): adaptive instance normalisation.
        eps, activation, negative_slope: as in `batch_norm_act`.
        slope: (C,) or (1,), learned, of prelu.

    Raises:
        ValueError: shapes, devices or activation do not fit; one value per sample and channel. TypeError: dtypes.

    Sources: Ulyanov, Vedaldi and Lempitsky 2016; Huang and Belongie 2017 (adaptive).
    """
    if x.dim() < 3:
        raise ValueError(f"instance_norm_act: expected x of shape (N, C, ...), got {tuple(x.shape)}")
    samples, channels = x.shape[:2]

    def rows(t: Tensor | None, name: str) -> Tensor | None:
        if t is None:
            return None
        if t.shape not in ((channels,), (samples, channels)):
            raise ValueError(
                f"instance_norm_act: expected {name} of shape ({channels},) or ({samples}, {channels}), "
                f"got {tuple(t.shape)}"
            )
        return t.expand(samples, channels).reshape(-1)

    if slope is not None and slope.numel() > 1:
        slope = rows(slope, "slope")
    y = batch_norm_act(
        x.reshape(1, samples * channels, *x.shape[2:]),
        rows(weight, "weight"),
        rows(bias, "bias"),
        eps=eps,
        activation=activation,
        negative_slope=negative_slope,
        slope=slope,
    ).view(x.shape)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return y.contiguous(memory_format=torch.channels_last)
    return y
