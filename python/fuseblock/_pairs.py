"""Finding the norm and activation modules of a model that can run as one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from .nn.activation import APPLIED

#: The norms that can apply an activation.
NORMS = (
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d,
)


@dataclass(frozen=True)
class Pair:
    """An activation and the norm before it, by qualified name, or the reason why they stay two."""

    norm_name: str
    norm: torch.nn.Module
    act_name: str
    act: torch.nn.Module
    reason: str | None


class _LeafTracer(torch.fx.Tracer):
    """Looks at one module's own forward; whatever it calls is a leaf."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True


def find_pairs(model: torch.nn.Module) -> Iterator[Pair]:
    """Every activation that follows a norm directly, in a `torch.nn.Sequential` or in a traced forward."""
    parents = [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    places = Counter(id(child) for _, parent in parents for child in parent._modules.values())
    for name, parent in parents:
        prefix = f"{name}." if name else ""
        for norm_name, act_name, reason in _neighbours(parent):
            norm, act = parent.get_submodule(norm_name), parent.get_submodule(act_name)
            if places[id(norm)] > 1 or places[id(act)] > 1:
                reason = "it stands in several places"
            yield Pair(prefix + norm_name, norm, prefix + act_name, act, reason or _obstacle(norm, act))


def _neighbours(parent: torch.nn.Module) -> Iterator[tuple[str, str, str | None]]:
    """(norm, activation, reason against it) of the parent's own children."""
    children = [
        (name, child) for name, child in parent._modules.items() if child is not None
    ]  # duplicates, too
    if type(parent).forward is torch.nn.Sequential.forward and "forward" not in parent.__dict__:
        for (first, norm), (second, act) in pairwise(children):
            if _is_norm(norm) and _is_activation(act):
                yield first, second, None
        return
    norms, acts = ([n for n, child in children if kind(child)] for kind in (_is_norm, _is_activation))
    if not norms or not acts:
        return
    try:
        # On a shallow copy: what forward assigns to its module stays there.
        graph = _LeafTracer().trace(copy.copy(parent))
    except Exception:
        # Whatever a forward does with a proxy that it cannot do: then nothing is known of its order.
        for name in acts:
            yield norms[0], name, "the forward that calls it cannot be traced"
        return
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in norms:
            continue
        users = list(node.users)
        follower = users[0] if len(users) == 1 else None
        if follower is None or follower.op != "call_module" or follower.target not in acts:
            continue
        shared = calls[str(node.target)] > 1 or calls[str(follower.target)] > 1
        yield node.target, follower.target, "it is called several times" if shared else None


def _is_norm(module: torch.nn.Module) -> bool:
    return type(module) in NORMS


def _is_activation(module: torch.nn.Module) -> bool:
    return type(module) in APPLIED


def _obstacle(norm: torch.nn.Module, act: torch.nn.Module) -> str | None:
    if isinstance(act, torch.nn.ELU) and act.alpha != 1:
        return f"its alpha is {act.alpha}, the fused ELU has 1"
    for module in (norm, act):
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        # A hook on the norm would see activated values, one on the activation the values twice.
        if any(hooks):
            return "hooks on it or on its norm see what lies between"
        if "forward" in module.__dict__:
            return "its forward or its norm's was replaced on the instance"
    return None
