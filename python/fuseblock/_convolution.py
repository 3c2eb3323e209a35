"""Second derivatives of convolutions, fit for gradient penalties.

A convolution here is PyTorch's: same kernels, same autograd node, same first gradients, so nothing is computed in a first
backward that PyTorch would not compute. Only where that backward is itself recorded (``create_graph=True``) does a hook
on the node put `_Gradients` in the place of PyTorch's formula for the gradient of the gradient. With y = x * w, gradients
dx(dy, w) and dw(dy, x), and v_x, v_w, v_b the cotangents of dx, dw, db:

    a_dy = v_x * w + x * v_w + v_b        a_x = dx(dy, v_w)        a_w = dw(dy, v_x)

PyTorch computes a_w as a convolution whose kernel is the whole feature map, group by group; here it is what it is, the
weight gradient of a convolution. Everything is made of convolutions of this file again, so that every order is right; where
nobody differentiates further, a_dy and a_w of channels that oneDNN is slow at are matrix products (`_columns`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling
from torch.utils.checkpoint import CheckpointError

from . import _columns
from ._library import forward_mode_active, keep_arguments, wanted, wants_gradient

_NODE = "ConvolutionBackward0"
_INPUT, _WEIGHT = (True, False, False), (False, True, False)


class Geometry(NamedTuple):
    """How a convolution runs: the arguments of ``aten::convolution`` after the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def check_devices(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise RuntimeError where the tensors are not on one device: PyTorch's convolution takes meta tensors beside others
    and returns memory that nobody has written.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and isinstance(input, Tensor) and tensor.device != input.device:
            raise RuntimeError(
                f"convolution: expected {name} on {input.device}, as input, got {tensor.device}"
            )


def with_second_order(y: Tensor) -> Tensor:
    """``y``, with the second derivative of this file if PyTorch's convolution has just made it, else as it is.

    Under tracing, ``torch.compile`` and ``torch.func`` transforms, and for complex numbers (which PyTorch composes of real
    convolutions), PyTorch's own derivative stays.
    """
    if not y.requires_grad or is_compiling() or _are_functorch_transforms_active():
        return y
    node = y.grad_fn
    if node is None or type(y) is not Tensor or torch._C._get_tracing_state() is not None:
        return y
    if node.name() != _NODE:
        node = node.next_functions[0][0]  # without a batch dimension: a squeeze comes after the convolution
        if node is None or node.name() != _NODE:
            return y
    node.register_hook(_second_order_hook)
    return y


def _second_order_hook(
    grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """Gradients as PyTorch computed them, their own derivative as we compute it; None leaves PyTorch's."""
    if not torch.is_grad_enabled():
        return None
    dy = grad_outputs[0]
    if dy is None or not any(g is not None and g.requires_grad for g in grad_inputs):
        return None
    if _are_functorch_transforms_active() or forward_mode_active():
        return None  # batched cotangents (is_grads_batched) and forward over reverse
    # Asked for, not kept: a hook that holds its node is a cycle that is never freed.
    node: Any = torch._C._current_autograd_node()
    if node is None or node.name() != _NODE:
        return None  # the hook runs outside of the engine (compiled autograd)
    try:
        x, w = node._saved_input, node._saved_weight
    except CheckpointError:
        return None  # torch.utils.checkpoint gives a saved tensor once per backward, and the node has had it
    geometry = Geometry(
        tuple(node._saved_stride),
        tuple(node._saved_padding),
        tuple(node._saved_dilation),
        node._saved_transposed,
        tuple(node._saved_output_padding),
        node._saved_groups,
    )
    return _recorded(dy, x, w, geometry, grad_inputs)


def _recorded(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """``gradients`` (dx, dw, db), of which each may be None, as functions of dy, x, w."""
    values = [None if g is None else g.detach() for g in gradients]
    # The engine can be asked about inner nodes only, and views are such. (`view_as` would change strides of size one.)
    dy, x, w = (torch.ops.aten.alias.default(z) for z in (dy, x, w))
    return _Gradients.apply(dy, x, w, geometry, *values)  # type: ignore[no-any-return]


class _Gradients(torch.autograd.Function):
    """dx, dw, db, already computed, as a differentiable function of dy, x, w."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        keep_arguments(ctx, (dy, x, w), range(3))
        ctx.save_for_backward(dy, x, w)
        ctx.geometry = geometry
        return gradients

    @staticmethod
    def backward(ctx: Any, v_x: Tensor | None, v_w: Tensor | None, v_b: Tensor | None) -> tuple[Any, ...]:
        dy, x, w = ctx.saved_tensors
        geometry = ctx.geometry
        for_dy, for_x, for_w = wanted(ctx)
        a_dy = a_x = a_w = None
        if for_x and v_w is not None:
            a_x = _convolution_backward(dy, x, v_w, geometry, _INPUT)[0]
        if v_x is not None:
            if for_dy and for_w and v_b is None and _columns.fits(dy, v_x, w, geometry):
                a_dy, a_w = _columns.convolution_and_weight_gradient(dy, v_x, w, geometry)
            else:
                if for_w:
                    g, v = _for_weight_gradient(dy, v_x, w, geometry)
                    a_w = _convolution_backward(g, v, w, geometry, _WEIGHT)[1]
                if for_dy:
                    a_dy = convolution(v_x, w, v_b, geometry)
        if for_dy:
            if v_w is not None:
                term = convolution(x, v_w, v_b if v_x is None else None, geometry)
                a_dy = term if a_dy is None else a_dy + term
            if v_x is None and v_w is None and v_b is not None:
                a_dy = v_b.reshape(-1, *[1] * (dy.dim() - 2)).expand_as(dy)
        return a_dy, a_x, a_w, None, None, None, None


def _for_weight_gradient(dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The gradient dy and x in the layout in which the weight gradient is fast.

    On a CPU, oneDNN has no good contiguous kernel for groups whose channels do not fill its blocks of eight; its
    channels-last kernel and two copies take a half to a twentieth of the time.
    """
    per_group = (w.shape[0] // geometry.groups, w.shape[1])
    aligned = per_group == (1, 1) or all(channels % 8 == 0 for channels in per_group)
    if geometry.groups > 1 and not aligned and dy.device.type == "cpu" and dy.dim() == 4:
        dy, x = (z.contiguous(memory_format=torch.channels_last) for z in (dy, x))
    return dy, x


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``aten::convolution`` with the derivatives of this file."""
    return with_second_order(torch.convolution(x, w, bias, *geometry))


def _convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """``aten::convolution_backward`` with the derivatives of this file."""
    with torch.no_grad():
        gradients = torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, mask)
    return _recorded(dy, x, w, geometry, gradients) if wants_gradient((dy, x, w)) else gradients
