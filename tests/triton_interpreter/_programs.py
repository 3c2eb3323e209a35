"""The programs of a launch as greenlets, and the launch itself."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import greenlet
import triton
import triton.runtime.interpreter as interpreter
from triton.runtime import autotuner

from . import _bounds
from ._errors import LivelockError, OutOfBoundsError

_Builder = interpreter.InterpreterBuilder

#: Resumptions of programs in one launch after which they are taken to wait for each other for ever.
MAX_RESUMPTIONS = 1_000_000

_order, _random = "fifo", random.Random(0)
_launching = False
# The language patches of the running launch, by the id of the module globals that they serve.
_patches: dict[int, Any] = {}


@contextmanager
def program_order(order: str, seed: int = 0) -> Iterator[None]:
    """Resume programs in this order within the context."""
    global _order, _random
    if order not in ("fifo", "lifo", "random"):
        raise ValueError(f"order must be fifo, lifo or random, got {order!r}")
    before = _order, _random
    _order, _random = order, random.Random(seed)
    try:
        yield
    finally:
        _order, _random = before


def _take_turns() -> None:
    """Let other programs run; an atomic is where one program may wait for another."""
    scheduler = greenlet.getcurrent().parent
    if _launching and scheduler is not None:
        scheduler.switch()


def _run_all(programs: list[tuple[tuple[int, int, int], greenlet.greenlet]]) -> None:
    resumptions = 0
    while programs:
        place = {"fifo": 0, "lifo": len(programs) - 1}.get(_order)
        index, program = programs.pop(_random.randrange(len(programs)) if place is None else place)
        interpreter.interpreter_builder.set_grid_idx(*index)
        program.switch()
        if not program.dead:
            programs.insert(0 if _order == "lifo" else len(programs), (index, program))
        resumptions += 1
        if resumptions > MAX_RESUMPTIONS:
            raise LivelockError(f"{len(programs)} programs still wait after {resumptions} turns")


def _patch_language(fn: Any) -> None:
    """Make the language that fn sees interpret, once per launch and module."""
    key = id(fn.__globals__)
    if key not in _patches:
        _patches[key] = interpreter._patch_lang(fn)


def _launch(self: Any, *args_dev: Any, **kwargs: Any) -> None:
    """GridExecutor.__call__: as the stock one, with bounds and turns."""
    global _launching
    names = inspect.getfullargspec(self.fn).args
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    args_host, kwargs_host = self._init_args_hst(args_dev, kwargs)
    for hook in self.pre_run_hooks:
        hook(*args_host, **kwargs_host)
    _patch_language(self.fn)
    _launching = True
    try:
        with _bounds.only_within((*args_host, *kwargs_host.values()), self.fn.__name__):
            args = inspect.getcallargs(self.fn, *args_host, **kwargs_host)
            args = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in args.items()}
            grid = tuple(self.grid(args) if callable(self.grid) else self.grid)
            grid += (1,) * (3 - len(grid))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            places = itertools.product(*map(range, grid))
            _run_all([(place, greenlet.greenlet(lambda: self.fn(**args))) for place in places])
    except (OutOfBoundsError, LivelockError):
        raise
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
    finally:
        _launching = False
        for scope in reversed(_patches.values()):
            scope.restore()
        _patches.clear()
    self._restore_args_dev(args_dev, args_host, kwargs, kwargs_host)


def _call_nested(self: Any, *args: Any, **kwargs: Any) -> Any:
    """InterpretedFunction.__call__: the stock one patches the whole language at every call, which took 40 % of the time."""
    _patch_language(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Replace launches, nested calls and the timing of autotuned configurations."""
    rmw, cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas

    def create_atomic_rmw(self: Any, *args: Any) -> Any:
        result = rmw(self, *args)
        _take_turns()
        return result

    def create_atomic_cas(self: Any, *args: Any) -> Any:
        result = cas(self, *args)
        _take_turns()
        return result

    _Builder.create_atomic_rmw = create_atomic_rmw
    _Builder.create_atomic_cas = create_atomic_cas
    interpreter.GridExecutor.__call__ = _launch
    interpreter.InterpretedFunction.__call__ = _call_nested
    # Without a device there is nothing to time: the first configuration that survives pruning runs.
    autotuner.Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    assert triton.knobs.runtime.interpret
