"""Mistakes that users make, at every public function and module of the GAN half: each is refused, and says what is wrong.

Wrong channels or sizes, one value per channel in training, wrong groups, tensors on several devices; values that are not
finite are no mistake, and travel as in plain PyTorch. That a name is in the table is tested; the tests of each operator
hold further mistakes (dtypes, ranks, options).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fuseblock
from fuseblock import functional, gan
from fuseblock import nn as fnn

from .ops.test_upfirdn2d import composite

META = torch.device("meta")


def t(*shape: int, device: Any = None) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=device).view(shape)


def m(*shape: int) -> Tensor:
    return t(*shape, device=META)


X, ROW = t(2, 3, 4, 4), t(2, 3, 4)
Call = Callable[[], Any]


def conv_mistakes(name: str, *, ones: tuple[int, ...]) -> dict[str, tuple[Call, Any, str]]:
    """Of a functional convolution; ``ones``: its spatial dimensions as kernel sizes."""
    run = getattr(functional, name)
    transposed = "transpose" in name
    x = t(2, 4, *(5 for _ in ones))
    size = (3,) * len(ones)
    weight, wrong = ((4, 2, *size), (3, 2, *size)) if transposed else ((2, 4, *size), (2, 3, *size))
    return {
        "channels": (lambda: run(x, t(*wrong)), RuntimeError, "channels"),
        "groups": (lambda: run(x, t(*weight), groups=3), RuntimeError, "groups=3"),
        "device of weight": (
            lambda: run(x, m(*weight)), RuntimeError, "expected weight on cpu, as input, got meta"
        ),
        "device of input": (
            lambda: run(x.to(META), t(*weight)), RuntimeError, "expected weight on meta, as input, got cpu"
        ),
        "device of bias": (
            lambda: run(x, t(*weight), m(2)), RuntimeError, "expected bias on cpu, as input, got meta"
        ),
    }  # fmt: skip


def layer_mistakes(cls: type, x: Tensor, groups: int = 2) -> dict[str, tuple[Call, Any, str]]:
    """Of a convolution or a block of one."""
    return {
        "channels": (lambda: cls(4, 6, 3)(x), RuntimeError, "channels"),
        "groups": (
            lambda: cls(3, 6, 3, groups=groups),
            ValueError,
            "in_channels must be divisible by groups",
        ),
        "device": (lambda: cls(3, 6, 3, device=META)(x), RuntimeError, "on cpu, as input, got meta"),
    }


def norm_mistakes(cls: type, x: Tensor, **affine: bool) -> dict[str, tuple[Call, Any, str]]:
    one = x[:1, :, :1] if x.dim() == 3 else x[:1, :, :1, :1]
    return {
        "channels": (lambda: cls(4, **affine)(x), ValueError, r"\(4,\)|\(4\), but got: 3"),
        "one value": (lambda: cls(3, **affine)(one), ValueError, "more than 1 value per channel"),
        "device": (lambda: cls(3, device=META, **affine)(x), ValueError, "on cpu, as x, got meta"),
        "residual": (lambda: cls(3, **affine)(x, x[..., :2]), ValueError, "residual of the shape of"),
        "device of residual": (lambda: cls(3, **affine)(x, x.to(META)), ValueError, "residual on cpu"),
    }


def two_devices(run: Callable[..., Any], first: Tensor, second: Tensor) -> dict[str, tuple[Call, Any, str]]:
    return {"device": (lambda: run(first, second.to(META)), ValueError, "one device, got cpu and meta")}


def loss_mistakes(name: str) -> dict[str, tuple[Call, Any, str]]:
    found = {"empty": (lambda: getattr(gan, name)(t(0), t(0)), ValueError, "at least one logit")}
    if "discriminator" in name or "relativistic" in name:
        found |= two_devices(getattr(gan, name), t(4), t(4)) | {
            "device": (lambda: getattr(gan, name)(t(4), m(4)), ValueError, "on one device, got .*meta")
        }
    return found


def module_mistakes(name: str) -> dict[str, tuple[Call, Any, str]]:
    loss = getattr(gan, name)()
    return {"device": (lambda: loss(t(4), m(4)), ValueError, "on one device, got cpu and meta")}


def filter_mistakes(run: Callable[..., Tensor]) -> dict[str, tuple[Call, Any, str]]:
    return {
        "channels": (lambda: run(ROW, t(3, 3)), ValueError, r"x of shape \(N, C, H, W\)"),
        "device": (lambda: run(X, m(3, 3)), ValueError, "x and f on one device, got cpu and meta"),
    }


def critic(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def conv_critic() -> nn.Module:
    return fnn.Conv2d(3, 1, 4, device=META)


WEIGHT, U, V = t(3, 4), t(3), t(4)
MISTAKES: dict[str, dict[str, tuple[Call, Any, str]]] = {
    "functional.batch_norm_act": {
        "channels": (lambda: functional.batch_norm_act(X, t(4)), ValueError, r"weight of shape \(3,\), got \(4,\)"),
        "one value": (lambda: functional.batch_norm_act(X[:1, :, :1, :1]), ValueError, "more than 1 value per channel"),
        "device": (lambda: functional.batch_norm_act(X, m(3)), ValueError, "weight on cpu, as x, got meta"),
        "device of slope": (
            lambda: functional.batch_norm_act(X, slope=m(3), activation="prelu"), ValueError, "slope on cpu"
        ),
        "device of residual": (lambda: functional.batch_norm_act(X, residual=X.to(META)), ValueError, "residual on cpu"),
        "running channels": (
            lambda: functional.batch_norm_act(X, running_mean=t(4), running_var=t(4)), ValueError, "running_mean of shape"
        ),
        "running channels, eval": (
            lambda: functional.batch_norm_act(X, running_mean=t(4), running_var=t(4), training=False),
            ValueError,
            r"mean of shape \(3,\), got \(4,\)",
        ),
        "running device": (
            lambda: functional.batch_norm_act(X, running_mean=t(3), running_var=m(3)), ValueError, "running_var on cpu"
        ),
    },
    "functional.instance_norm_act": {
        "channels": (lambda: functional.instance_norm_act(X, t(4)), ValueError, r"weight of shape \(3,\) or \(2, 3\)"),
        "samples": (lambda: functional.instance_norm_act(X, None, t(3, 3)), ValueError, r"bias of shape .* got \(3, 3\)"),
        "one value": (lambda: functional.instance_norm_act(X[..., :1, :1]), ValueError, "more than 1 value per channel"),
        "device": (lambda: functional.instance_norm_act(X, m(2, 3)), ValueError, "weight on cpu, as x, got meta"),
    },
    "functional.bias_act": {
        "channels": (lambda: functional.bias_act(X, t(4)), ValueError, r"bias of shape \(3,\), got \(4,\)"),
        "device": (lambda: functional.bias_act(X, m(3)), ValueError, "x and bias on one device, got cpu and meta"),
        "device of slope": (
            lambda: functional.bias_act(X, slope=m(3), activation="prelu"), ValueError, "x and slope on one device"
        ),
    },
    "functional.conv1d": conv_mistakes("conv1d", ones=(1,)),
    "functional.conv2d": conv_mistakes("conv2d", ones=(1, 1)),
    "functional.conv_transpose1d": conv_mistakes("conv_transpose1d", ones=(1,)),
    "functional.conv_transpose2d": conv_mistakes("conv_transpose2d", ones=(1, 1)),
    "functional.conv2d_act": {
        "channels": (lambda: functional.conv2d_act(X, t(5, 4, 3, 3)), ValueError, r"x of shape \(N, 4, H, W\)"),
        "device": (lambda: functional.conv2d_act(X, m(5, 3, 3, 3)), ValueError, "weight on cpu, got meta"),
        "device of bias": (lambda: functional.conv2d_act(X, t(5, 3, 3, 3), m(5)), ValueError, "bias on cpu, got meta"),
    },
    "functional.conv_transpose2d_act": {
        "channels": (
            lambda: functional.conv_transpose2d_act(X, t(4, 5, 4, 4)), ValueError, r"x of shape \(N, 4, H, W\)"
        ),
        "device": (lambda: functional.conv_transpose2d_act(X, m(3, 5, 4, 4)), ValueError, "weight on cpu, got meta"),
        "device of bias": (
            lambda: functional.conv_transpose2d_act(X, t(3, 5, 4, 4), m(5)), ValueError, "bias on cpu, got meta"
        ),
    },
    "functional.conv2d_stats": {
        "channels": (lambda: functional.conv2d_stats(X, t(5, 4, 3, 3)), ValueError, r"x of shape \(N, 4, H, W\)"),
        "device": (lambda: functional.conv2d_stats(X, m(5, 3, 3, 3)), ValueError, "weight on cpu, got meta"),
        "device of bias": (lambda: functional.conv2d_stats(X, t(5, 3, 3, 3), m(5)), ValueError, "bias on cpu, got meta"),
    },
    "functional.conv_transpose2d_subpixel": {
        "channels": (
            lambda: functional.conv_transpose2d_subpixel(X, t(4, 5, 4, 4)), ValueError, r"x of shape \(N, 4, H, W\)"
        ),
        "device": (
            lambda: functional.conv_transpose2d_subpixel(X, m(3, 5, 4, 4)), ValueError, "weight on cpu, got meta"
        ),
        "device of bias": (
            lambda: functional.conv_transpose2d_subpixel(X, t(3, 5, 4, 4), m(5)), ValueError, "bias on cpu, got meta"
        ),
    },
    "functional.upfirdn2d": filter_mistakes(functional.upfirdn2d),
    "functional.filter2d": filter_mistakes(functional.filter2d),
    "functional.upsample2d": filter_mistakes(functional.upsample2d),
    "functional.downsample2d": filter_mistakes(functional.downsample2d),
    "functional.minibatch_stddev": {
        "channels": (lambda: functional.minibatch_stddev(X, 2, 2), ValueError, "multiple of num_channels=2, got 3"),
        "groups": (lambda: functional.minibatch_stddev(t(6, 3, 4, 4)), ValueError, "multiple of group_size=4, got 6"),
    },
    "functional.spectral_norm": {
        "sizes": (lambda: functional.spectral_norm([WEIGHT], [V], [U]), ValueError, "u of its output channels"),
        "dim": (lambda: functional.spectral_norm([WEIGHT], [U], [V], dims=[2]), ValueError, "dim to be one of the 2"),
        "dtype": (lambda: functional.spectral_norm([WEIGHT.long()], [U], [V]), TypeError, "floating point or complex"),
        "device of u": (lambda: functional.spectral_norm([WEIGHT], [m(3)], [V]), ValueError, "us and vs on cpu"),
        "device of v": (lambda: functional.spectral_norm([WEIGHT], [U], [m(4)]), ValueError, "us and vs on cpu"),
        "devices of weights": (
            lambda: functional.spectral_norm([WEIGHT, m(3, 4)], [U, m(3)], [V, m(4)]), ValueError, "as the first weight"
        ),
    },
    "nn.BatchNormAct1d": norm_mistakes(fnn.BatchNormAct1d, ROW),
    "nn.BatchNormAct2d": norm_mistakes(fnn.BatchNormAct2d, X),
    "nn.BatchNormAct3d": norm_mistakes(fnn.BatchNormAct3d, t(2, 3, 1, 1, 4)) | {
        "one value": (lambda: fnn.BatchNormAct3d(3)(t(1, 3, 1, 1, 1)), ValueError, "more than 1 value per channel")
    },
    "nn.InstanceNormAct1d": norm_mistakes(fnn.InstanceNormAct1d, ROW, affine=True),
    "nn.InstanceNormAct2d": norm_mistakes(fnn.InstanceNormAct2d, X, affine=True),
    "nn.BiasAct2d": {
        "channels": (lambda: fnn.BiasAct2d(4)(X), ValueError, r"bias of shape \(3,\), got \(4,\)"),
        "device": (lambda: fnn.BiasAct2d(3, device=META)(X), ValueError, "x and bias on one device"),
    },
    "nn.LeakyReLU": {"dtype": (lambda: fnn.LeakyReLU()(X.long()), (TypeError, NotImplementedError), "int64|Long")},
    "nn.Conv1d": layer_mistakes(fnn.Conv1d, ROW),
    "nn.Conv2d": layer_mistakes(fnn.Conv2d, X),
    "nn.ConvTranspose1d": layer_mistakes(fnn.ConvTranspose1d, ROW),
    "nn.ConvTranspose2d": layer_mistakes(fnn.ConvTranspose2d, X),
    "nn.Conv1dBlock": layer_mistakes(fnn.Conv1dBlock, ROW),
    "nn.Conv2dBlock": layer_mistakes(fnn.Conv2dBlock, X) | {
        "one value": (lambda: fnn.Conv2dBlock(3, 4, 4)(X[:1]), ValueError, "more than 1 value per channel")
    },
    "nn.ConvTranspose1dBlock": layer_mistakes(fnn.ConvTranspose1dBlock, ROW),
    "nn.ConvTranspose2dBlock": layer_mistakes(fnn.ConvTranspose2dBlock, X),
    "nn.ResidualBlock2d": {
        "channels": (lambda: fnn.ResidualBlock2d(4)(X), RuntimeError, "channels"),
        "one value": (lambda: fnn.ResidualBlock2d(3)(X[:1, :, :1, :1]), ValueError, "more than 1 value per channel"),
        "device": (lambda: fnn.ResidualBlock2d(3, device=META)(X), RuntimeError, "on cpu, as input, got meta"),
    },
    "nn.spectral_norm": {
        "dim": (lambda: fnn.spectral_norm(fnn.Conv2d(3, 4, 3), dim=4), ValueError, "dim to be one of the 4"),
        "device": (
            lambda: fnn.spectral_norm(fnn.Conv2d(3, 4, 3, device=META))(X), RuntimeError, "on cpu, as input, got meta"
        ),
    },
    "nn.remove_spectral_norm": {"none": (lambda: fnn.remove_spectral_norm(nn.ReLU()), ValueError, "not applied")},
    "nn.fold_batch_norm": {
        "mode": (lambda: fnn.fold_batch_norm(nn.Sequential()), ValueError, "eval mode"),
    },
    **{f"gan.{name}": loss_mistakes(name) for name in gan.__all__ if name.endswith("_loss")},
    **{f"gan.{cls.__name__}": module_mistakes(cls.__name__) for cls in gan.LOSSES.values()},
    "gan.interpolate": {
        "sizes": (lambda: gan.interpolate(X, X[:1]), ValueError, "one shape"),
        "device": (lambda: gan.interpolate(X, X.to(META)), ValueError, "one device, got cpu and meta"),
    },
    "gan.r1_penalty": {
        "empty": (lambda: gan.r1_penalty(critic, X[:0]), ValueError, "samples of shape"),
        "device": (lambda: gan.r1_penalty(conv_critic(), X), RuntimeError, "on cpu, as input, got meta"),
    },
    "gan.r2_penalty": {
        "empty": (lambda: gan.r2_penalty(critic, X[:0]), ValueError, "samples of shape"),
        "device": (lambda: gan.r2_penalty(conv_critic(), X), RuntimeError, "on cpu, as input, got meta"),
    },
    "gan.wgan_gp_penalty": {
        "sizes": (lambda: gan.wgan_gp_penalty(critic, X, X[:1]), ValueError, "one shape"),
        "device": (lambda: gan.wgan_gp_penalty(critic, X, X.to(META)), ValueError, "one device"),
    },
    "gan.path_length_penalty": {
        "sizes": (lambda: gan.path_length_penalty(X, t(3, 5), 0.0), ValueError, r"images \(N, C, H, W\) and latents"),
        "independent": (lambda: gan.path_length_penalty(X, t(2, 5), 0.0), RuntimeError, "does not require grad"),
    },
    "gan.squared_gradient_norm": {
        "independent": (lambda: gan.squared_gradient_norm(t(2), X), RuntimeError, "does not require grad")
    },
    "gan.R1Penalty": {"empty": (lambda: gan.R1Penalty()(critic, X[:0]), ValueError, "samples of shape")},
    "gan.R2Penalty": {"empty": (lambda: gan.R2Penalty()(critic, X, X[:0]), ValueError, "samples of shape")},
    "gan.WGANGPPenalty": two_devices(lambda a, b: gan.WGANGPPenalty()(critic, a, b), X, X),
    "gan.PathLengthPenalty": {"sizes": (lambda: gan.PathLengthPenalty()(X, t(3, 5)), ValueError, "latents")},
    "gan.ExponentialMovingAverage": {
        "sizes": (
            lambda: gan.ExponentialMovingAverage(nn.Linear(2, 2)).update(nn.Linear(2, 3)), ValueError, "other tensors"
        ),
        "device": (
            lambda: gan.ExponentialMovingAverage(nn.Linear(2, 2)).update(nn.Linear(2, 2, device=META)),
            RuntimeError,
            "device",
        ),
    },
    "gan.DCGANGenerator": {
        "size": (lambda: gan.DCGANGenerator(12), ValueError, "power of two"),
        "channels": (lambda: gan.DCGANGenerator(8, width=2)(t(2, 99)), ValueError, r"latents \(N, 100\)"),
        "device": (lambda: gan.DCGANGenerator(8, width=2)(m(2, 100)), RuntimeError, "on meta, as input, got cpu"),
    },
    "gan.DCGANDiscriminator": {
        "channels": (lambda: gan.DCGANDiscriminator(8, width=2)(X), ValueError, r"images \(N, 3, 8, 8\)"),
        "device": (
            lambda: gan.DCGANDiscriminator(8, width=2)(m(2, 3, 8, 8)), RuntimeError, "on meta, as input, got cpu"
        ),
    },
    "gan.ResNetGenerator": {
        "channels": (lambda: gan.ResNetGenerator(8, width=2)(t(2, 99)), ValueError, r"latents \(N, 128\)")
    },
    "gan.ResNetDiscriminator": {
        "channels": (lambda: gan.ResNetDiscriminator(8, width=2)(X), ValueError, r"images \(N, 3, 8, 8\)"),
    },
}  # fmt: skip
#: They take no tensors, any tensor, or any model.
WITHOUT = {
    "nn.ReLU",
    "nn.Sequential",
    "gan.LOSSES",
    "gan.AdversarialLoss",
    "gan.AdversarialLosses",
    "gan.init_dcgan",
    "gan.init_sngan",
}


def test_every_public_name_is_here() -> None:
    rooms = {"functional": functional, "nn": fnn, "gan": gan}
    public = {f"{room}.{name}" for room, module in rooms.items() for name in module.__all__}
    lstm = {name for name in public if "lstm" in name.lower()}  # tests/nn/test_errors.py
    assert MISTAKES.keys() | WITHOUT == public - lstm


@pytest.mark.parametrize(("name", "mistake"), [(n, k) for n, kinds in MISTAKES.items() for k in kinds])
def test_it_is_refused(name: str, mistake: str) -> None:
    call, error, message = MISTAKES[name][mistake]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_batch_leaves_running_statistics_alone() -> None:
    norm = fnn.BatchNormAct2d(3)
    before = copy.deepcopy(norm.state_dict())
    for wrong in (t(2, 4, 3, 3), t(1, 3, 1, 1), m(2, 3, 3, 3)):
        with pytest.raises(ValueError, match="expected"):
            norm(wrong)
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])


# ---- not finite ----------------------------------------------------------------------------------------------------


def penalised(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The penalty's gradient by the first convolution, of a critic with this norm."""

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        of = fnn.Conv2d if isinstance(norm, fnn.BatchNormAct2d) else nn.Conv2d
        model = nn.Sequential(of(3, 4, 3), copy.deepcopy(norm), nn.Tanh(), of(4, 1, 2))
        gan.r1_penalty(model, x).backward()
        return model[0].weight.grad

    return run


def spread(x: Tensor) -> Tensor:
    return torch.cat([x, x.std(0, correction=0).mean().expand(len(x), 1, *x.shape[2:])], 1)


KERNEL = t(3, 4, 4, 4)
TRAVELS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "batch_norm_act": (
        lambda x: functional.batch_norm_act(x, activation="silu"),
        lambda x: F.silu(F.batch_norm(x, None, None, training=True)),
    ),
    "instance_norm_act": (
        lambda x: functional.instance_norm_act(x, activation="elu"), lambda x: F.elu(F.instance_norm(x))
    ),
    "bias_act": (lambda x: functional.bias_act(x, t(3)), lambda x: x + t(3)[:, None, None]),
    "upfirdn2d": (lambda x: functional.upfirdn2d(x, t(3, 2), 2), lambda x: composite(x, t(3, 2), 2)),
    "conv2d": (lambda x: functional.conv2d(x, t(4, 3, 3, 3)), lambda x: F.conv2d(x, t(4, 3, 3, 3))),
    "conv_transpose2d": (
        lambda x: functional.conv_transpose2d(x, KERNEL), lambda x: F.conv_transpose2d(x, KERNEL)
    ),
    "conv2d_stats": (
        lambda x: functional.conv2d_stats(x, t(4, 3, 3, 3))[1:],
        lambda x: torch.var_mean(F.conv2d(x, t(4, 3, 3, 3)), (0, 2, 3))[::-1],
    ),
    "conv_transpose2d_subpixel": (
        lambda x: functional.conv_transpose2d_subpixel(x, KERNEL)[0],
        lambda x: F.conv_transpose2d(x, KERNEL, stride=2, padding=1),
    ),
    "minibatch_stddev": (lambda x: functional.minibatch_stddev(x, None), spread),
    "r1_penalty": (penalised(fnn.BatchNormAct2d(4)), penalised(nn.BatchNorm2d(4))),
    "Conv2dBlock": (
        lambda x: fnn.Conv2dBlock(3, 4, 3)(x),
        lambda x: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU())(x),
    ),
    "ResidualBlock2d": (
        lambda x: fnn.ResidualBlock2d(3)(x),
        lambda x: x + nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3))(x),
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", TRAVELS)
def test_what_is_not_finite_travels(name: str, value: float) -> None:
    """To the elements to which it travels in plain PyTorch, and to no others."""
    x = t(2, 3, 4, 4).clone()
    x[1, 1, 2, 1] = value
    ours, plain = ([*y] if isinstance(y := run(x), tuple) else [y] for run in TRAVELS[name])
    for got, want in zip(ours, plain, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        assert not got.isfinite().all()


def test_meta_models_can_be_normalised() -> None:
    """Deferred initialisation: building on the meta device is no mistake."""
    model = fuseblock.nn.spectral_norm(fnn.Conv2d(3, 4, 3, device=META))
    assert model(m(2, 3, 5, 5)).shape == (2, 4, 3, 3)
