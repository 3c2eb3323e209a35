"""`graphed`: a training step as one launch, by PyTorch's CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from . import dispatch
from ._graphs import Cuda, Eager, runner_on

__all__ = ["GraphedStep", "graphed"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: What PyTorch asks for: buckets and streams of DistributedDataParallel settle in the first iterations.
_DDP_WARMUP = 11


def graphed(
    step: Callable[_P, _R],
    *,
    warmup: int = 3,
    max_graphs: int = 8,
    device: torch.device | str | None = None,
    generators: Sequence[torch.Generator] = (),
    pool: GraphedStep[..., Any] | None = None,
) -> GraphedStep[_P, _R]:
    r"""Capture a training step into a CUDA graph and replay it: thousands of small launches become one.

    ``step`` is any function of tensors that trains as it runs: forward, backward, optimizers and all. Every call of what
    is returned is **exactly one step**:

    * the first ``warmup`` calls run it eagerly, on a side stream (kernels are compiled, optimizers make their state);
    * the next call runs its Python once more, which only records, and then replays what was recorded;
    * every later call copies its tensors into those of the recording and replays. No Python of ``step`` runs any more.

    Calls are told apart by the shapes, strides, dtypes and devices of tensors, by the values of all other arguments, and by
    what is around them of autocast, `torch.no_grad` and `fuseblock.backend`:
    each such kind has its own graph, up to ``max_graphs``, and all share one memory pool. So a penalty in every 16th step is
    an argument, and an alternating GAN step may be one graph or two::

        opt_d = torch.optim.Adam(D.parameters(), lr=torch.tensor(2e-4, device="cuda"), capturable=True)

        def train_d(real, penalise):
            with torch.no_grad():
                fake = G(torch.randn(len(real), 128, device="cuda"))
            loss = D_loss(D(real), D(fake))
            if penalise:
                loss = loss + 16 * gan.r1_penalty(D, real)
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
            return loss

        step_d = fuseblock.graphed(train_d)
        step_g = fuseblock.graphed(train_g, pool=step_d)     # shares memory: two steps never run at the same time
        for n, real in enumerate(loader):
            loss_d = step_d(real.cuda(), penalise=n % 16 == 0)
            loss_g = step_g(real.cuda())

    Where there is no CUDA device, ``step`` runs eagerly in every call, with the same copies, outputs and checks.

    **Inputs** are copied, so tensors may be anything that a new call brings; they may not require a gradient (differentiate
    inside the step). **Outputs** are tensors that belong to this object, detached, and **overwritten by the next call of the
    same kind**: ``clone()`` what is to be kept. Reading one (``float(loss)``) waits for the GPU; read every few dozen
    steps. Other outputs are Python values as of the recording.

    **What the recording holds for good**: every Python number (a learning rate that is a float; the decay of an average:
    update `gan.ExponentialMovingAverage` with ``warmup=True`` outside of the step), the mode of every module, the addresses
    of parameters, buffers and optimizer states. Before each replay these are compared, and RuntimeError names what
    changed; `GraphedStep.reset` forgets the graphs, for the next calls to begin anew. A learning rate that is a tensor
    may change (schedulers of PyTorch write into it).

    **Gradients**: with ``zero_grad(set_to_none=True)`` in the step they lie in the pool, and another graph of the pool may
    overwrite them after the step: read them inside (return their norm), keep ``zero_grad``, ``backward`` and
    ``optimizer.step`` in one step, and let no other step add to them (in the generator's, ``D.requires_grad_(False)``).
    With ``set_to_none=False`` they stay where the first call put them, and an outer ``zero_grad`` that drops them is an
    error. Whatever else a step leaves behind must be an output or have existed before.

    **Random numbers**: PyTorch's default generator goes on from replay to replay; others must be named in ``generators``.

    **Limits**: no wait for the GPU inside (``item()``, ``print`` of a tensor, a boolean index, ``torch.cuda.synchronize``);
    the last eager call looks for those, and the error names the line. Optimizers that have the option need
    ``capturable=True``. `torch.amp.GradScaler.step` waits for the GPU unless the optimizer has ``fused=True`` (or use
    bfloat16, which needs no scaler). Enter autocast inside. Under `DistributedDataParallel`: ``warmup=11``, build it under
    ``torch.cuda.stream(torch.cuda.Stream())``, all ranks record in the same call.

    Args:
        step: the function; arguments and results may be nested in tuples, lists and dicts.
        warmup: eager calls of each kind before it is captured, 2 or more.
        max_graphs: kinds of calls; more are an error, since each keeps memory.
        device: where to capture, and where tensors must be then; needed only if no argument is a tensor.
        generators: CUDA random generators that the step draws from, besides the default one.
        pool: another graphed step to share memory with, on the same device; the two may not run at the same time.

    Returns:
        A `GraphedStep`, called like ``step``.

    Raises:
        ValueError: ``warmup`` below 2 or ``max_graphs`` below 1. Calls raise:
        TypeError: an argument is neither a tensor nor hashable.
        ValueError: tensors of several devices, or none and no ``device``; a tensor that requires a gradient; an optimizer
            without ``capturable=True``; too small a ``warmup`` for DistributedDataParallel.
        RuntimeError: the step waits for the GPU, or something else in it cannot be captured; too many kinds of calls; what
            the recording holds has changed.
    """
    if warmup < 2:
        raise ValueError(f"graphed: expected warmup of at least 2, got {warmup}")
    if max_graphs < 1:
        raise ValueError(f"graphed: expected max_graphs of at least 1, got {max_graphs}")
    return GraphedStep(step, warmup, max_graphs, device, generators, pool)


class GraphedStep(Generic[_P, _R]):
    """What `graphed` returns: call it like the step.

    Attributes:
        step: the function that was given.
    """

    def __init__(
        self,
        step: Callable[_P, _R],
        warmup: int,
        max_graphs: int,
        device: torch.device | str | None,
        generators: Sequence[torch.Generator],
        pool: GraphedStep[..., Any] | None,
    ) -> None:
        self.step = step
        self._warmup, self._max_graphs = warmup, max_graphs
        self._device = None if device is None else torch.device(device)
        self._generators = tuple(generators)
        self._pool = pool
        self._runner: Eager | Cuda | None = None
        self._kinds: dict[Any, _Kind] = {}

    @property
    def graphs(self) -> int:
        """How many kinds of calls have been captured (on a CPU: would have been)."""
        return sum(kind.replay is not None for kind in self._kinds.values())

    def reset(self) -> None:
        """Forget all graphs: the next calls warm up and capture again. Needed after a checkpoint was loaded, say."""
        self._kinds.clear()

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """One step; see `graphed`."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.step(*args, **kwargs)  # part of somebody else's graph
        leaves, spec = pytree.tree_flatten((args, kwargs))
        signature = tuple(map(_signature, leaves))
        runner = self._on(leaves)
        key = spec, signature, _modes(runner.device)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._new_kind(key, leaves)
        kind.receive(leaves)
        if kind.replay is None and kind.calls < self._warmup:
            # The last call is without hooks, which keep modules from running together as they will when captured.
            last = kind.calls == self._warmup - 1
            with runner.checked() if last else kind.watch.calls(runner.captures):
                runner.warm_up(kind.run)
            kind.watch.check_ddp(self._warmup)
            kind.calls += 1
        else:
            if kind.replay is None:
                gradients = kind.watch.gradients() if runner.captures else {}
                kind.replay = runner.capture(kind.run)
                kind.watch.keep(gradients)
                kind.watch.remember()
            kind.watch.check()
            kind.replay()
            if not runner.captures:
                kind.watch.remember()  # the step itself has run, and may have changed it
        return kind.results()  # type: ignore[no-any-return]

    def _on(self, leaves: list[Any]) -> Eager | Cuda:
        """What runs the step where its arguments are."""
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"graphed: expected tensors of one device, got {sorted(map(str, devices))}")
        if not devices and self._device is None:
            raise ValueError("graphed: no argument is a tensor: name the device, graphed(step, device=...)")
        wanted = self._device
        if wanted is not None and wanted.type == "cuda":
            # Without one, the step runs eagerly where its tensors are.
            wanted = torch.empty(0, device=wanted).device if torch.cuda.is_available() else None
        device = devices.pop() if devices else wanted or torch.device("cpu")
        if wanted is not None and device != wanted:
            raise ValueError(
                f"graphed: expected tensors on {wanted}, as given, got {device}: move them before the call"
            )
        if self._runner is None:
            owner: GraphedStep[..., Any] = self
            while owner._pool is not None:
                owner = owner._pool
            if owner._runner is None:
                owner._runner = runner_on(device, owner._generators)
            self._runner = owner._runner.shared(self._generators)
        if self._runner.device != device:
            raise ValueError(f"graphed: expected tensors on {self._runner.device}, as at first, got {device}")
        return self._runner

    def _new_kind(self, key: tuple[Any, ...], leaves: list[Any]) -> _Kind:
        spec, signature, _ = key
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"graphed: tensor {place} of the arguments requires a gradient: it is copied, so differentiate "
                    "inside of the step, or pass it detached"
                )
        if len(self._kinds) == self._max_graphs:
            last = next(reversed(self._kinds))[1]
            new = [f"{a} for {b}" for a, b in zip(signature, last, strict=False) if a != b]
            raise RuntimeError(
                f"graphed: {self._max_graphs} kinds of calls are the limit (max_graphs), and this is another one; beside "
                f"the last one it has {', '.join(new) or 'another structure'}. Sizes that vary (the last batch of an epoch: "
                "drop_last=True) and numbers that vary (pass them as tensors) each take a graph."
            )
        kind = _Kind(self.step, spec, leaves)
        self._kinds[key] = kind
        return kind


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(f"graphed: expected tensors and hashable values, got {type(leaf).__name__}") from None
    return type(leaf), leaf


def _modes(device: torch.device) -> tuple[Any, ...]:
    """What around a call changes what its step does."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    return torch.is_grad_enabled(), dtype, dispatch.forced()


class _Kind:
    """Calls of one signature: tensors that inputs are copied into and outputs out of, and the graph between them."""

    def __init__(self, step: Callable[..., Any], spec: Any, leaves: list[Any]) -> None:
        self.step, self.spec = step, spec
        self.inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self.outputs: list[Any] | None = None
        self.output_spec: Any = None
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.watch = _Watch()

    def receive(self, leaves: list[Any]) -> None:
        """Copy a call's tensors to where the graph reads them."""
        pairs = [
            (own, given) for own, given in zip(self.inputs, leaves, strict=True) if isinstance(own, Tensor)
        ]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([own for own, _ in pairs], [given for _, given in pairs])

    def run(self) -> None:
        """The step, from the own inputs to the own outputs: what is captured."""
        args, kwargs = pytree.tree_unflatten(self.inputs, self.spec)
        outputs, spec = pytree.tree_flatten(self.step(*args, **kwargs))
        if self.outputs is None:
            # Made in an eager call, so outside of the pool: no other graph will ever overwrite them.
            self.output_spec = spec
            self.outputs = [
                torch.empty_like(x, requires_grad=False) if isinstance(x, Tensor) else x for x in outputs
            ]
        elif spec != self.output_spec:
            raise RuntimeError(f"graphed: the step returned {spec}, before {self.output_spec}")
        tensors = [x.detach() for x in outputs if isinstance(x, Tensor)]
        kept = [x for x in self.outputs if isinstance(x, Tensor)]
        if [(x.shape, x.dtype) for x in tensors] != [(x.shape, x.dtype) for x in kept]:
            raise RuntimeError(
                "graphed: the step returned tensors of other shapes or dtypes than before, from inputs of the same"
            )
        self.outputs = [
            old if isinstance(old, Tensor) else new for old, new in zip(self.outputs, outputs, strict=True)
        ]
        if kept:
            with torch.no_grad():
                torch._foreach_copy_(kept, tensors)

    def results(self) -> Any:
        assert self.outputs is not None
        return pytree.tree_unflatten(self.outputs, self.output_spec)


class _Watch:
    """What a step's warm-up used, by PyTorch's global hooks, and its state that a recording holds for good."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.optimizers: dict[Optimizer, None] = {}
        self.state: dict[tuple[Any, ...], Any] = {}
        self.kept: dict[tuple[Any, ...], Tensor] = {}

    @contextmanager
    def calls(self, captures: bool) -> Iterator[None]:
        """Note modules and optimizers of a call; refuse those that cannot be captured."""

        def module_runs(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():  # a compiled module shows itself alone
                self.modules.update(dict.fromkeys(module.modules()))

        def optimizer_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if captures and not all(group.get("capturable", True) for group in optimizer.param_groups):
                raise ValueError(
                    f"graphed: {type(optimizer).__name__} counts its steps on the CPU: construct it with capturable=True"
                )
            self.optimizers[optimizer] = None

        hooks = (
            register_module_forward_pre_hook(module_runs),
            register_optimizer_step_pre_hook(optimizer_steps),
        )
        try:
            with warnings.catch_warnings():
                # What it warns of, hooks that fire once more for a compiled module, is nothing here.
                warnings.filterwarnings("ignore", r".*when there are global hooks on modules", UserWarning)
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def check_ddp(self, warmup: int) -> None:
        if warmup < _DDP_WARMUP and any(isinstance(m, DistributedDataParallel) for m in self.modules):
            raise ValueError(
                f"graphed: DistributedDataParallel needs warmup of at least {_DDP_WARMUP}, got {warmup}"
            )

    def gradients(self) -> dict[tuple[Any, ...], Tensor]:
        """Those that there are, of all optimizers."""
        return {
            (optimizer, "group", g, "gradient", n): p.grad
            for optimizer in self.optimizers
            for g, group in enumerate(optimizer.param_groups)
            for n, p in enumerate(group["params"])
            if p.grad is not None
        }

    def keep(self, before: dict[tuple[Any, ...], Tensor]) -> None:
        """Keep gradients that a capture found and left in place: the graph writes there."""
        after = self.gradients()
        self.kept = {key: grad for key, grad in before.items() if after.get(key) is grad}

    def remember(self) -> None:
        """Take the present state as the recording's."""
        self.state = dict(self._present())

    def check(self) -> None:
        """Raise RuntimeError where the state is not the recording's."""
        present = dict(self._present())
        # Further entries are none of the recording's: another kind of call may have trained further parameters.
        changed = [key for key, held in self.state.items() if present.get(key) != held]
        if not changed:
            return
        shown = [f"{self._name(k)} (recorded {self.state[k]}, now {present.get(k)})" for k in changed[:4]]
        raise RuntimeError(
            f"graphed: a recording holds what has changed since: {'; '.join(shown)}. Call reset() to capture again; what is "
            "to change from step to step must be a tensor (lr=torch.tensor(...), on the device)."
        )

    def _name(self, key: tuple[Any, ...]) -> str:
        owner, *words = key
        kin = list(self.modules if owner in self.modules else self.optimizers)
        return " ".join(map(str, (f"{type(owner).__name__} {kin.index(owner)}", *words)))

    def _present(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Pairs of (module or optimizer, what of it) and value; names are made of them only for an error."""
        for module in self.modules:
            yield (module, "training"), module.training
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        yield (module, key, "address"), tensor.data_ptr()
                        yield (module, key, "requires_grad"), tensor.requires_grad
        for optimizer in self.optimizers:
            for g, group in enumerate(optimizer.param_groups):
                for key, value in group.items():
                    if key == "params":
                        yield (optimizer, "group", g, "parameters"), len(value)
                    elif key != "initial_lr":  # a scheduler's note
                        yield (optimizer, "group", g, key), _held(value)
            for p, state in enumerate(optimizer.state.values()):
                for key, value in state.items():
                    yield (optimizer, "state", p, key), _held(value)
        if self.kept:
            present = self.gradients()
            yield from ((key, _held(present.get(key))) for key in self.kept)


def _held(value: Any) -> Any:
    """What a recording holds of a value: of a tensor the address."""
    return ("tensor at", value.data_ptr()) if isinstance(value, Tensor) else value
