"""What kernels load and store, counted by launch: emulated CUDA kernels and interpreted Triton kernels alike.

Counted is every access of every thread to the storage of a tensor, whatever function makes it. What is read again comes
from a cache, so two figures matter: bytes that are touched, each once, which have to come from memory; and the tensors of
which more is loaded than that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fuseblock import ops

#: Operands count as read again where more is loaded than this, compared with what is touched.
ONCE = 1.05


@dataclass(frozen=True)
class Traffic:
    """Bytes of one tensor in one launch: of all accesses, and each byte once."""

    loaded: int
    stored: int
    loaded_once: int
    stored_once: int

    @property
    def is_exchange(self) -> bool:
        """Whether blocks of the launch tell each other things there, time and again: that stays in the L2 cache."""
        return self.loaded > 0 and self.stored > ONCE * self.stored_once


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name, or of what launched it, and the traffic of each tensor that it touched."""

    name: str
    operands: list[Traffic] = field(default_factory=list)

    @property
    def exchanged(self) -> int:
        """Bytes stored to and loaded from buffers of blocks that talk to each other."""
        return sum(t.loaded + t.stored for t in self.operands if t.is_exchange)

    @property
    def _lasting(self) -> list[Traffic]:
        return [t for t in self.operands if not t.is_exchange]

    @property
    def read(self) -> int:
        """Bytes read, each once."""
        return sum(t.loaded_once for t in self._lasting)

    @property
    def read_again(self) -> int:
        """Those of tensors that are read more than once."""
        return sum(t.loaded_once for t in self._lasting if t.loaded > ONCE * t.loaded_once)

    @property
    def written(self) -> int:
        """Bytes written, each once."""
        return sum(t.stored_once for t in self._lasting)

    @property
    def written_again(self) -> int:
        """Bytes written to where the launch had written before."""
        return sum(t.stored - t.stored_once for t in self._lasting)


@contextmanager
def of_emulated(modules: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches of emulated modules (variant "counted") within the context, in order, once it is left.

    Watched is the storage of every tensor whose address a launcher asks for.
    """
    libraries = [ctypes.CDLL(str(module.__file__)) for module in modules]
    for library in libraries:
        library.counting_launcher.restype = ctypes.c_char_p
        library.counting_launches.restype = ctypes.c_int64
        library.counting_clear()
        library.counting_workers(1)
    storages: list[torch.UntypedStorage] = []  # kept, so that no address serves twice
    known: set[int] = set()
    data_ptr = torch.Tensor.data_ptr

    def watched(x: torch.Tensor) -> int:
        storage = x.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            storages.append(storage)
            for library in libraries:
                library.counting_watch(ctypes.c_uint64(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))
        return data_ptr(x)

    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "data_ptr", watched)
        yield launches
    for library in libraries:
        for launch in range(library.counting_launches()):
            launches.append(Launch(library.counting_launcher(ctypes.c_int64(launch)).decode()))
            for number in range(len(storages)):
                counts = (ctypes.c_int64 * 4)()
                library.counting_traffic(ctypes.c_int64(launch), ctypes.c_int64(number), counts)
                if any(counts):
                    launches[-1].operands.append(Traffic(*counts))
        library.counting_clear()
        library.counting_workers(2)


@contextmanager
def of_interpreted() -> Iterator[list[Launch]]:
    """The launches of Triton kernels within the context, in order, once it is left."""
    from .triton_interpreter import _traffic

    launches: list[Launch] = []
    counted: list[tuple[str, list[list[int]]]] = []
    _traffic.launches = counted
    try:
        yield launches
    finally:
        _traffic.launches = None
    for name, figures in counted:
        launches.append(Launch(name, [Traffic(*of_view) for of_view in figures if any(of_view)]))


class PyTorchsLaunches(TorchDispatchMode):
    """What PyTorch's own operations move, each of them one launch: those around our kernels and between them.

    Views and bare allocations launch nothing. Of a convolution it notes the sum that is its bias's gradient, which CUDA
    takes in a pass of its own, and nothing else.

    Attributes:
        launches: (name, bytes read and written) in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # what these are made of
            outputs = func.decompose(*args, **kwargs)
            if outputs is not NotImplemented:
                return outputs
            if func.namespace == "fuseblock":
                return getattr(ops, func._schema.name.removeprefix("fuseblock::"))._impl(*args, **kwargs)
        outputs = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "convolution_backward":
            if args[-1][2]:
                self.launches.append(("sum", args[0].nbytes))
        elif name != "convolution" and not _is_view_or_empty(func):
            tensors = [t for t in pytree.tree_leaves((args, kwargs, outputs)) if isinstance(t, torch.Tensor)]
            self.launches.append((name, sum(t.nbytes for t in tensors)))
        return outputs


def _is_view_or_empty(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return "empty" in func._schema.name or any(a is not None and not a.is_write for a in aliases)


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose operations `PyTorchsLaunches` does not see: how kernels are emulated or interpreted."""

    @functools.wraps(function)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return hidden
