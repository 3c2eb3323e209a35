"""Instance normalisation with its activation: batch normalisation of every sample's channels."""

from __future__ import annotations

from torch import Tensor

from .. import _batch_norm_node, dispatch, ops
from ..launch.batch_norm_act import folding
from ..reference.batch_norm_act import batch_norm_act_reference
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

    with mean and (biased) var over the pixels of every sample and channel, in float32 (float64 for float64). Contiguous and
    channels-last input is not copied.

    Args:
        x: (N, C, ...), contiguous or channels-last, which y keeps; other layouts are copied.
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
    if x.numel() == samples * channels > 0:
        raise ValueError(
            "instance_norm_act: expected more than 1 value per channel and sample, "
            f"got x of shape {tuple(x.shape)}"
        )

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
    weight, bias = rows(weight, "weight"), rows(bias, "bias")
    if x.is_contiguous() or samples == 1 or not x.movedim(1, -1).is_contiguous():
        # A batch of one, whose channels are those of all samples.
        y = batch_norm_act(
            x.reshape(1, samples * channels, *x.shape[2:]),
            weight,
            bias,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            slope=slope,
        )
        return y.view(x.shape)
    return _channels_last(x, weight, bias, slope, eps, activation, negative_slope)


def _channels_last(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Instance norm of channels-last x; weight, bias and slope (N C,), slope also (1,)."""
    tensors, options = (x, weight, bias, None, slope, None, None), (activation, True, "", True)
    if _batch_norm_node.can_run(x, tensors[1:5], (None, None)):
        ops.check_batch_norm_act(*tensors, *options)
        none = None, None
        return _batch_norm_node.run(
            *tensors[:5], none, none, 0.0, eps, activation, negative_slope, training=True, per_sample=True
        )
    args = *tensors, eps, activation, negative_slope, True, "", False, True
    if not dispatch.plain_pytorch():
        return ops.batch_norm_act(*args)[0]  # type: ignore[no-any-return]
    args = ops.batch_norm_act.cast_for_autocast(args)
    ops.check_batch_norm_act(*args[:7], *options)
    return folding(batch_norm_act_reference)(*args)[0]  # type: ignore[no-any-return]
