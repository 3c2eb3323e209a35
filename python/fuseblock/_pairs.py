"""Finding the activation modules of a model that follow a norm, which can apply them, or a convolution."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from .nn.activation import APPLIED, LeakyReLU, ReLU

#: The norms that can apply an activation.
NORMS = (
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d,
)

#: Rectifiers that can write over the output of the convolution before them.
RECTIFIERS = (torch.nn.ReLU, torch.nn.LeakyReLU, ReLU, LeakyReLU)


@dataclass(frozen=True)
class Pair:
    """An activation and the norm or convolution before it, by qualified name, or the reason why they stay two."""

    source_name: str
    source: torch.nn.Module
    act_name: str
    act: torch.nn.Module
    reason: str | None

    @property
    def is_norm(self) -> bool:
        """Whether the norm can apply the activation; else the activation can write over the convolution's output."""
        return _is_norm(self.source)


class _LeafTracer(torch.fx.Tracer):
    """Looks at one module's own forward; whatever it calls is a leaf."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True


def find_pairs(model: torch.nn.Module) -> Iterator[Pair]:
    """Every activation that follows a norm or convolution directly, in a `torch.nn.Sequential` or in a traced forward."""
    parents = [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    places = Counter(id(child) for _, parent in parents for child in parent._modules.values())
    for name, parent in parents:
        prefix = f"{name}." if name else ""
        for source_name, act_name, reason in _neighbours(parent):
            source, act = parent.get_submodule(source_name), parent.get_submodule(act_name)
            if places[id(source)] > 1 or places[id(act)] > 1:
                reason = "it stands in several places"
            yield Pair(prefix + source_name, source, prefix + act_name, act, reason or _obstacle(source, act))


def _neighbours(parent: torch.nn.Module) -> Iterator[tuple[str, str, str | None]]:
    """(norm or convolution, activation, reason against it) of the parent's own children."""
    children = [
        (name, child) for name, child in parent._modules.items() if child is not None
    ]  # duplicates, too
    if type(parent).forward is torch.nn.Sequential.forward and "forward" not in parent.__dict__:
        for (first, source), (second, act) in pairwise(children):
            if _fit(source, act):
                yield first, second, None
        return
    own = dict(children)
    if not any(_fit(source, act) for source in own.values() for act in own.values()):
        return
    try:
        # On a shallow copy: what forward assigns to its module stays there.
        graph = _LeafTracer().trace(copy.copy(parent))
    except Exception:
        # Whatever a forward does with a proxy that it cannot do: then nothing is known of its order.
        norm = next((n for n, child in children if _is_norm(child)), None)
        for name, child in children:
            if norm is not None and type(child) in APPLIED:
                yield norm, name, "the forward that calls it cannot be traced"
        return
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        users = list(node.users)
        if len(users) != 1 or any(n.op != "call_module" or n.target not in own for n in (node, *users)):
            continue
        names = str(node.target), str(users[0].target)
        if _fit(*(own[name] for name in names)):
            shared = any(calls[name] > 1 for name in names)
            yield *names, "it is called several times" if shared else None


def _is_norm(module: torch.nn.Module) -> bool:
    return type(module) in NORMS


def _fit(source: torch.nn.Module, act: torch.nn.Module) -> bool:
    """Whether the norm could apply the activation, or the activation write over the convolution's output."""
    if _is_norm(source):
        return type(act) in APPLIED
    return isinstance(source, torch.nn.modules.conv._ConvNd) and type(act) in RECTIFIERS


def _obstacle(source: torch.nn.Module, act: torch.nn.Module) -> str | None:
    if isinstance(act, torch.nn.ELU) and act.alpha != 1:
        return f"its alpha is {act.alpha}, the fused ELU has 1"
    for module in (source, act):
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        # A hook on the source would see activated values, one on an applied activation the values twice.
        if any(hooks):
            return "hooks on it or on the module before it see what lies between"
        if "forward" in module.__dict__:
            return "its forward or that of the module before it was replaced on the instance"
    return None
