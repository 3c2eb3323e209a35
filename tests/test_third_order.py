"""Third derivatives of every public function, on every backend: those of plain PyTorch, or refused; never silently wrong.

Three ways lead there: autograd three times, `torch.func` three times, and forward mode over `torch.func` twice. So it is
with forward mode over a graph that was recorded before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, grad

from fuseblock import functional, gan
from fuseblock._activations import NAMES, activate

from .ops.bounds import relative_error
from .ops.test_upfirdn2d import composite

NEGATIVE = 0.2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, ROW = normal(0, 2, 2, 3, 2), normal(1, 2)
IMAGE, KERNEL, FILTER = normal(2, 1, 2, 4, 3), normal(3, 2, 2, 2, 3), normal(4, 3, 2)


class Case(NamedTuple):
    """A function of tensors, plain PyTorch's for it, where to differentiate, and whether it may refuse."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    leaves: tuple[Tensor, ...]
    engines: tuple[str, ...] = ("auto", "reference", "cpu", "triton", "cuda")
    may_refuse: bool = False


def wide(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.view(-1, 1, 1)


def normed(x: Tensor, dims: tuple[int, ...], w: Tensor, b: Tensor, r: Any, name: str, slope: Any) -> Tensor:
    # Not F.batch_norm: its second derivative takes the saved statistics for constants, so that its third is wrong.
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    z = wide(w) * (x - mean) / (var + 1e-5).sqrt() + wide(b)
    return activate(z if r is None else z + r, name, NEGATIVE, wide(slope))


def batch_norm_case(name: str, residual: bool) -> Case:
    def split(rest: tuple[Tensor, ...]) -> tuple[Any, Any]:
        return (rest[0] if residual else None), (rest[-1] if name == "prelu" else None)

    def ours(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        r, slope = split(rest)
        return functional.batch_norm_act(x, w, b, r, activation=name, negative_slope=NEGATIVE, slope=slope)

    def plain(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        r, slope = split(rest)
        return normed(x, (0, 2, 3), w, b, r, name, slope)

    more = (normal(5, *X.shape),) * residual + (ROW.abs(),) * (name == "prelu")
    return Case(ours, plain, (X, ROW + 2, ROW, *more), may_refuse=True)


def eval_case(name: str) -> Case:
    mean, var = normal(6, 2), normal(7, 2).abs() + 1

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return functional.batch_norm_act(
            x, w, running_mean=mean, running_var=var, training=False, activation=name
        )

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return activate(wide(w) * (x - wide(mean)) / wide(var + 1e-5).sqrt(), name)

    return Case(ours, plain, (X, ROW + 2), may_refuse=True)


def instance_norm_case(name: str) -> Case:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last) if name == "silu" else x
        return functional.instance_norm_act(x, w, b, activation=name, negative_slope=NEGATIVE)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return normed(x, (2, 3), w, b, None, name, None)

    return Case(ours, plain, (X, ROW + 2, ROW), may_refuse=True)


def bias_act_case(name: str, clamp: float | None) -> Case:
    def ours(x: Tensor, b: Tensor, *slope: Tensor) -> Tensor:
        options = {"slope": slope[0] if slope else None, "gain": 1.3, "clamp": clamp}
        return functional.bias_act(x, b, activation=name, negative_slope=NEGATIVE, **options)

    def plain(x: Tensor, b: Tensor, *slope: Tensor) -> Tensor:
        y = 1.3 * activate(x + wide(b), name, NEGATIVE, wide(slope[0]) if slope else None)
        return y if clamp is None else y.clamp(-clamp, clamp)

    return Case(ours, plain, (X, ROW, *(ROW.abs(),) * (name == "prelu")))


def statistics(y: Tensor) -> tuple[Tensor, ...]:
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return y, mean, var


def vectors() -> tuple[Tensor, Tensor]:
    u = F.normalize(normal(8, 2), dim=0)
    return u, F.normalize(KERNEL.flatten(1).T @ u, dim=0)


def spectral(w: Tensor) -> Tensor:
    u, v = vectors()
    return functional.spectral_norm([w], [u], [v], n_power_iterations=0)[0]


def spectral_plain(w: Tensor) -> Tensor:
    u, v = vectors()
    return w / (u @ w.flatten(1) @ v)


def stddev_plain(x: Tensor) -> Tensor:
    s = (x.var(0, correction=0) + 1e-8).sqrt().mean()
    return torch.cat([x, s.expand(2, 1, 3, 2)], 1)


PLAIN, STATS = ("auto",), ("auto", "reference", "triton")
UP = normal(9, 2, 1, 4, 4)
CASES: dict[str, Case] = {
    **{f"batch_norm_act, {name}": batch_norm_case(name, False) for name in NAMES},
    **{f"batch_norm_act, {name}, residual": batch_norm_case(name, True) for name in ("relu", "prelu", "tanh")},
    **{f"batch_norm_act, {name}, eval": eval_case(name) for name in ("leaky_relu", "silu")},
    **{f"instance_norm_act, {name}": instance_norm_case(name) for name in ("leaky_relu", "silu")},
    **{f"bias_act, {name}": bias_act_case(name, None) for name in NAMES},
    **{f"bias_act, {name}, clamp": bias_act_case(name, 0.8) for name in ("leaky_relu", "prelu", "silu")},
    "conv2d": Case(
        lambda x, w, b: functional.conv2d(x, w, b, (1, 2), 1), lambda x, w, b: F.conv2d(x, w, b, (1, 2), 1),
        (IMAGE, KERNEL, ROW), PLAIN,
    ),
    "conv2d, groups": Case(
        lambda x, w: functional.conv2d(x, w, None, 1, 1, 2, 2), lambda x, w: F.conv2d(x, w, None, 1, 1, 2, 2),
        (IMAGE, KERNEL[:, :1]), PLAIN,
    ),
    "conv_transpose2d": Case(
        lambda x, w: functional.conv_transpose2d(x, w, None, 2, 1, 0, 2),
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 0, 2), (IMAGE, KERNEL), PLAIN,
    ),
    "conv1d": Case(
        lambda x, w: functional.conv1d(x, w), lambda x, w: F.conv1d(x, w), (IMAGE[..., 0], KERNEL[..., 0]), PLAIN
    ),
    "conv_transpose1d": Case(
        lambda x, w: functional.conv_transpose1d(x, w, stride=2), lambda x, w: F.conv_transpose1d(x, w, stride=2),
        (IMAGE[..., 0], KERNEL[..., 0]), PLAIN,
    ),
    "conv2d_stats": Case(
        lambda x, w, b: functional.conv2d_stats(x, w, b, 1, 1), lambda x, w, b: statistics(F.conv2d(x, w, b, 1, 1)),
        (IMAGE, KERNEL, ROW), STATS,
    ),
    "conv2d_stats behind a norm": Case(
        lambda x, w, b, s: functional.conv2d_stats(x, w, b, 1, 1, scale=s, shift=s + 1, activation="silu"),
        lambda x, w, b, s: statistics(F.conv2d(F.silu(x * wide(s) + wide(s + 1)), w, b, 1, 1)),
        (IMAGE, KERNEL, ROW, IMAGE[0, :, 0, 0]), STATS, may_refuse=True,
    ),
    "conv2d_act": Case(
        lambda x, w, b: functional.conv2d_act(x, w, b, 1, 1, activation="tanh"),
        lambda x, w, b: torch.tanh(F.conv2d(x, w, b, 1, 1)), (IMAGE, KERNEL, ROW), STATS,
    ),
    "conv_transpose2d_act": Case(
        lambda x, w: functional.conv_transpose2d_act(x, w, None, "leaky_relu"),
        lambda x, w: F.leaky_relu(F.conv_transpose2d(x, w, None, 2, 1), 0.2), (IMAGE[..., :2, :2], UP), STATS,
    ),
    "conv_transpose2d_subpixel": Case(
        functional.conv_transpose2d_subpixel, lambda x, w: statistics(F.conv_transpose2d(x, w, None, 2, 1)),
        (IMAGE[..., :2, :2], UP), STATS,
    ),
    "upfirdn2d": Case(
        lambda x: functional.upfirdn2d(x, FILTER, 2, 1, 1), lambda x: composite(x, FILTER, 2, 1, 1), (IMAGE,),
        ("auto", "reference", "cpu", "cuda"),
    ),
    "minibatch_stddev": Case(functional.minibatch_stddev, stddev_plain, (X,), PLAIN),
    "spectral_norm": Case(spectral, spectral_plain, (KERNEL,), ("auto", "aten", "reference", "cpu")),
    "losses": Case(
        lambda r, f: gan.relativistic_average_discriminator_loss(r, f) + gan.minimax_generator_loss(f),
        lambda r, f: F.softplus(f.mean() - r).mean() + F.softplus(f - r.mean()).mean() - F.softplus(f).mean(),
        (ROW, normal(9, 2)), PLAIN,
    ),
}  # fmt: skip


def loss_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar whose derivatives of all orders depend on all of the function's."""

    def loss(*leaves: Tensor) -> Tensor:
        y = function(*leaves)
        return sum((out.square() + out.pow(3) / 3).sum() for out in (y if isinstance(y, tuple) else (y,)))

    return loss


def by_autograd(function: Callable[..., Any], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
    first = grad(loss_of(function)(*leaves), leaves, create_graph=True)
    second = grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
    return list(grad(sum(g.square().sum() for g in second), leaves))


def gradient(loss: Callable[..., Tensor], count: int) -> Callable[..., Tensor]:
    def summed(*leaves: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(loss, tuple(range(count)))(*leaves))

    return summed


def by_func(function: Callable[..., Any], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    twice = gradient(gradient(loss_of(function), len(leaves)), len(leaves))
    return list(torch.func.grad(twice, tuple(range(len(leaves))))(*leaves))


def by_forward_mode(function: Callable[..., Any], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    twice = gradient(gradient(loss_of(function), len(leaves)), len(leaves))
    return [torch.func.jvp(twice, leaves, tuple(t.cos() for t in leaves))[1]]


def check(name: str, engine: str, derive: Callable[..., list[Tensor]]) -> None:
    case = CASES[name]
    want = derive(case.plain, case.leaves)
    assert any(t.any() for t in want)
    try:
        got = derive(case.ours, case.leaves)
    except NotImplementedError as refusal:
        if "fuseblock.backend('reference')" not in str(refusal):
            raise
        assert case.may_refuse, "composed of operations that have every derivative"
        assert engine != "reference", "there it is the way out"
        return
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10


RUNS = [
    pytest.param(name, engine, id=f"{name}-{engine}")
    for name, case in CASES.items()
    for engine in case.engines
]


@pytest.mark.parametrize(("name", "engine"), RUNS, indirect=["engine"])
def test_autograd_three_times(name: str, engine: str) -> None:
    check(name, engine, by_autograd)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("derive", [by_func, by_forward_mode])
def test_transforms(name: str, derive: Any) -> None:
    check(name, "auto", derive)


@pytest.mark.parametrize(
    ("name", "engine"), [run for run in RUNS if run.values[1] in ("auto", "cpu")], indirect=["engine"]
)
def test_cotangents_with_tangents(name: str, engine: str) -> None:
    """A backward is linear in dy: its tangent is the gradient at that of dy. It may be refused, but not left out."""
    case = CASES[name]
    leaves = tuple(t.detach().clone().requires_grad_() for t in case.leaves)
    y = case.ours(*leaves)
    y = y if isinstance(y, tuple) else (y,)
    tangents = [out.detach().cos() for out in y]
    want = grad(y, leaves, tangents, retain_graph=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(torch.ones_like(out), t) for out, t in zip(y, tangents, strict=True)]
        try:
            got = [forward_ad.unpack_dual(g).tangent for g in grad(y, leaves, duals)]
        except NotImplementedError as refusal:
            # Ours, or PyTorch's where it composes the function.
            if not any(
                t in str(refusal) for t in ("fuseblock.backend('reference')", "use forward AD with aten")
            ):
                raise
            return
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10
