"""`Conv1d`, `Conv2d`, `ConvTranspose1d`, `ConvTranspose2d`: those of `torch.nn`, with fast second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from .._convolution import check_devices, with_second_order


def _own(conv: torch.nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias where they are parameters: what a parametrization makes of others, it makes at every reading."""
    return conv._parameters.get("weight"), conv._parameters.get("bias")


class Conv1d(torch.nn.Conv1d):
    """A drop-in replacement of `torch.nn.Conv1d`; what differs is said in `Conv2d`.

    Shapes: input (N, C_in, L) or (C_in, L), output (N, C_out, L') or (C_out, L').
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check_devices(input, weight, bias)
        return with_second_order(super()._conv_forward(input, weight, bias))


class Conv2d(torch.nn.Conv2d):
    """A drop-in replacement of `torch.nn.Conv2d` for models that are trained with a gradient penalty.

    Constructor, parameters, initial values, ``state_dict``, padding modes, results, first gradients and errors are those
    of `torch.nn.Conv2d`. The gradient of the gradient is that of `fuseblock.functional.conv2d`.

    Shapes: input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H', W') or (C_out, H', W'). ``torch.jit.script``
    needs a stock module.

    Examples::

        >>> import torch, fuseblock
        >>> critic = torch.nn.Sequential(fuseblock.nn.Conv2d(3, 64, 4, 2, 1), torch.nn.LeakyReLU(0.2))
        >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        >>> slope.square().sum().backward()
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check_devices(input, weight, bias)
        return with_second_order(super()._conv_forward(input, weight, bias))


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """A drop-in replacement of `torch.nn.ConvTranspose1d`; what differs is said in `Conv2d`.

    Shapes: input (N, C_in, L) or (C_in, L), output (N, C_out, L') or (C_out, L').
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution; ``output_size`` resolves its ambiguous size, as in `torch.nn`."""
        check_devices(input, *_own(self))
        return with_second_order(super().forward(input, output_size))


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """A drop-in replacement of `torch.nn.ConvTranspose2d`; what differs is said in `Conv2d`.

    Shapes: input (N, C_in, H, W) or (C_in, H, W), output (N, C_out, H', W') or (C_out, H', W').
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution; ``output_size`` resolves its ambiguous size, as in `torch.nn`."""
        check_devices(input, *_own(self))
        return with_second_order(super().forward(input, output_size))
