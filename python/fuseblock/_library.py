"""One mechanism that turns a description of an operator into everything PyTorch needs to know about it.

An operator of fuseblock is a schema, a function for real tensors, a fake, and a backward formula written in terms of
other operators of the family. From these `DifferentiableOp` registers the dispatcher op (eager, ``torch.compile``,
``torch.export``) and builds an `autograd.Function` over the same formula for ``torch.func`` transforms, which the
registration of ``torch.library`` does not serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.compiler import is_compiling

NAMESPACE = "fuseblock"
_LIB = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

#: What kernels take, on every backend.
KERNEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Formula = Callable[..., Any]


def faking(args: Iterable[Any]) -> FakeTensorMode:
    """The mode in which operators say the shapes of their results and compute nothing; that of arguments that are fake."""
    return detect_fake_mode(list(args)) or FakeTensorMode(allow_non_fake_inputs=True)


def forward_mode_active() -> bool:
    """Whether a forward-mode level (``torch.func.jvp``, ``jacfwd``, ``dual_level``) is open."""
    return forward_ad._current_level >= 0


def backward_is_seen() -> bool:
    """Whether the running backward is itself recorded, or forward mode is on, whose tangents kernels would drop.

    Then an autograd node that else calls kernels has to run on operators.
    """
    return torch.is_grad_enabled() or forward_mode_active()


def plain_eager(tensors: Iterable[Any]) -> bool:
    """Whether a call is plain eager execution: no tracing, transform, forward mode, dispatch mode, autocast, subclass.

    Then nobody but autograd has to see the operators, and calls may go to the kernels directly: a dispatcher op
    registered in Python costs several microseconds.
    """
    if (
        is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack()
        or _get_tracing_state() is not None
        or _is_any_autocast_enabled()
    ):
        return False
    # Written out: between two convolutions this code has left the caches, and every line of it is felt.
    for x in tensors:
        kind = type(x)
        if kind is not torch.Tensor and kind is not torch.nn.Parameter and isinstance(x, torch.Tensor):
            return False
    return True


def wants_gradient(tensors: Iterable[Any]) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def keep_arguments(ctx: Any, inputs: Sequence[Any], positions: Sequence[int]) -> None:
    """Remember in a node's ctx, for `wanted`, where in ``inputs`` the tensors lie, and which of them there are."""
    ctx.positions = positions
    ctx.present = [inputs[n] is not None for n in positions]


def wanted(ctx: Any) -> list[bool]:
    """Which tensor arguments the running backward wants a gradient of; all that need one if it cannot be asked."""
    try:
        nodes = (node for node, _ in ctx.next_functions)  # an absent argument has none
        return [
            is_there and (node := next(nodes)) is not None and torch._C._will_engine_execute_node(node)
            for is_there in ctx.present
        ]
    except (AttributeError, RuntimeError):  # contexts of torch.func transforms and of tracing; no engine
        return [ctx.needs_input_grad[n] for n in ctx.positions]


def opaque(schema: str, *, impl: Formula, fake: Formula) -> Any:
    """An operator without derivative that compilers do not look into; returns it.

    Args:
        schema: the schema without namespace.
        impl: runs on real tensors.
        fake: shapes and dtypes for tracing.
    """
    name = schema.split("(", 1)[0]
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class DifferentiableOp:
    """A dispatcher operator with derivatives and function transforms.

    Args:
        schema: the schema without namespace, e.g. ``"lstm_gates(Tensor gates, Tensor c) -> (Tensor, Tensor)"``.
        impl: runs on real tensors, below autograd.
        fake: shapes and dtypes for tracing.
        setup_context: saves what ``backward`` needs; signature ``(ctx, inputs, output)``.
        backward: the backward formula, made of differentiable operations only.
        vmap: batching rule ``(info, in_dims, *args) -> (outputs, out_dims)``.
        autocast: maps ``(dtype, args)`` to cast arguments, or None where autocast leaves the op alone.
    """

    def __init__(
        self,
        schema: str,
        *,
        impl: Formula,
        fake: Formula,
        setup_context: Formula,
        backward: Formula,
        vmap: Formula,
        autocast: Callable[[torch.dtype, Sequence[Any]], tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        qualified = f"{NAMESPACE}::{self.name}"
        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIB.impl(self.name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_LIB)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIB)
        self.op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._impl = impl
        self._autocast = autocast
        if autocast is not None:
            self._register_autocast()
        self._function = self._build_function(setup_context, backward, vmap)

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                return self._function.apply(*self.cast_for_autocast(args))
            if forward_mode_active():
                # register_autograd would drop the tangents without a word.
                raise NotImplementedError(
                    f"{NAMESPACE}::{self.name} has no forward-mode derivative; "
                    "use fuseblock.backend('reference') or the automatic choice, which falls back to it"
                )
            if plain_eager(args) and not wants_gradient(args):
                return self._impl(*args)
        return self.op(*args)

    def _build_function(self, setup: Formula, backward_formula: Formula, vmap_rule: Formula) -> Any:
        differentiable_op = self

        class OverOp(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return differentiable_op(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                setup(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward_formula(ctx, *grads)

            @staticmethod
            def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
                return vmap_rule(info, in_dims, *args)

        OverOp.__name__ = OverOp.__qualname__ = f"{self.name}_function"
        return OverOp

    def cast_for_autocast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as autocast, if it is on, hands them to the operator."""
        if self._autocast is None:
            return args
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if device in _AUTOCAST_KEYS and torch.is_autocast_enabled(device):
            return self._autocast(torch.get_autocast_dtype(device), args)
        return args

    def _register_autocast(self) -> None:
        for device, key_name in _AUTOCAST_KEYS.items():
            keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

            def cast_and_call(*args: Any, _device: str = device, _keys: Any = keyset) -> Any:
                assert self._autocast is not None
                with torch._C._ExcludeDispatchKeyGuard(_keys):
                    return self.op(*self._autocast(torch.get_autocast_dtype(_device), args))

            _LIB.impl(self.name, cast_and_call, key_name)


def loop_vmap(op: Callable[..., Any]) -> Formula:
    """A batching rule that runs ``op`` once per example and stacks: right for every argument, fast for none."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        per_example = []
        for n in range(info.batch_size):
            picked = [a if d is None else a.select(d, n) for a, d in zip(args, in_dims, strict=True)]
            per_example.append(op(*picked))
        outputs = tuple(torch.stack(columns) for columns in zip(*per_example, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def no_third_order(name: str) -> tuple[Formula, Formula]:
    """(setup_context, backward) of an operator whose own derivative is not implemented."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del ctx, inputs, output

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} is a second derivative; third derivatives need fuseblock.backend('reference')"
        )

    return setup_context, backward


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of cell states and accumulation: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
