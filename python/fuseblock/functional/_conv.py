"""Convolutions: PyTorch's, with second derivatives fit for gradient penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._convolution import check_devices, with_second_order

__all__ = ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]

_Size = int | Sequence[int]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: str | _Size = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d` with the derivatives of `conv2d`.

    Args:
        input: (N, C_in, L) or (C_in, L). weight: (C_out, C_in / groups, k). bias: (C_out,) or None.
        stride, padding, dilation, groups: as there; ``padding`` may be "same" or "valid".

    Returns:
        (N, C_out, L') or (C_out, L').

    Raises:
        RuntimeError: tensors on several devices. RuntimeError, ValueError, TypeError: what PyTorch raises.
    """
    check_devices(input, weight, bias)
    return with_second_order(torch.conv1d(input, weight, bias, stride, padding, dilation, groups))  # type: ignore[call-overload]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: str | _Size = 0,
    dilation: _Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`, with a fast gradient of the gradient.

    Forward and first gradients are PyTorch's own, to the bit. Where the gradient is itself differentiated
    (``create_graph=True``: R1, WGAN-GP, path length), the weight's second-order gradient is computed as the weight
    gradient of a convolution, with groups in one call, where PyTorch runs convolutions with the feature map as kernel.
    Any order of gradient. ``torch.compile`` and ``torch.func`` meet PyTorch's convolution.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W), contiguous or channels-last. weight: (C_out, C_in / groups, kh, kw).
            bias: (C_out,) or None. All of one dtype, unless autocast is on.
        stride, padding, dilation, groups: as there; ``padding`` may be "same" or "valid".

    Returns:
        (N, C_out, H', W') or (C_out, H', W'), in the memory format that PyTorch gives.

    Raises:
        RuntimeError: tensors on several devices. RuntimeError, ValueError, TypeError: what PyTorch raises.
    """
    check_devices(input, weight, bias)
    return with_second_order(torch.conv2d(input, weight, bias, stride, padding, dilation, groups))  # type: ignore[call-overload]


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` with the derivatives of `conv2d`.

    Args:
        input: (N, C_in, L) or (C_in, L). weight: (C_in, C_out / groups, k). bias: (C_out,) or None.
        stride, padding, output_padding, groups, dilation: as there.

    Returns:
        (N, C_out, L') or (C_out, L').

    Raises:
        RuntimeError: tensors on several devices. RuntimeError, ValueError, TypeError: what PyTorch raises.
    """
    check_devices(input, weight, bias)
    return with_second_order(
        torch.conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups, dilation)  # type: ignore[arg-type]
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    output_padding: _Size = 0,
    groups: int = 1,
    dilation: _Size = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` with the derivatives of `conv2d`.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W). weight: (C_in, C_out / groups, kh, kw). bias: (C_out,) or None.
        stride, padding, output_padding, groups, dilation: as there.

    Returns:
        (N, C_out, H', W') or (C_out, H', W').

    Raises:
        RuntimeError: tensors on several devices. RuntimeError, ValueError, TypeError: what PyTorch raises.
    """
    check_devices(input, weight, bias)
    return with_second_order(
        torch.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)  # type: ignore[arg-type]
    )
