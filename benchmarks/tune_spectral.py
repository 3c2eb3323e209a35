"""What `benchmarks.tune` measures of spectral norm: all weights of a model in one call, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.parity import Results
from benchmarks.tune_passes import OperatorQuestion
from benchmarks.tune_questions import Question, is_named, keyed
from fuseblock import gan
from fuseblock._library import state_dtype
from fuseblock.reference.spectral_norm import split_state

OPS = ("spectral_norm", "spectral_norm_bwd")
_EPS = 1e-12


@dataclass(frozen=True)
class SpectralCase:
    """The weights of a model.

    Attributes:
        name: what ``--case`` matches.
        shapes: of the weights, output channels first.
        channels_last: the layout of those of convolutions.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    channels_last: bool = True

    @property
    def elements(self) -> int:
        """Of all weights."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def size(self) -> str:
        """The sizes in one line."""
        layout = "channels-last" if self.channels_last else "contiguous"
        return f"{len(self.shapes)} weights of {self.elements} elements {layout}"


@dataclass(frozen=True)
class SpectralQuestion(OperatorQuestion):
    """A model's weights in a dtype; ``mode`` is ``train``, with a power iteration, or ``forward``, without."""

    case: SpectralCase  # type: ignore[assignment]

    @property
    def terms(self) -> int:
        """In the longest chain of sums: over a row or a column, and of a gradient over the whole weight."""
        return max(torch.Size(shape).numel() for shape in self.case.shapes)

    def args(self, device: str, seed: int) -> tuple[Any, ...]:
        """The operator's arguments.

        us and vs are updated by every call: they begin as singular vectors, which a power iteration leaves where they are.
        """
        torch.manual_seed(seed)
        weights, us, vs = map(
            list, zip(*(self._weight(shape, device) for shape in self.case.shapes), strict=True)
        )
        dims = [0] * len(weights)
        if self.op == "spectral_norm":
            return weights, us, vs, dims, int(self.mode == "train"), _EPS
        parts = [x for w, u, v in zip(weights, us, vs, strict=True) for x in (u, v, _sigma(w, u, v))]
        state = torch.cat(parts).to(state_dtype(self.dtype))
        return [torch.randn_like(w) for w in weights], weights, state, dims

    def _weight(self, shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
        """(w, u, v) of a weight whose largest singular value is far above the others."""
        layout = (
            torch.channels_last if self.case.channels_last and len(shape) == 4 else torch.contiguous_format
        )
        w = torch.empty(shape, device=device, dtype=self.dtype, memory_format=layout)
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        u, v = (torch.empty(n, device=device, dtype=self.dtype) for n in (rows, columns))
        if device == "meta":
            return w, u, v
        u, v = (normalize(x.double().normal_(), dim=0) for x in (u, v))
        noise = torch.randn(rows, columns, device=device)
        w.copy_((8 * (rows**0.5 + columns**0.5) * torch.outer(u, v) + noise).view(shape))
        matrix = w.flatten(1).double()
        for _ in range(12):
            u = normalize(matrix @ v, dim=0)
            v = normalize(matrix.t() @ u, dim=0)
        return w, u.to(self.dtype), v.to(self.dtype)

    def _named(self, run: Any, args: tuple[Any, ...]) -> Results:
        if self.op == "spectral_norm_bwd":
            return {f"dweight {n}": dw for n, dw in enumerate(run(*args))}
        (ys, state), (weights, _, _, dims, *_) = run(*args), args
        found = zip(ys, split_state(state, weights, dims), strict=True)
        return {
            f"{name} {n}": x
            for n, (y, uvs) in enumerate(found)
            for name, x in zip(("y", "u", "v", "sigma"), (y, *uvs), strict=True)
        }


def _sigma(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (u.double() @ w.flatten(1).double() @ v.double()).view(1)


def _shapes_of(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.shape) for p in model.parameters() if p.dim() > 1)


#: Evenly spread sizes, near enough to each other for every call between them (`fuseblock._tables.REACH`).
_WEIGHTS, _CHANNELS = (1, 4, 16, 64), (16, 64, 256, 1024)
#: Elements up to which these are combined.
_MOST = 1 << 26


def cases() -> list[SpectralCase]:
    """Models that users normalise, then evenly spread sizes."""
    with torch.device("meta"):
        models = {
            "sngan32": gan.ResNetDiscriminator(32, spectral=False),
            "sngan128": gan.ResNetDiscriminator(128, width=64, max_multiplier=16, spectral=False),
            "dcgan64": gan.DCGANDiscriminator(64),
        }
    shapes = {name: _shapes_of(model) for name, model in models.items()}
    shapes |= {
        f"spread-{count}x{channels}": ((channels, channels, 3, 3),) * count
        for count, channels in product(_WEIGHTS, _CHANNELS)
        if 9 * count * channels**2 <= _MOST
    }
    return [SpectralCase(name, found, last) for name, found in shapes.items() for last in (True, False)]


def questions(
    precisions: Iterable[str], patterns: list[str] | None = None
) -> list[tuple[Question, dict[str, Any]]]:
    """The questions with their keys, no key twice; arguments as in `tune_questions.questions`."""
    named = [case for case in cases() if is_named(case.name, patterns)]
    # PyTorch's settings of float32 say nothing: the products are with vectors.
    plain = [p for p in precisions if p not in ("tf32", "ieee")]
    return keyed(
        SpectralQuestion(op, case, mode, precision)
        for precision in plain
        for case in named
        for op in OPS
        for mode in (("train", "forward") if op == "spectral_norm" else ("train",))
    )
