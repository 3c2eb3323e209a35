"""What runs a graphed step: eagerly, or captured into a CUDA graph by PyTorch."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PACKAGE = os.path.dirname(__file__)


def runner_on(device: torch.device, generators: tuple[torch.Generator, ...]) -> Eager | Cuda:
    if device.type != "cuda":
        return Eager(device)
    return Cuda(device, generators, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


class Eager:
    """Runs steps where there are no CUDA graphs."""

    captures = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def shared(self, generators: tuple[torch.Generator, ...]) -> Eager:
        return self

    @contextmanager
    def checked(self) -> Iterator[None]:
        yield

    def warm_up(self, run: Callable[[], None]) -> None:
        run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run


class Cuda:
    """Runs and captures steps on one side stream, into one memory pool, whose memory is used again on that stream alone."""

    captures = True

    def __init__(
        self,
        device: torch.device,
        generators: tuple[torch.Generator, ...],
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self.device, self.generators, self.stream, self.pool = device, generators, stream, pool

    def shared(self, generators: tuple[torch.Generator, ...]) -> Cuda:
        return Cuda(self.device, generators, self.stream, self.pool)

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Let waits for the GPU raise, naming the line."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            raise RuntimeError(f"graphed: the step waits for the GPU, {_where(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def warm_up(self, run: Callable[[], None]) -> None:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                run()
            current.wait_stream(self.stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        _refuse_autocast()
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            # Other threads (a loader's that pins memory) go on meanwhile.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                run()
        except Exception as error:
            raise RuntimeError(
                f"graphed: the step cannot be captured, {_where(error)}: {error}. Waits for the GPU, work on other "
                "streams and generators that were not named cannot."
            ) from error
        return graph.replay


def _refuse_autocast() -> None:
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "graphed: autocast is on around the call, whose cache of cast weights would be part of the recording: enter it "
            "inside of the step"
        )


def _where(error: BaseException) -> str:
    """The line of the step that led to an error: the innermost that is neither PyTorch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename.endswith("grad_scaler.py") for frame in frames):
        return "in GradScaler: it needs an optimizer with fused=True (or bfloat16, which needs no scaler)"
    foreign = [
        frame
        for frame in frames
        if "/torch/" not in frame.filename and not frame.filename.startswith(_PACKAGE)
    ]
    if not foreign:
        return "in a backward"
    return f"at {foreign[-1].filename}:{foreign[-1].lineno}: {foreign[-1].line}"
