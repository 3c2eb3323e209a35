"""Finding the norms of a model and the activations that follow them directly.

In a `torch.nn.Sequential` they are neighbours. Other forwards are traced by `torch.fx`, which sees one way through them;
so forwards that choose their way are left alone, and so are pairs that other methods name.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType

import torch

from .nn.activation import APPLIED, unusual

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
    in_sequential: bool
    """Whether they are neighbours in a `torch.nn.Sequential` itself, which can pair them at every call."""


_OF_ANY_MODULE = frozenset(vars(torch.nn.Module()))


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
        in_sequential = type(parent) is torch.nn.Sequential and "forward" not in parent.__dict__
        for norm_name, act_name, reason in _neighbours(parent):
            norm, act = parent.get_submodule(norm_name), parent.get_submodule(act_name)
            if not in_sequential and (places[id(norm)] > 1 or places[id(act)] > 1):
                reason = "it stands in several places"
            if isinstance(act, torch.nn.ELU) and act.alpha != 1:
                reason = f"its alpha is {act.alpha}, the fused ELU has 1"
            elif unusual(norm) or unusual(act):
                reason = "there are hooks on it or on its norm, or a forward of their own"
            yield Pair(prefix + norm_name, norm, prefix + act_name, act, reason, in_sequential)


_CONVOLUTIONS_2D = torch.nn.Conv2d, torch.nn.ConvTranspose2d


def profits(sequential: torch.nn.Module) -> bool:
    """Whether a `torch.nn.Sequential` has neighbours that `fuseblock.nn.Sequential` runs as one."""
    rectifiers = torch.nn.ReLU, torch.nn.LeakyReLU
    # On a GPU, where a table says so.
    of_kernels = torch.nn.BatchNorm2d, torch.nn.Tanh
    return any(
        (isinstance(first, NORMS) and type(second) in APPLIED)
        or (isinstance(first, torch.nn.modules.conv._ConvNd) and isinstance(second, rectifiers))
        or (isinstance(first, _CONVOLUTIONS_2D) and isinstance(second, of_kernels))
        for first, second in pairwise(sequential._modules.values())
    )


def _neighbours(parent: torch.nn.Module) -> Iterator[tuple[str, str, str | None]]:
    """(norm, activation, reason against it) of the parent's own children."""
    children = [
        (name, child) for name, child in parent._modules.items() if child is not None
    ]  # duplicates, too
    if type(parent).forward is torch.nn.Sequential.forward and "forward" not in parent.__dict__:
        for (first, norm), (second, act) in pairwise(children):
            if type(norm) in NORMS and type(act) in APPLIED:
                yield first, second, None
        return
    norms = [name for name, child in children if type(child) in NORMS]
    acts = [name for name, child in children if type(child) in APPLIED]
    if not norms or not acts:
        return
    reason = None
    try:
        if _chooses(type(parent).forward):
            reason = "the forward that calls it has several ways"
        graph = _trace(parent)
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
        names = str(node.target), str(follower.target)
        if any(calls[name] > 1 for name in names):
            yield *names, "it is called several times"
        elif _named_elsewhere(type(parent), names[0]):
            yield *names, f"other methods call {names[0]}"
        else:
            yield *names, reason


def _trace(parent: torch.nn.Module) -> torch.fx.Graph:
    """The parent's forward, run with stand-ins for tensors; what it does to itself and to random numbers is undone."""
    twin = copy.copy(parent)
    twin.__dict__["_buffers"] = {k: None if b is None else b.clone() for k, b in parent._buffers.items()}
    for name, value in vars(parent).items():
        if name not in _OF_ANY_MODULE and isinstance(value, list | dict | set | torch.Tensor):
            twin.__dict__[name] = copy.copy(value)
    with torch.random.fork_rng(devices=[]):
        return _LeafTracer().trace(twin)


def _chooses(forward: object) -> bool:
    """Whether the function may take several ways. Whether a module is there (``is None``) is no choice of a call."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))  # type: ignore[arg-type]
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)]
    if any(isinstance(node, ast.Match | ast.Try) for node in ast.walk(tree)):
        return True
    return not all(
        isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.Is | ast.IsNot)
        and isinstance(test.comparators[0], ast.Constant)
        for test in tests
    )


def _named_elsewhere(cls: type, name: str) -> bool:
    """Whether a method other than forward and __init__ uses the attribute."""
    return any(
        isinstance(value, FunctionType) and name in value.__code__.co_names
        for base in cls.__mro__
        if base is not torch.nn.Module
        for method, value in vars(base).items()
        if method not in ("forward", "__init__")
    )
