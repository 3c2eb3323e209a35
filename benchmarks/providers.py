"""Who is measured: fuseblock with its choice of engine and with each backend forced, and what it replaces."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case
from benchmarks.onnx_lstm import onnx_layer
from benchmarks.workloads import Layer, Problem, Step, make_step, stock_module

Context = AbstractContextManager[object]


class Provider:
    """One way to run a case. Subclasses give `why_not`, `layer` and perhaps `context`.

    Attributes:
        name: as shown in tables and matched by ``--providers``.
        peer: whether fuseblock is compared with it.
        default: whether it runs without being named by ``--providers``.
    """

    name: str
    peer = True
    default = True

    def why_not(self, case: Case, mode: str, device: str, dtype: torch.dtype) -> str | None:
        """None when it can run, else the reason."""
        raise NotImplementedError

    def layer(self, problem: Problem, mode: str) -> tuple[Layer, dict[str, Tensor]]:
        """The layer with the problem's values, and its parameters by name."""
        raise NotImplementedError

    def context(self, case: Case, mode: str) -> Context:
        """What a step runs in."""
        return contextlib.nullcontext()

    def step(self, problem: Problem, mode: str) -> tuple[Step, Callable[[], Context]]:
        """The step to time, and the context to enter around it."""
        layer, parameters = self.layer(problem, mode)

        def context() -> Context:
            stack = ExitStack()
            stack.enter_context(self.context(problem.case, mode))
            if mode == "forward":
                stack.enter_context(torch.no_grad())
            return stack

        return make_step(layer, parameters, problem, mode), context


def _loaded(
    module: torch.nn.Module, problem: Problem, mode: str
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    module.load_state_dict(problem.state)
    module.to(problem.x).train(mode != "forward")
    return module, dict(module.named_parameters())


def _cell(module: torch.nn.Module, hx: tuple[Tensor, Tensor] | None) -> Layer:
    def cell(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = module(x, hx)
        return h, h, c

    return cell


@dataclass
class Stock(Provider):
    """PyTorch's eager layer; ragged batches through PackedSequence, as its users must (packing included)."""

    name: str = "stock"

    def why_not(self, case: Case, mode: str, device: str, dtype: torch.dtype) -> str | None:
        """See `Provider.why_not`."""
        return None

    def context(self, case: Case, mode: str) -> Context:
        """See `Provider.context`."""
        # cuDNN has no second derivative; switching it off is what PyTorch's error message recommends.
        off = mode == "double" and torch.cuda.is_available()
        return torch.backends.cudnn.flags(enabled=False) if off else contextlib.nullcontext()

    def layer(self, problem: Problem, mode: str) -> tuple[Layer, dict[str, Tensor]]:
        """See `Provider.layer`."""
        module, parameters = _loaded(stock_module(problem.case), problem, mode)
        hx = problem.hx
        if problem.case.cell:
            return _cell(module, hx), parameters
        if problem.lengths is None:

            def dense(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                y, (h, c) = module(x, hx)
                return y, h, c

            return dense, parameters

        lengths, steps = problem.lengths.cpu(), problem.case.time

        def packed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, (h, c) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return pad_packed_sequence(y, total_length=steps)[0], h, c

        return packed, parameters


@dataclass
class Compiled(Stock):
    """PyTorch's layer under `torch.compile`, with ``allow_rnn`` so that Dynamo does not simply break its graph."""

    name: str = "compile"
    default: bool = False

    def why_not(self, case: Case, mode: str, device: str, dtype: torch.dtype) -> str | None:
        """See `Provider.why_not`."""
        if mode == "double":
            return "AOTAutograd does not support double backward"
        return "packing is not traceable" if case.ragged else None

    def layer(self, problem: Problem, mode: str) -> tuple[Layer, dict[str, Tensor]]:
        """See `Provider.layer`."""
        torch._dynamo.config.allow_rnn = True
        layer, parameters = super().layer(problem, mode)
        return torch.compile(layer), parameters


@dataclass
class Ours(Provider):
    """fuseblock's drop-in module; ``backend`` is what is forced, ragged batches come with ``lengths=``."""

    backend: str = "auto"
    default: bool = True
    peer: bool = False

    def __post_init__(self) -> None:
        self.name = "fuseblock" if self.backend == "auto" else f"fuseblock:{self.backend}"

    def why_not(self, case: Case, mode: str, device: str, dtype: torch.dtype) -> str | None:
        """See `Provider.why_not`."""
        if importlib.util.find_spec("fuseblock") is None:
            return "fuseblock is not installed"
        wrong = {"cpu": "cuda", "cuda": "cpu", "triton": "cpu"}.get(self.backend)
        return f"runs no {device} tensors" if wrong == device else None

    def context(self, case: Case, mode: str) -> Context:
        """See `Provider.context`."""
        import fuseblock

        return fuseblock.backend(self.backend)

    def layer(self, problem: Problem, mode: str) -> tuple[Layer, dict[str, Tensor]]:
        """See `Provider.layer`."""
        import fuseblock

        kinds = (fuseblock.nn.LSTM, fuseblock.nn.LSTMCell)
        module, parameters = _loaded(stock_module(problem.case, kinds), problem, mode)
        hx, lengths = problem.hx, problem.lengths
        if problem.case.cell:
            return _cell(module, hx), parameters
        keywords = {} if lengths is None else {"lengths": lengths}

        def layer(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, (h, c) = module(x, hx, **keywords)
            return y, h, c

        return layer, parameters


@dataclass
class OnnxRuntime(Provider):
    """ONNX Runtime's CPU LSTM, with as many threads as PyTorch. It approximates the gates, and is gated like all."""

    name: str = "onnxruntime"

    def why_not(self, case: Case, mode: str, device: str, dtype: torch.dtype) -> str | None:
        """See `Provider.why_not`."""
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if mode != "forward":
            return "inference only"
        if device != "cpu" or dtype != torch.float32:
            return "measured on CPU in float32 only"
        if case.cell or case.proj:
            return "ONNX has no LSTM cell" if case.cell else "ONNX LSTM has no projection"
        return None

    def layer(self, problem: Problem, mode: str) -> tuple[Layer, dict[str, Tensor]]:
        """See `Provider.layer`."""
        return onnx_layer(problem, torch.get_num_threads()), {}


PROVIDERS: tuple[Provider, ...] = (
    Stock(),
    Compiled(),
    OnnxRuntime(),
    Ours(),
    Ours("cpu"),
    Ours("cuda"),
    Ours("triton"),
    Ours("aten", default=False),
    Ours("reference", default=False),
)
#: The provider that speed-ups refer to and whose error sets the bound.
BASE = "stock"
#: The provider that users get.
OURS = "fuseblock"
#: A plain copy of as many bytes as a case's forward moves: what memory gives.
COPY = "copy"


def select(patterns: list[str] | None, available: tuple[Any, ...] = PROVIDERS) -> list[Any]:
    """The providers named by globs (the base is always among them), or the default ones."""
    if not patterns:
        return [provider for provider in available if provider.default]
    return [
        provider
        for provider in available
        if provider.name == BASE or any(fnmatch.fnmatch(provider.name, pattern) for pattern in patterns)
    ]


def check_patterns(patterns: list[str] | None, available: tuple[Any, ...] = PROVIDERS) -> None:
    """Raise ValueError for a pattern that matches no provider."""
    for pattern in patterns or ():
        if not any(fnmatch.fnmatch(provider.name, pattern) for provider in available):
            names = dict.fromkeys(p.name for p in available)
            raise ValueError(f"no provider matches {pattern!r}: {', '.join(names)}")
