"""`fuse` and `unfuse`: swap the modules of an existing model for fuseblock's, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils import parametrize

from . import nn
from ._pairs import find_pairs, profits
from .nn.activation import APPLIED

_FUSED: dict[type, type] = {
    torch.nn.Sequential: nn.Sequential,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.Conv1d: nn.Conv1d,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.ConvTranspose1d: nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d: nn.ConvTranspose2d,
    torch.nn.BatchNorm1d: nn.BatchNormAct1d,
    torch.nn.BatchNorm2d: nn.BatchNormAct2d,
    torch.nn.BatchNorm3d: nn.BatchNormAct3d,
    torch.nn.InstanceNorm1d: nn.InstanceNormAct1d,
    torch.nn.InstanceNorm2d: nn.InstanceNormAct2d,
    torch.nn.ReLU: nn.ReLU,
    torch.nn.LeakyReLU: nn.LeakyReLU,
}
_BLOCKS = (nn.Conv1dBlock, nn.Conv2dBlock, nn.ConvTranspose1dBlock, nn.ConvTranspose2dBlock)
_STOCK: dict[type, type] = {
    **{fused: stock for stock, fused in _FUSED.items()},
    **dict.fromkeys(_BLOCKS, torch.nn.Sequential),
}
_UNAPPLIED: dict[type, type] = {applied: stock for stock, applied in APPLIED.items()}

#: What is listed when it is left: the kinds of module that a reader expects to be swapped.
_KINDS = (
    torch.nn.RNNBase,
    torch.nn.RNNCellBase,
    torch.nn.modules.conv._ConvNd,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.modules.instancenorm._InstanceNorm,
    torch.nn.ReLU,
    torch.nn.LeakyReLU,
)


@dataclass(frozen=True)
class FuseEntry:
    """One module of the model: its qualified name, its class and what happened to it."""

    name: str
    """Qualified name in the model; empty for the model itself."""
    before: str
    """Its class before the call, for example ``torch.nn.LSTM``."""
    outcome: str
    """Its class after the call if it was swapped, else the reason why it was left."""

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {self.before}"


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` or `unfuse` did. `str(report)` is what ``verbose=True`` prints."""

    action: str
    swapped: tuple[FuseEntry, ...]
    skipped: tuple[FuseEntry, ...]

    def __str__(self) -> str:
        done, left = len(self.swapped), len(self.skipped)
        lines = [f"{self.action}: {done} module{'' if done == 1 else 's'} swapped, {left} left"]
        lines += [f"  swapped  {entry} -> {entry.outcome}" for entry in self.swapped]
        lines += [f"  left     {entry}: {entry.outcome}" for entry in self.skipped]
        return "\n".join(lines)


def fuse(model: torch.nn.Module, *, verbose: bool = True) -> FuseReport:
    """Make the modules in ``model`` that fuseblock has kernels for `fuseblock.nn` ones, in place.

    Swapped are `torch.nn.LSTM`, `LSTMCell`, `Conv1d`, `Conv2d`, `ConvTranspose1d`, `ConvTranspose2d`, `BatchNorm1d` to
    `3d`, `InstanceNorm1d`, `2d`, `ReLU`, `LeakyReLU`, and each `Sequential` in which an activation (ReLU, LeakyReLU, PReLU,
    SiLU, Tanh, ELU) follows a norm or a convolution, or a batch norm a convolution: it runs the two as one, while they
    themselves do what they did when they are called by themselves (`fuseblock.nn.Sequential`).

    In other forwards a norm applies the activation that follows it directly, if `torch.fx` can trace the forward, it takes
    one way only, and no other method of its class names the norm. Whoever calls such a norm from outside gets activated
    values; the report says ``applied by``. An activation whose norm was exchanged later applies itself.

    Only the class of each module object changes (and such a norm gets a reference to its activation). Parameters, buffers,
    ``state_dict`` keys, hooks, names, training mode, device, sharing between modules and an optimizer's references stay as
    they are, and ``model`` itself may be such a module. Modules with parametrizations are swapped too.

    Left alone, with the reason in the report: subclasses (their forward may differ), modules whose ``forward`` was
    replaced on the instance, TorchScript and quantized modules, kinds without a fused version such as `torch.nn.GRU`, and
    norms and activations with hooks on them, and in other forwards those in several places or called several times.

    Args:
        model: any module.
        verbose: print the report.

    Returns:
        FuseReport: ``swapped`` and ``skipped`` entries; modules of other kinds are not listed.

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.

    Example::

        >>> import torch, fuseblock
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(4, 8), "head": torch.nn.Linear(8, 1)})
        >>> report = fuseblock.fuse(model)
        fuse: 1 module swapped, 0 left
          swapped  rnn: torch.nn.LSTM -> fuseblock.nn.LSTM
        >>> _ = fuseblock.unfuse(model, verbose=False)
        >>> type(model["rnn"])
        <class 'torch.nn.modules.rnn.LSTM'>
    """
    _check("fuse", model)
    applied, apart = [], []
    for pair in find_pairs(model):
        entry = (pair.act_name, _class_name(pair.act))
        if pair.reason is not None:
            apart.append(FuseEntry(*entry, f"not applied by {pair.norm_name}: {pair.reason}"))
            continue
        if not pair.in_sequential:
            pair.norm.applies = (pair.act,)  # type: ignore[assignment]
            pair.act.__class__ = APPLIED[type(pair.act)]
        applied.append(FuseEntry(*entry, f"applied by {pair.norm_name}"))
    told = {entry.name for entry in applied}
    swapped, skipped = _swap(model, _FUSED, _KINDS)
    swapped = [entry for entry in swapped if entry.name not in told] + applied
    skipped += apart
    return _reported(FuseReport("fuse", tuple(swapped), tuple(skipped)), verbose)


def unfuse(model: torch.nn.Module, *, verbose: bool = True) -> FuseReport:
    """Make the `fuseblock.nn` modules in ``model`` `torch.nn` ones, in place.

    The exact inverse of `fuse`. Modules that were constructed as `fuseblock.nn` ones become stock modules
    as well, since what asks for it (``torch.jit.script``, ONNX export) needs a model without custom
    operators, or looks into modules (``torch.fx``); `fuse` brings them back, a block as a `fuseblock.nn.Sequential`. Left is
    a norm constructed with an activation that has no module of its own; a subclass of `fuseblock.nn.Sequential` stays one,
    around stock modules, which it runs as `torch.nn.Sequential` does. Arguments, result and errors are those of `fuse`.
    """
    _check("unfuse", model)
    swapped, skipped = _swap(model, _STOCK | _UNAPPLIED, tuple(_STOCK | _UNAPPLIED))
    for module in model.modules():
        module.__dict__.pop("applies", None)
    return _reported(FuseReport("unfuse", tuple(swapped), tuple(skipped)), verbose)


def _check(action: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{action}: model must be a torch.nn.Module, got {type(model).__name__}")


def _reported(report: FuseReport, verbose: bool) -> FuseReport:
    if verbose:
        print(report)
    return report


def _swap(
    model: torch.nn.Module, targets: dict[type, type], kinds: tuple[type, ...]
) -> tuple[list[FuseEntry], list[FuseEntry]]:
    """Change the classes named in ``targets``; what was swapped, and what of ``kinds`` was left."""
    swapped, skipped = [], []
    for name, module in list(model.named_modules()):
        listed = isinstance(module, kinds)
        if isinstance(module, torch.nn.Sequential):  # of a subclass, the modules in it are listed
            listed = listed and type(module) in targets
        if targets is _FUSED:
            listed = (listed and type(module) not in _UNAPPLIED) or _is_compiled_lstm(module)
            listed = listed or (type(module) is torch.nn.Sequential and profits(module))
        if not listed:
            continue
        before = _class_name(module)
        reason = _obstacle(module, targets)
        if reason is None:
            module.__class__ = _counterpart(type(module), targets)
            swapped.append(FuseEntry(name, before, _class_name(module)))
        else:
            skipped.append(FuseEntry(name, before, reason))
    return swapped, skipped


def _is_compiled_lstm(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in ("LSTM", "LSTMCell")
    return type(module).__module__.startswith("torch.ao.nn") and "LSTM" in type(module).__name__


def _obstacle(module: torch.nn.Module, targets: dict[type, type]) -> str | None:
    """Why the module cannot be swapped, or None."""
    cls = _plain_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module; its code is compiled already"
    if type(module).__module__.startswith("torch.ao.nn"):
        return "a quantized module"
    if cls in targets:
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance, so a change of class would have no effect"
        own = getattr(module, "activation", "identity")
        if isinstance(own, str) and own != "identity":
            return "it applies an activation that has no module of its own"
        return None
    if cls in targets.values():
        return "it is one already"
    nearest = next((base for base in cls.__mro__ if base in _FUSED or base in _STOCK), None)
    if nearest is None:
        return "fuseblock has no fused version of it"
    return f"a subclass of {_qualified(nearest)}; its forward may differ"


def _plain_class(module: torch.nn.Module) -> type:
    """The module's class without the subclass that torch.nn.utils.parametrize gave it."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) and len(cls.__bases__) == 1 else cls


def _counterpart(cls: type, targets: dict[type, type]) -> type:
    if cls in targets:
        return targets[cls]
    # A parametrized module's own class. deepcopy shares it between copies, so it is rebuilt, not edited.
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (targets[cls.__bases__[0]],), namespace)


def _class_name(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"torch.jit.ScriptModule of {module.original_name}"
    cls = _plain_class(module)
    return _qualified(cls) + (" (parametrized)" if cls is not type(module) else "")


def _qualified(cls: type) -> str:
    """The public name: torch.nn.LSTM rather than torch.nn.modules.rnn.LSTM."""
    for package in (torch.nn, nn):
        if vars(package).get(cls.__name__) is cls:
            return f"{package.__name__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
