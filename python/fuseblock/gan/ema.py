"""`ExponentialMovingAverage`: the averaged weights that a GAN's generator is sampled with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class ExponentialMovingAverage:
    """Averages of a model's parameters and buffers, updated after each optimizer step.

        average = decay average + (1 - decay) value

    Averages start as the model's values. Those of float16 and bfloat16 tensors are kept in float32: in 16 bit a
    step of 1e-3 would round to nothing. Integer and boolean buffers (``num_batches_tracked``) are copied, and so are the
    vectors u and v of spectral norm, PyTorch's and fuseblock's: an average of unit vectors is none. They are the last
    weights', so a spectral norm of averaged weights in eval mode is as good as these are near; a forward in training mode
    brings u and v nearer.

    Parameters and buffers are updated in lists, one for each dtype: on a GPU a few launches, not some for each tensor.

    The model is passed to each call and not kept, so averages can be copied (``copy.deepcopy``), pickled and moved to
    another process alone. Under DistributedDataParallel pass the module inside.

    Args:
        model: whose tensors to average, all parameters (frozen ones too) and buffers.
        decay: in [0, 1]; the average looks back about 1 / (1 - decay) updates.
        warmup: use min(decay, (1 + n) / (10 + n)) in update n = 0, 1, ..., so that the first values are forgotten
            soon (as tf.train.ExponentialMovingAverage with num_updates).
        buffers: "average" floating-point buffers (but for spectral norm's u and v), or "copy" all.

    Attributes:
        averages: name to tensor, as in ``named_parameters`` and ``named_buffers``.
        updates: how many there were.

    Raises:
        ValueError: a ``decay`` outside [0, 1], or ``buffers`` neither "average" nor "copy".

    Examples::

        >>> import torch, fuseblock
        >>> model = torch.nn.Linear(3, 2)
        >>> ema = fuseblock.gan.ExponentialMovingAverage(model, 0.99)
        >>> ema.update(model)
        >>> with ema.swapped_in(model):
        ...     y = model(torch.randn(1, 3))
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, *, warmup: bool = False, buffers: str = "average"
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers: expected 'average' or 'copy', got {buffers!r}")
        self.decay = decay
        self.warmup = warmup
        self.buffers = buffers
        self.updates = 0
        self.averages: dict[str, Tensor] = {
            name: tensor.detach().to(_kept_dtype(tensor), copy=True)
            for name, tensor in _tensors(model).items()
        }

    def current_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the model's present values enter the averages.

        Raises:
            ValueError: a model whose tensors have other names or shapes.
        """
        # A launch takes many tensors, but of one pair of dtypes.
        groups: dict[tuple[bool, torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        constant = _power_iteration_vectors(model)
        if self.buffers == "copy":
            constant = {name for name, _ in model.named_buffers()}
        for name, average, value in self._pairs(model):
            moves = (average.is_floating_point() or average.is_complex()) and name not in constant
            averages, values = groups.setdefault((moves, average.dtype, value.dtype), ([], []))
            averages.append(average)
            values.append(value)
        for (moves, own, given), (averages, values) in groups.items():
            if moves and own != given:
                wide = [torch.empty_like(average) for average in averages]
                torch._foreach_copy_(wide, values)
                values = wide
            if moves:
                torch._foreach_lerp_(averages, values, 1.0 - self.current_decay())
            else:
                torch._foreach_copy_(averages, values)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the model.

        Raises:
            ValueError: a model whose tensors have other names or shapes.
        """
        if pairs := self._pairs(model):
            torch._foreach_copy_([value for _, _, value in pairs], [average for _, average, _ in pairs])

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averages in its place, and its own values back at the end, after an exception too.

        Values are written in place: graphs recorded before cannot be differentiated any more. What happens to the
        model inside (buffers updated in training mode) is lost.

        Raises:
            ValueError: a model whose tensors have other names or shapes.
        """
        pairs = self._pairs(model)
        own = [value.detach().clone() for _, _, value in pairs]
        self.copy_to(model)
        try:
            yield model
        finally:
            with torch.no_grad():
                if own:
                    torch._foreach_copy_([value for _, _, value in pairs], own)

    def state_dict(self) -> dict[str, Any]:
        """The averages, not copied, and all settings."""
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "buffers": self.buffers,
            "updates": self.updates,
            "averages": dict(self.averages),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, on this object's devices.

        Raises:
            ValueError: averages of other names or shapes.
        """
        averages = state["averages"]
        self._check({name: tuple(tensor.shape) for name, tensor in averages.items()}, "the state")
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.decay, self.warmup = float(state["decay"]), bool(state["warmup"])
        self.buffers, self.updates = str(state["buffers"]), int(state["updates"])

    def _check(self, shapes: Mapping[str, tuple[int, ...]], whose: str) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in self.averages.items()}
        if own != shapes:
            wrong = sorted(set(own.items()) ^ set(shapes.items()))
            raise ValueError(f"{whose} has other tensors than the averages: {', '.join(map(str, wrong[:4]))}")

    def _pairs(self, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        tensors = _tensors(model)
        self._check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "the model")
        return [(name, average, tensors[name]) for name, average in self.averages.items()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _power_iteration_vectors(model: nn.Module) -> set[str]:
    """Names of the buffers u and v of spectral norm, PyTorch's (parametrization and hook) and fuseblock's."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, parametrizations._SpectralNorm):
            vectors = ["_u", "_v"]
        else:
            weights = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
            vectors = [f"{name}_{vector}" for name in weights for vector in "uv"]
        names.update(f"{prefix}.{vector}" if prefix else vector for vector in vectors)
    return names


def _kept_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
