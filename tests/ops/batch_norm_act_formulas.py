"""The six kernel functions of batch_norm_act as plain formulas, their operands, and the comparison with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseblock._activations import NAMES, activate
from fuseblock.launch.batch_norm_act import Site

from .bounds import error_ratio, poisoned_outputs, relative_error, state_dtype

SMOOTH = ("silu", "tanh", "elu")
NEGATIVE_SLOPE = 0.3


@dataclass(frozen=True)
class Case:
    """One call of each kernel.

    Attributes:
        shape: of x.
        channels_last: memory format of x.
        saved: None, ``residual`` or ``mask``: what forward has left of the residual.
        one_slope: prelu with one slope for all channels.
    """

    shape: tuple[int, ...]
    channels_last: bool
    activation: str
    dtype: torch.dtype = torch.float64
    affine: bool = True
    saved: str | None = None
    one_slope: bool = False
    offset: int = 0

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), "last" if self.channels_last else "first", self.activation]
        words += [
            str(self.dtype)[6:],
            *(["plain"] if not self.affine else []),
            *([self.saved] if self.saved else []),
        ]
        return "-".join(words + ["one"] * self.one_slope + ["misaligned"] * bool(self.offset))

    def elements(self, seed: int) -> Tensor:
        """Random values of x's shape, dtype and memory format; `offset` elements behind an aligned address."""
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.arranged(values.to(self.dtype))

    def arranged(self, values: Tensor) -> Tensor:
        order = list(range(len(self.shape)))
        if self.channels_last:
            order.append(order.pop(1))
        storage = torch.empty(values.numel() + self.offset, dtype=values.dtype)[self.offset :]
        result = storage.view([self.shape[d] for d in order]).permute(
            [order.index(d) for d in range(len(order))]
        )
        return result.copy_(values)

    def flat(self, x: Tensor) -> Tensor:
        """The elements in memory order."""
        return (x.movedim(1, -1) if self.channels_last else x).reshape(-1)

    def unflat(self, values: Tensor) -> Tensor:
        """The elements of x's shape that lie like that in memory."""
        if not self.channels_last:
            return values.view(self.shape)
        return values.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)

    def site(self) -> tuple[Site, Tensor | None]:
        """The description of a normalisation that the kernels get, and the bits behind its mask."""
        c, state = self.shape[1], state_dtype(self.dtype)
        generator = torch.Generator().manual_seed(1)

        def channel(scale: float = 1.0, shift: float = 0.0, count: int = c) -> Tensor:
            return (torch.randn(count, generator=generator, dtype=torch.float64) * scale + shift).to(state)

        bits = None
        if self.saved == "mask":
            # Bits that have nothing to do with z: they must be what counts.
            bits = torch.randint(0, 2, (math.prod(self.shape),), generator=generator, dtype=torch.bool)
        site = Site(
            x=self.elements(0),
            mean=channel(0.3),
            invstd=channel(0.1, 1.2),
            weight=channel(0.5, 1.0) if self.affine else None,
            bias=channel(0.5) if self.affine else None,
            residual=self.elements(2) if self.saved == "residual" else None,
            mask=None if bits is None else packed(bits),
            slope=channel(0.3, count=1 if self.one_slope else c) if self.activation == "prelu" else None,
            activation=NAMES.index(self.activation),
            negative_slope=NEGATIVE_SLOPE,
        )
        return site, None if bits is None else self.unflat(bits)


def packed(bits: Tensor) -> Tensor:
    """One bit an element, the lowest of a byte first."""
    padded = torch.nn.functional.pad(bits.long(), (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8)).sum(1).to(torch.uint8)


class Formulas:
    """The formulas at one site, in one dtype."""

    def __init__(self, site: Site, positive: Tensor | None, dtype: torch.dtype) -> None:
        def per_channel(x: Tensor | None, otherwise: float) -> Tensor:
            if x is None:
                return torch.tensor(otherwise, dtype=dtype)
            return x.to(dtype).view(1, -1, *[1] * (site.x.dim() - 2))

        #: Of every sum, the sum of absolute values: the scale of its rounding error. None where nothing was summed.
        self.magnitudes: Tensor | None = None
        self.per_channel, self.dtype, self.name = per_channel, dtype, NAMES[site.activation]
        self.x = site.x.to(dtype)
        self.xhat = (self.x - per_channel(site.mean, 0)) * per_channel(site.invstd, 1)
        self.z = self.xhat * per_channel(site.weight, 1) + per_channel(site.bias, 0)
        if site.residual is not None:
            self.z = self.z + site.residual.to(dtype)
        z = self.z.detach().requires_grad_()
        self.slope = per_channel(site.slope, 0)
        self.y = activate(z, self.name, site.negative_slope, self.slope)
        (self.grad,) = torch.autograd.grad(self.y.sum(), z, create_graph=self.name in SMOOTH)
        self.grad_grad = torch.zeros_like(self.z)
        if self.name in SMOOTH:
            (self.grad_grad,) = torch.autograd.grad(self.grad.sum(), z)
        elif positive is not None:
            low = 0.0 if self.name == "relu" else site.negative_slope
            self.grad = torch.where(positive, 1.0, torch.tensor(low, dtype=dtype))
        self.y, self.grad = self.y.detach(), self.grad.detach()

    def sums(self, *values: Tensor) -> Tensor:
        axes = [d for d in range(self.x.dim()) if d != 1]
        self.magnitudes = torch.stack([v.abs().sum(axes) for v in values])
        return torch.stack([v.sum(axes) for v in values])

    def stats(self) -> Tensor:
        n = self.x.numel() // self.x.shape[1]
        var, mean = torch.var_mean(self.x, [d for d in range(self.x.dim()) if d != 1], correction=0)
        self.magnitudes = torch.stack([var.sqrt(), var * n])
        return torch.stack([mean, var * n])

    def bwd_reduce(self, dy: Tensor) -> Tensor:
        g = dy * self.grad
        more = [dy * self.z.clamp(max=0)] if self.name == "prelu" else []
        return self.sums(g, g * self.xhat, *more)

    def bwd_apply(self, dy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        g = dy * self.grad
        k0, k1, k2 = (self.per_channel(row, 0) for row in k)
        return k0 * g + k1 + k2 * self.xhat, g

    def _h(self, dy: Tensor) -> Tensor:
        return dy * (self.z <= 0) if self.name == "prelu" else dy * self.grad_grad

    def bwd_bwd_reduce(self, v: Tensor, v_r: Tensor | None, dy: Tensor) -> Tensor:
        g, xhat = dy * self.grad, self.xhat
        values = [v, v * xhat, g, g * xhat, g * v]
        if self.name in ("prelu", *SMOOTH):
            h = self._h(dy)
            values += [h, h * xhat, h * xhat**2, h * v, h * v * xhat]
            values += [] if v_r is None else [h * v_r, h * v_r * xhat]
        return self.sums(*values)

    def bwd_bwd_apply(self, v: Tensor, v_r: Tensor, dy: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k0, k1, k2, k3, k4, k5, k6, k7, k8 = (self.per_channel(row, 0) for row in k)
        g, xhat, h = dy * self.grad, self.xhat, self._h(dy)
        q = k0 * v + k1 + k2 * xhat + v_r
        a_dy, a_z = q * self.grad, h * q
        if self.name == "prelu":
            a_dy, a_z = a_dy + k3 * self.z.clamp(max=0), k3 * h
        return k4 * v + k5 * g + k6 * a_z + k7 + k8 * xhat, a_dy, a_z


def compare(
    names: str, got: Sequence[Tensor], site: Site, bits: Tensor | None, run: Any, longest_sum: int
) -> None:
    """Hold `got` to `run(formulas)` in float64; the error allowed is that of the formulas in the kernels' arithmetic."""
    exact, plain = Formulas(site, bits, torch.float64), Formulas(site, bits, state_dtype(site.x.dtype))
    values = zip(names.split(), got, run(exact), run(plain), strict=True)
    for n, (name, g, want, stock) in enumerate(values):
        assert g.shape == want.shape, f"{name}: {tuple(g.shape)}"
        if g.shape == site.x.shape:
            assert g.stride() == site.x.stride(), f"{name}: {g.stride()}"
        if exact.magnitudes is not None:
            # One more exact value, so that errors count in proportion to it: half a unit per level of a tree of additions.
            scale = (exact.magnitudes[n] * max(1.0, math.log2(longest_sum) / 2)).to(g.dtype)
            g, want, stock = (
                torch.cat([x.to(d), scale.to(d)])
                for x, d in ((g, g.dtype), (want, torch.float64), (stock, g.dtype))
            )
        ratio = error_ratio(g, want, relative_error(stock.to(g.dtype), want), longest_sum)
        assert ratio <= 1, f"{name}: error is {ratio:.3g} times the allowed one\n{g}\n{want}"


def check_all(kernels: Any, case: Case, device: str = "cpu") -> None:
    """Hold the six functions of `kernels` to the formulas."""
    site, bits = case.site()
    state, piecewise = state_dtype(case.dtype), case.activation not in SMOOTH
    count = case.shape[1]
    longest = site.x.numel() // count + 32
    on_device = Site(**{name: _to(device, value) for name, value in vars(site).items()})

    def called(function: Any, *args: Any) -> Any:
        with poisoned_outputs():
            result = function(*(on_device if a is site else _to(device, a) for a in args))
        return _to("cpu", result)

    def wide(x: Tensor | None, f: Formulas) -> Tensor:
        return torch.zeros_like(f.x) if x is None else x.to(f.dtype)

    def coefficients(rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, count, generator=generator, dtype=torch.float64).to(state)

    compare("mean m2", called(kernels.stats, site.x), site, bits, lambda f: f.stats(), longest)

    if case.saved != "mask":
        want_mask = case.saved == "residual" and piecewise and case.activation != "identity"
        y, mask = called(kernels.fwd_apply, site, want_mask)
        compare("y", [y], site, bits, lambda f: [f.y], 32)
        if want_mask:
            z = Formulas(site, bits, torch.float64).z
            sure = case.flat(z.abs() > 1e-5)
            want = packed(case.flat(z > 0) & sure)
            assert mask.dtype == torch.uint8
            assert torch.equal(mask & packed(sure), want), "bits of the mask"
            assert int(mask[-1]) >> ((z.numel() - 1) % 8 + 1) == 0, "bits behind the last element"
        else:
            assert mask is None

    dy, v, v_r = case.elements(3), case.elements(4), case.elements(5)
    got = called(kernels.bwd_reduce, dy, site)
    compare("s1 s2 s3"[: 3 * len(got)], got, site, bits, lambda f: f.bwd_reduce(wide(dy, f)), longest)

    k = coefficients(3)
    dx, dresidual = called(kernels.bwd_apply, dy, site, k, True)
    compare("dx dr", [dx, dresidual], site, bits, lambda f: f.bwd_apply(wide(dy, f), k), 32)
    alone, absent = called(kernels.bwd_apply, dy, site, k, False)
    assert absent is None
    assert torch.equal(alone, dx)

    k = coefficients(9)
    some = [(v, None), (None, v_r)] if case.activation in ("relu", "prelu", "silu") else []
    for cotangent, cotangent_r in [(v, v_r), *some]:
        got = called(kernels.bwd_bwd_reduce, cotangent, cotangent_r, dy, site)
        names = " ".join(f"sum{n}" for n in range(len(got)))
        compare(
            names, got, site, bits,
            lambda f, a=cotangent, b=cotangent_r: f.bwd_bwd_reduce(
                wide(a, f), None if b is None else wide(b, f), wide(dy, f)
            ),
            longest,
        )  # fmt: skip
        a_x, a_dy, a_residual = called(kernels.bwd_bwd_apply, cotangent, cotangent_r, dy, site, k)
        assert (a_residual is None) == (site.residual is None)
        outputs = [x for x in (a_x, a_dy, a_residual) if x is not None]
        if case.activation not in ("prelu", *SMOOTH):
            outputs = outputs[:2]  # a_z is zero, and nobody reads it

        def plain(f: Formulas, a: Any = cotangent, b: Any = cotangent_r, n: int = len(outputs)) -> Any:
            return f.bwd_bwd_apply(wide(a, f), wide(b, f), wide(dy, f), k)[:n]

        names = " ".join(["a_x", "a_dy", "a_residual"][: len(outputs)])
        compare(names, outputs, site, bits, plain, 32)


def _to(device: str, values: Any) -> Any:
    if isinstance(values, tuple):
        return tuple(_to(device, v) for v in values)
    return values.to(device) if isinstance(values, Tensor) else values
