"""Normalisation with its activation in one pass: drop-in for torch.nn's batch norm and instance norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _norm_convolution, dispatch, functional
from .._activations import activate, check_activation
from .._batch_norm_node import FEW_ELEMENTS, IN_PLACE
from .._conv_engine import Call
from .._norm_convolution import Convolve
from ..functional._norm import check_running, move_running
from .activation import mark, name_of, unusual


class _WithActivation(torch.nn.Module):
    """The activation of a normalising module. The defaults serve modules whose class was changed by `fuseblock.fuse`."""

    activation: str = "identity"
    negative_slope: float = 0.01
    #: The module behind this one that `fuseblock.fuse` found in a forward; a tuple, since it is registered elsewhere.
    applies: tuple[torch.nn.Module, ...] = ()

    def _set_activation(self, activation: str, negative_slope: float, **factory: Any) -> None:
        prelu = activation == "prelu"
        check_activation(type(self).__name__, activation, torch.empty(1) if prelu else None, 1)
        self.activation, self.negative_slope = activation, negative_slope
        if prelu:
            self.slope = torch.nn.Parameter(torch.full((1,), 0.25, **factory))

    def activated(self, input: Tensor, act: torch.nn.Module | None, residual: Tensor | None = None) -> Tensor:
        """act(norm(input) + residual) in one pass, with the activation of another module; None: this one's own."""
        raise NotImplementedError

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(input) + residual); shapes and errors as in the class."""
        if self.applies:
            (act,) = self.applies
            # Much may have changed since: hooks, the activation's options, a compiled graph, a replica on another device.
            apart = is_compiling() or "_is_replica" in self.__dict__ or unusual(self) or unusual(act)
            if not apart and name_of(act) is not None:
                return mark(self.activated(input, act, residual), act)
        return self.activated(input, None, residual)

    def _activation_arguments(self, act: torch.nn.Module | None) -> dict[str, Any]:
        if act is None:
            slope = self.slope if self.activation == "prelu" else None
            return {"activation": self.activation, "negative_slope": self.negative_slope, "slope": slope}
        return {
            "activation": name_of(act),
            "negative_slope": getattr(act, "negative_slope", 0.01),
            "slope": act.weight if isinstance(act, torch.nn.PReLU) else None,
        }

    def extra_repr(self) -> str:
        """The stock module's, and the activation."""
        text = super().extra_repr()
        if self.activation == "identity":
            return text
        slope = f"({self.negative_slope})" if self.activation == "leaky_relu" else ""
        return f"{text}, activation={self.activation}{slope}"


def _is_small_inference(x: Tensor) -> bool:
    """Whether PyTorch's batch norm, and the activation in place, are the fastest: the tensor then stays in cache."""
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not is_compiling()
        and dispatch.forced() == "auto"
        and x.numel() <= FEW_ELEMENTS
    )


class _BatchNormAct(_WithActivation, torch.nn.modules.batchnorm._BatchNorm):
    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        *,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self._set_activation(activation, negative_slope, device=device, dtype=dtype)
        if process_group is not None:
            self.process_group = process_group

    @property
    def takes_statistics(self) -> bool:
        """Whether a call takes this process's batch's own statistics, which the producer of the input may give."""
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        return of_batch and self.process_group is None

    def _count(self) -> float:
        """Count a batch, in training; how far the running statistics move towards its own."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return momentum

    def convolved(
        self,
        input: Tensor,
        call: Call,
        convolve: Convolve,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """The results of ``convolve``, of act(batch_norm(input)) in training, as one node; the activation is the call's."""
        self._check_input_dim(input)
        check_running(input, self.running_mean, self.running_var)
        momentum = self._count()
        given = (None, None) if statistics is None else statistics
        act = call.activation, call.negative_slope
        results, (mean, var, count) = _norm_convolution.run(
            input, self.weight, self.bias, *call.operands, call.geometry, convolve, given, self.eps, *act
        )
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            move_running(self.running_mean, self.running_var, mean, var, count, momentum)
        return results

    def activated(
        self,
        input: Tensor,
        act: torch.nn.Module | None,
        residual: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """act(batch_norm(input) + residual) in one pass, with the activation of another module; None: this one's own.

        ``statistics``: mean and variance of the input in training, where its producer gives them.
        """
        arguments = self._activation_arguments(act)
        if not self.training and residual is None and _is_small_inference(input):
            overwrite = IN_PLACE.get(arguments["activation"])
            if overwrite is not None:
                y = torch.nn.modules.batchnorm._BatchNorm.forward(self, input)
                overwrite(y, arguments["negative_slope"])
                return y
        self._check_input_dim(input)
        tracked = self.track_running_stats or not self.training
        return functional.batch_norm_act(
            input,
            self.weight,
            self.bias,
            residual,
            running_mean=self.running_mean if tracked else None,
            running_var=self.running_var if tracked else None,
            training=self.training or (self.running_mean is None and self.running_var is None),
            momentum=self._count(),
            eps=self.eps,
            process_group=self.process_group,
            statistics=statistics,
            **arguments,
        )


class BatchNormAct2d(_BatchNormAct, torch.nn.BatchNorm2d):
    r"""A drop-in replacement of :class:`torch.nn.BatchNorm2d` with an activation behind it, in one pass.

    .. math:: y = \mathrm{act}\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    with the batch's mean and biased variance per channel in training, the running ones in eval mode, and an optional
    residual r, ``forward(input, residual)``. As it stands (``activation="identity"``) it is `torch.nn.BatchNorm2d`:
    same arguments, parameters, buffers, ``state_dict`` and results.

    For backward only the input, per-channel statistics and, with a residual, one bit per element (smooth activations:
    the residual) are saved. Running buffers are not: two forwards before one backward work under
    DistributedDataParallel. Differentiable twice, by fused kernels (`fuseblock.functional.batch_norm_act`).

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in `torch.nn.BatchNorm2d`.
        activation: identity, relu, leaky_relu, prelu, silu, tanh or elu.
        negative_slope: of leaky_relu.
        process_group: statistics are synchronised over it (CPU and GPU, also in second derivatives); None: they are not.

    Shape: ``input`` and ``residual`` (N, C, H, W), contiguous or channels-last; so is the output.

    Raises:
        ValueError: an unknown activation; an input that is not 4-D; one value per channel in training.
    """


class BatchNormAct1d(_BatchNormAct, torch.nn.BatchNorm1d):
    """`BatchNormAct2d` for (N, C) and (N, C, L): a drop-in replacement of `torch.nn.BatchNorm1d`."""


class BatchNormAct3d(_BatchNormAct, torch.nn.BatchNorm3d):
    """`BatchNormAct2d` for (N, C, D, H, W): a drop-in replacement of `torch.nn.BatchNorm3d`."""


def joins(norm: torch.nn.Module | None, act: torch.nn.Module | None) -> bool:
    """Whether the norm may apply the activation module now."""
    return (
        norm is not None
        and act is not None
        and norm.activation == "identity"  # the norm's own one would come first
        and name_of(act) is not None
        and not unusual(norm)
        and not unusual(act)
    )


def _check_residual(module: str, input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(
            f"{module}: expected residual of the shape of input, {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if residual.device != input.device:
        raise ValueError(f"{module}: expected residual on {input.device}, as input, got {residual.device}")


class _InstanceNormAct(_WithActivation, torch.nn.modules.instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self._set_activation(activation, negative_slope, device=device, dtype=dtype)

    def activated(self, input: Tensor, act: torch.nn.Module | None, residual: Tensor | None = None) -> Tensor:
        """act(instance_norm(input) + residual) with the activation of another module; None: this one's own."""
        self._check_input_dim(input)
        if residual is not None:
            _check_residual(type(self).__name__, input, residual)
        if (
            residual is None
            and input.dim() != self._get_no_batch_dim()
            and not self.track_running_stats
            and input.shape[1] == self.num_features
        ):
            arguments = self._activation_arguments(act)
            return functional.instance_norm_act(input, self.weight, self.bias, eps=self.eps, **arguments)
        # Running statistics and what torch.nn judges (unbatched, wrong channels) are left to it.
        normalised = torch.nn.modules.instancenorm._InstanceNorm.forward(self, input)
        summed = normalised if residual is None else normalised + residual
        if act is not None:
            activated: Tensor = act(summed)
            return activated
        slope = self.slope if self.activation == "prelu" else None
        return activate(summed, self.activation, self.negative_slope, slope)


class InstanceNormAct2d(_InstanceNormAct, torch.nn.InstanceNorm2d):
    r"""A drop-in replacement of :class:`torch.nn.InstanceNorm2d` with an activation behind it, in one pass.

    .. math:: y = \mathrm{act}\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    with mean and biased variance per sample and channel. Channels-last input is not copied. Arguments beyond the stock
    ones as in `BatchNormAct2d`; scale and shift per sample (adaptive instance norm):
    `fuseblock.functional.instance_norm_act`. With ``track_running_stats``, a residual or without a batch dimension PyTorch's
    own norm runs, and what is behind it in passes of its own.

    Shape: ``input`` and ``residual`` (N, C, H, W) or (C, H, W); so is the output.

    Raises:
        ValueError: an unknown activation; an input that is neither; a residual of another shape or device; one value per
            sample and channel in training.
    """


class InstanceNormAct1d(_InstanceNormAct, torch.nn.InstanceNorm1d):
    """`InstanceNormAct2d` for (N, C, L): a drop-in replacement of `torch.nn.InstanceNorm1d`."""


class BiasAct2d(torch.nn.Module):
    r"""Bias, activation, gain and clamp in one pass, for convolutions without bias and norm.

    .. math:: y = \mathrm{clamp}(g \cdot \mathrm{act}(x + b), -c, c)

    Args:
        num_features: channels C.
        activation, negative_slope: as in `BatchNormAct2d`; prelu has a parameter ``slope`` (1,).
        gain, clamp: g and c; None does not clamp.

    Shape: (N, C, H, W) or any (N, C, ...); the output alike. Parameter: ``bias`` (C,), zeros at first.
    """

    def __init__(
        self,
        num_features: int,
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        gain: float = 1.0,
        clamp: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_activation("BiasAct2d", activation, torch.empty(1) if activation == "prelu" else None, 1)
        self.num_features, self.activation, self.negative_slope = num_features, activation, negative_slope
        self.gain, self.clamp = gain, clamp
        self.bias = torch.nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        slope = torch.full((1,), 0.25, device=device, dtype=dtype) if activation == "prelu" else None
        self.slope: torch.nn.Parameter | None
        self.register_parameter("slope", None if slope is None else torch.nn.Parameter(slope))

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return functional.bias_act(
            input,
            self.bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            slope=self.slope,
            gain=self.gain,
            clamp=self.clamp,
        )

    def extra_repr(self) -> str:
        """Its arguments."""
        return (
            f"{self.num_features}, activation={self.activation}, negative_slope={self.negative_slope}, "
            f"gain={self.gain}, clamp={self.clamp}"
        )
