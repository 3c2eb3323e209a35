"""``fuseblock.explain``: who would run a call, who cannot, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _conv_engine, dispatch, functional
from ._engine import choose_engine, layer_dtype
from ._fused_layer import why_not_fused
from ._library import faking, plain_eager, state_dtype, wants_gradient
from ._ragged import packing
from ._recompute import LayerWeights
from .functional import _lstm, _spectral

if TYPE_CHECKING:
    from .nn._fused_convolution import Decision


@dataclass(frozen=True)
class Explanation:
    """Outcome of `explain`.

    Attributes:
        op: what was asked about.
        chosen: name of the engine or backend that would run.
        reasons: (name, reason) of every candidate in order of preference; reason None means that it can run.
        rule: why the chosen one is preferred to others that can run: a measurement in a table, or the plain rule.
        parts: further operators of the call: of a stack that our engine runs on a GPU, those of each layer; of a block,
            those behind the first.
    """

    op: str
    chosen: str
    reasons: tuple[tuple[str, str | None], ...]
    rule: str
    parts: tuple[Explanation, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}", f"  rule: {self.rule}"]
        lines += [f"  {name:<22} {reason or 'can run'}" for name, reason in self.reasons]
        lines += [f"  {line}" for part in self.parts for line in str(part).splitlines()]
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Explain who would run ``op`` on these arguments under the backend now in force.

    Args:
        op: ``"block"`` (a `Sequential` or `ResidualBlock2d`, and its input: whether PyTorch's convolution or one of ours
            runs, for each convolution with what stands behind it and, in backward, for each batch norm with the convolution
            behind it, up to a module whose result only a call can tell), ``"lstm"`` (arguments of `functional.lstm`: the
            engine of the stack, and which of its layers run fused, input projection included), ``"spectral_norm"``
            (arguments of `functional.spectral_norm`), or an operator's name, e.g. ``"lstm_gates"`` or
            ``"lstm_recurrence_bwd"``, with the operator's arguments.

    Returns:
        An `Explanation`; print it. Explained are operators. Unless a backend is forced, functions and modules do not come
        to theirs where PyTorch's own operations are faster: for float32 and float64 tensors on a CPU, `functional.bias_act`,
        `nn.BiasAct2d` and `nn.LeakyReLU` below 32,768 elements (prelu excepted), and `functional.batch_norm_act` and
        `nn.BatchNormAct2d` in evaluation mode without gradients up to 262,144. Convolutions are PyTorch's but for
        blocks on a GPU (``"block"``), and a `nn.ReLU` is, but for its gradient.

    Raises:
        ValueError: no such operator. TypeError: these are not its arguments. What an operator or a module raises
            of their shapes and dtypes.
    """
    if op == "lstm":
        call = _bound(op, functional.lstm, args, kwargs)
        return _explain_layer(*call.args, **call.kwargs)
    if op == "block":
        call = _bound(op, _explain_block, args, kwargs)
        return _explain_block(*call.args, **call.kwargs)
    if op == "spectral_norm":
        call = _bound(op, functional.spectral_norm, args, kwargs)
        for name in ("weights", "us", "vs"):
            for n, x in enumerate(call.arguments[name]):
                _check_tensor(op, f"{name}[{n}]", x)
        return _explain_spectral_norm(_spectral.arguments(*call.args, **call.kwargs))
    operators = [name for name in dispatch.operators() if hasattr(torch.ops.fuseblock, name)]
    if op not in operators:
        known = ", ".join(("block", "lstm", "spectral_norm", *operators))
        raise ValueError(f"explain: expected one of {known}, got {op!r}")
    _check_arguments(op, args, kwargs)
    return _explain_operator(op, args)


def _bound(
    op: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a function, defaults included."""
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain: {op}: {error}") from None
    call.apply_defaults()
    return call


def _check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: {op}: expected {name} as a Tensor, got {type(x).__name__}")


def _explain_block(block: torch.nn.Module, input: Tensor) -> Explanation:
    """The engine of each convolution and what stands behind it, and of each norm and the convolution behind that."""
    from .nn import ResidualBlock2d, Sequential  # modules stand on functions, and functions on this package
    from .nn._decisions import decisions, modules_of

    if not isinstance(block, (torch.nn.Sequential, ResidualBlock2d)):
        raise TypeError(
            f"explain: expected block as a Sequential or ResidualBlock2d, got {type(block).__name__}"
        )
    _check_tensor("block", "input", input)
    if not isinstance(block, (Sequential, ResidualBlock2d)):
        return _explain_apart("block", "PyTorch's Sequential runs its modules one by one (`fuse` swaps it)")
    names = {module: name for name, module in block.named_modules()}
    found = [  # a residual block's upsampling has no name
        (names.get(module, "-"), _explain_decision(op, decision))
        for module, op, decision in decisions(modules_of(block), input)
    ]
    if not found:
        return _explain_apart("block", "there is no convolution in it")
    (_, first), *others = found
    return replace(first, parts=tuple(replace(part, op=f"{part.op} at {name}") for name, part in others))


def _explain_decision(op: str, decision: Decision | None) -> Explanation:
    if decision is None:
        rule = "what it returns only a call can tell: explain what is behind it by itself"
        return Explanation(op, "unknown", (), rule)
    if isinstance(decision.call, str):
        return _explain_apart(op, decision.call)
    reasons = (("aten", None), ("triton", _conv_engine.why_not_triton(decision.call)))
    return Explanation(decision.call.op, decision.engine, reasons, decision.rule)


def _explain_apart(op: str, reason: str) -> Explanation:
    return Explanation(op, "aten", (("aten", None), ("triton", reason)), "the only one that can run")


def _explain_spectral_norm(args: tuple[Any, ...]) -> Explanation:
    """Forward and, where there are gradients, backward of all weights."""
    weights, us, vs, dims, *_ = args
    if not weights:
        raise ValueError("explain: expected weights, got none")
    forward = _explain_operator("spectral_norm", args)
    if not wants_gradient(weights):
        return forward
    dys = [w if w.requires_grad else None for w in weights]
    state = weights[0].new_empty(sum(u.numel() + v.numel() + 1 for u, v in zip(us, vs, strict=True)))
    backward = _explain_operator("spectral_norm_bwd", (dys, weights, state, dims), "backward")
    return replace(forward, parts=(backward,))


def _explain_operator(op: str, args: tuple[Any, ...], name: str = "") -> Explanation:
    name = name or op
    forced = f"backend {dispatch.forced()!r} is forced"
    reasons = tuple(
        (c.label, c.why_not(*args) or (None if dispatch.eligible(op, c) else forced))
        for c in dispatch.preference(op, args)
    )
    try:
        chosen = dispatch.choose(op, args)
    except dispatch.BackendError:
        return Explanation(name, "nobody", reasons, forced)
    return Explanation(name, chosen.label, reasons, dispatch.rule(op, args, chosen))


def _check_arguments(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError unless these are the positional arguments of the operator, and what it raises of their shapes."""
    operator = getattr(torch.ops.fuseblock, op).default
    wanted = operator._schema.arguments
    fits = not kwargs
    try:
        if fits:
            with torch.no_grad(), faking(args):
                operator(*args)
    except RuntimeError as error:
        # The schema's errors begin like this; others are the operator's own.
        fits = not str(error).startswith(f"fuseblock::{op}() ")
        if fits:
            raise
    if not fits:
        expected = ", ".join(f"{argument.type} {argument.name}" for argument in wanted)
        got = [type(x).__name__ for x in args] + [f"{k}={type(x).__name__}" for k, x in kwargs.items()]
        raise TypeError(f"explain: {op} expects ({expected}), got ({', '.join(got)})")


def _explain_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool,
    dropout: float,
    training: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    save_gates: bool,
) -> Explanation:
    directions = 2 if bidirectional else 1
    _check_tensor("lstm", "input", input)
    _lstm.check(h0, c0, weights, directions, lengths, batch_sizes)
    engine, rule = choose_engine(input, h0, c0, weights, directions, lengths, batch_sizes, save_gates)
    other = "aten" if engine == "ours" else "ours"
    reasons: list[tuple[str, str | None]] = [(engine, None), (other, "not chosen")]
    tensors = [input, h0, c0, *(x for w in weights for x in w)]
    parts: list[Explanation] = []
    if engine == "ours":
        dropout = dropout if training and len(weights) > directions else 0.0
        fused = _why_not_fused(tensors, weights, directions, dropout, lengths, batch_sizes)
        reasons += [(f"fused layer {n}", reason) for n, reason in enumerate(fused)]
        if input.is_cuda:
            parts = _explain_recurrences(
                input, weights, directions, lengths, batch_sizes, wants_gradient(tensors), fused
            )
    return Explanation("lstm", engine, tuple(reasons), rule, tuple(parts))


def _explain_recurrences(
    input: Tensor,
    weights: Sequence[LayerWeights],
    directions: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    training: bool,
    fused: Sequence[str | None],
) -> list[Explanation]:
    """Who runs each layer's recurrence on a GPU, forward unless it is fused and, in training, backward.

    Packed rows are padded before.
    """
    if batch_sizes is None:
        steps, batch = input.shape[:2]
    else:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
        lengths = input.new_empty(1, dtype=torch.int64).expand(batch)
    dtype = layer_dtype(input)

    def like(*shape: int, of: torch.dtype = dtype) -> Tensor:
        """Shape, dtype and device are all that choices look at, so one element is memory enough."""
        return input.new_empty((1,) * len(shape), dtype=of).expand(shape)

    parts = []
    for layer in range(len(weights) // directions):
        _, w_hh, _, _, w_hr = weights[layer * directions]
        hidden, proj = w_hh.shape[0] // 4, w_hh.shape[1]
        gx, h0 = like(steps, batch, directions * 4 * hidden), like(directions, batch, proj)
        c0, c = (
            like(n, batch, m, of=state_dtype(dtype))
            for n, m in ((directions, hidden), (steps, directions * hidden))
        )
        stacked = like(directions, *w_hh.shape), None if w_hr is None else like(directions, *w_hr.shape)
        forward = gx, h0, c0, *stacked, lengths, None, training
        if fused[layer] is not None:
            parts.append(_explain_operator("lstm_recurrence", forward, f"layer {layer}, forward"))
        if training:
            dy = like(steps, batch, directions * proj)
            backward = dy, None, None, None, None, gx, c, c0, *stacked, lengths, None
            parts.append(_explain_operator("lstm_recurrence_bwd", backward, f"layer {layer}, backward"))
    return parts


def _why_not_fused(
    tensors: list[Tensor | None],
    weights: Sequence[LayerWeights],
    directions: int,
    dropout: float,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
) -> list[str | None]:
    """Per layer the reason why it does not run fused, or None; a mirror of what `functional.lstm` does."""
    input = tensors[0]
    assert input is not None
    training = wants_gradient(tensors)
    if input.is_cuda and batch_sizes is not None:  # padded before
        lengths = input.new_empty(0, dtype=torch.int64)
        input = input.new_empty(1).expand(len(batch_sizes), int(batch_sizes[0]), input.shape[1])
    packed = None if lengths is None or input.device.type != "cpu" else packing(input, lengths)
    if packed is not None:
        input, lengths, batch_sizes = packed.pack(input), None, packed.batch_sizes
    reasons = why_not_fused(input, weights, directions, lengths, batch_sizes, training)
    everywhere = None
    if dropout:
        everywhere = "with dropout the layers run operator by operator"
    elif not plain_eager(tensors):
        everywhere = "a trace, a transform, autocast, a dispatch mode or a tensor subclass must see operators"
    elif any(reasons) and not training and not input.is_cuda:
        everywhere = "without gradients it runs all layers or none"
    return [reason or everywhere for reason in reasons]
