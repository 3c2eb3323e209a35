"""Minibatch standard deviation: what tells a discriminator how varied a batch is."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import state_dtype

__all__ = ["minibatch_stddev"]


def minibatch_stddev(
    x: Tensor,
    group_size: int | None = 4,
    num_channels: int = 1,
    *,
    eps: float = 1e-8,
    concatenate: bool = True,
) -> Tensor:
    """Append the standard deviation over groups of samples as further feature maps.

        G = min(group_size, N);  sample n belongs to group m = n mod N / G;  channel c to part f = c div (C / F)
        s[n, f] = mean over c in f, pixels of sqrt(var over the group of x[:, c, pixel] + eps)

    The variance is the biased one. Composed of PyTorch's operations, so it is differentiable to any order; the statistics
    of 16-bit tensors are taken in float32.

    Args:
        x: (N, C, ...), any floating point dtype; contiguous or channels-last.
        group_size: samples of a group; N must be a multiple of min(group_size, N). None: one group of all.
        num_channels: F, the number of maps; C must be a multiple of it.
        eps: added to the variance.
        concatenate: append the maps to x; otherwise return their values.

    Returns:
        (N, C + F, ...) in the memory format of x; without ``concatenate`` s (N, F). Both have the dtype of x.

    Raises:
        ValueError: sizes do not fit. TypeError: not a floating point dtype.

    Source: Karras et al. 2018 (ProGAN), with groups and several features as in StyleGAN2.
    """
    if x.dim() < 2:
        raise ValueError(f"minibatch_stddev: expected x of shape (N, C, ...), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"minibatch_stddev: expected floating point x, got {x.dtype}")
    samples, channels = x.shape[:2]
    group = samples if group_size is None else min(group_size, samples)
    if group < 1 or samples % group:
        raise ValueError(
            f"minibatch_stddev: expected a batch that is a multiple of group_size={group_size}, got {samples} samples"
        )
    if num_channels < 1 or channels % num_channels:
        raise ValueError(
            f"minibatch_stddev: expected channels that are a multiple of num_channels={num_channels}, got {channels}"
        )
    grouped = x.unflatten(1, (num_channels, -1)).unflatten(0, (group, -1)).to(state_dtype(x.dtype))
    deviation = (grouped.var(0, correction=0) + eps).sqrt()
    s: Tensor = deviation.flatten(2).mean(2).to(x.dtype).repeat(group, 1)
    if not concatenate:
        return s
    maps = s.view(samples, num_channels, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        # torch.cat keeps a memory format only where all its inputs have it.
        maps = maps.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, maps], 1)
