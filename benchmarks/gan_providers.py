"""Who is measured on GAN cases: fuseblock after `fuseblock.fuse`; stock PyTorch eager, channels-last, with in-place
LeakyReLU, and compiled.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import model_measured
from benchmarks.gan_cases import GanCase
from benchmarks.gan_steps import Step, fused
from benchmarks.providers import COPY, Context


@dataclass(frozen=True)
class GanProblem:
    """A GAN case with its values: the stock model, its input and the cotangent of its output."""

    case: GanCase
    model: nn.Module
    x: Tensor
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> GanProblem:
        """The same values in another dtype."""
        return GanProblem(
            self.case, copy.deepcopy(self.model).to(dtype), self.x.to(dtype), self.grad_y.to(dtype)
        )


def make_problem(case: GanCase, *, dtype: torch.dtype, device: str, seed: int) -> GanProblem:
    """Build a case's model with its own initialisation and draw its input, rounded to ``dtype``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build()
        if case.spectral:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.utils.parametrizations.spectral_norm(module)
        model.to(device, dtype)
        x = torch.randn(case.batch, *case.shape).to(device, dtype)
        with torch.no_grad():
            grad_y = torch.randn_like(copy.deepcopy(model)(x))
    return GanProblem(case, model, x, grad_y)


def penalty_of(gradient: Tensor, kind: str) -> Tensor:
    """R1 (the mean squared norm) or WGAN-GP (the mean squared distance of the norm to 1)."""
    squares = gradient.flatten(1).square().sum(1)
    return squares.mean() if kind == "r1" else ((squares + 1e-12).sqrt() - 1).square().mean()


@dataclass
class BlockProvider:
    """One way to run a GAN case. The attributes are those of `benchmarks.providers.Provider`."""

    name: str
    peer: bool = True
    default: bool = True
    channels_last: bool = False
    compiled: bool = False
    inplace: bool = False
    graphed: bool = False
    backend: str | None = None
    yardstick: bool = False

    def why_not(self, case: GanCase, mode: str, device: str, dtype: torch.dtype) -> str | None:
        """None when it can run, else the reason."""
        if self.compiled and mode in ("penalty", "double"):
            return "AOTAutograd does not support double backward"
        if self.compiled and (case.spectral or mode == "step"):
            return "not measured with spectral norm, nor in whole steps"
        if self.yardstick and model_measured.moved(case, mode, dtype.itemsize) is None:
            return "a copy is the measure of norms, activations and filters"
        if self.graphed and (mode != "step" or device != "cuda"):
            return "CUDA graphs are measured in whole steps"
        if self.inplace and not (mode == "train" and case.is_stack()):
            return "measured in training steps of convolution, batch norm and LeakyReLU"
        wrong = {"cpu": "cuda", "cuda": "cpu", "triton": "cpu"}.get(self.backend or "")
        return f"runs no {device} tensors" if wrong == device else None

    def _model(self, problem: GanProblem, mode: str) -> nn.Module:
        model = copy.deepcopy(problem.model)
        if problem.case.spectral and self.backend is not None:
            model = _batched_spectral_norm(problem)
        model.train(mode != "forward")
        for module in model.modules():
            if isinstance(module, nn.LeakyReLU):
                module.inplace = self.inplace
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.backend is not None:
            import fuseblock

            fused(model)
            fuseblock.fuse(model, verbose=False)
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]

    def step(self, problem: GanProblem, mode: str) -> tuple[Step, Callable[[], Context]]:
        """The step to time, and the context to enter around it."""
        if self.yardstick:
            return _copy(problem), contextlib.nullcontext
        model, case, x, grad_y = self._model(problem, mode), problem.case, problem.x, problem.grad_y
        if self.channels_last:
            x, grad_y = (
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (x, grad_y)
            )
        wanted = {_common(name): p for name, p in model.named_parameters()}
        if mode not in ("forward", "step"):
            x = x.detach().requires_grad_()

        def forward() -> dict[str, Tensor]:
            return {"y": model(x)}

        def train() -> dict[str, Tensor]:
            y = model(x)
            grads = torch.autograd.grad(y, [x, *wanted.values()], grad_y)
            return {"y": y, **dict(zip(("x", *wanted), grads, strict=True))}

        def penalty() -> dict[str, Tensor]:
            y = model(x)
            (gradient,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
            value = penalty_of(gradient, case.penalty)
            grads = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True)
            return {"y": y, "penalty": value, "x": gradient, **dict(zip(wanted, grads, strict=True))}

        kept: list[Tensor] = []

        def double() -> dict[str, Tensor]:
            if not kept:
                kept.extend((x, grad_y.detach().requires_grad_()))
                y = model(x)
                kept.extend(torch.autograd.grad(y, x, kept[1], create_graph=True))
                kept.append(y.detach())
            sources = {"x": kept[0], "grad_y": kept[1], **wanted}
            # The gradient itself is the cotangent: of its squared norm, up to a factor.
            grads = torch.autograd.grad(
                kept[2], list(sources.values()), kept[2].detach(), retain_graph=True, materialize_grads=True
            )
            return {"y": kept[3], **{f"d_{n}": g for n, g in zip(sources, grads, strict=True)}}

        def context() -> Context:
            stack = contextlib.ExitStack()
            if self.backend is not None:
                import fuseblock

                stack.enter_context(fuseblock.backend(self.backend))
            if mode == "forward":
                stack.enter_context(torch.no_grad())
            return stack

        if mode == "step":
            assert case.step is not None
            step = case.step(model, x, self.backend is not None)
            return _graphed(step, x) if self.graphed else step, context
        return {"forward": forward, "train": train, "penalty": penalty, "double": double}[mode], context


def _copy(problem: GanProblem) -> Step:
    """A plain copy of as many bytes as the case's forward reads and writes."""
    x = problem.x
    moved = model_measured.moved(problem.case, "forward", x.element_size())
    assert moved is not None
    source = x.new_ones(round(moved / 2 / x.element_size()))
    target = torch.empty_like(source)
    return lambda: {"y": target.copy_(source)}


def _graphed(step: Step, x: Tensor) -> Step:
    """The step as one CUDA graph."""
    import fuseblock

    return fuseblock.graphed(step, device=x.device)


def _common(name: str) -> str:
    """One name for the weight under either spectral norm."""
    return name.replace("parametrizations.weight.original", "weight_orig")


def _batched_spectral_norm(problem: GanProblem) -> nn.Module:
    """The model with one spectral norm for all layers in place of one for each, in the same state."""
    import fuseblock

    model = problem.case.build().to(problem.x)
    fuseblock.nn.spectral_norm(model)
    model.load_state_dict(problem.model.state_dict())
    return model


PROVIDERS: tuple[BlockProvider, ...] = (
    BlockProvider("stock"),
    BlockProvider("stock:channels-last", channels_last=True),
    BlockProvider("stock:inplace", inplace=True),
    BlockProvider("stock:graphed", graphed=True),
    BlockProvider("compile", compiled=True, default=False),
    BlockProvider(COPY, peer=False, yardstick=True),
    BlockProvider("fuseblock", peer=False, backend="auto"),
    BlockProvider("fuseblock:channels-last", peer=False, channels_last=True, backend="auto"),
    BlockProvider("fuseblock:graphed", peer=False, graphed=True, backend="auto"),
    BlockProvider("fuseblock:triton", peer=False, backend="triton"),
    BlockProvider("fuseblock:cuda", peer=False, backend="cuda"),
    BlockProvider("fuseblock:reference", peer=False, default=False, backend="reference"),
)
