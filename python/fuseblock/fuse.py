"""`fuse` and `unfuse`: swap the LSTM modules of an existing model for fuseblock's, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils import parametrize

from .nn import LSTM, LSTMCell

_FUSED: dict[type, type] = {torch.nn.LSTM: LSTM, torch.nn.LSTMCell: LSTMCell}
_STOCK: dict[type, type] = {fused: stock for stock, fused in _FUSED.items()}
_RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)


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
    """Make every `torch.nn.LSTM` and `torch.nn.LSTMCell` in ``model`` a `fuseblock.nn` one, in place.

    Only the class of each module object changes. Parameters, buffers, hooks, names, training mode, device,
    sharing between modules and an optimizer's references stay as they are, and ``model`` itself may be an
    LSTM. Modules with parametrizations are swapped too.

    Left alone, with the reason in the report: subclasses (their forward may differ), modules whose
    ``forward`` was replaced on the instance, TorchScript and quantized modules, and other recurrent modules
    such as `torch.nn.GRU`.

    Args:
        model: any module.
        verbose: print the report.

    Returns:
        FuseReport: ``swapped`` and ``skipped`` entries; only recurrent modules are listed.

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
    return _swap(model, "fuse", _FUSED, verbose)


def unfuse(model: torch.nn.Module, *, verbose: bool = True) -> FuseReport:
    """Make every `fuseblock.nn.LSTM` and `fuseblock.nn.LSTMCell` in ``model`` a `torch.nn` one, in place.

    The exact inverse of `fuse`. Modules that were constructed as `fuseblock.nn` ones become stock modules
    as well, since what asks for it (``torch.jit.script``, ONNX export) needs a model without custom
    operators; `fuse` brings them back. Arguments, result and errors are those of `fuse`.
    """
    return _swap(model, "unfuse", _STOCK, verbose)


def _swap(model: torch.nn.Module, action: str, targets: dict[type, type], verbose: bool) -> FuseReport:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{action}: model must be a torch.nn.Module, got {type(model).__name__}")
    swapped, skipped = [], []
    for name, module in list(model.named_modules()):
        if not (_is_recurrent(module) if action == "fuse" else isinstance(module, tuple(targets))):
            continue
        before = _class_name(module)
        reason = _obstacle(module, targets)
        if reason is None:
            module.__class__ = _counterpart(type(module), targets)
            swapped.append(FuseEntry(name, before, _class_name(module)))
        else:
            skipped.append(FuseEntry(name, before, reason))
    report = FuseReport(action, tuple(swapped), tuple(skipped))
    if verbose:
        print(report)
    return report


def _is_recurrent(module: torch.nn.Module) -> bool:
    if isinstance(module, _RECURRENT):
        return True
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
        return None
    if cls in targets.values():
        return "it is one already"
    if not isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell)):
        return "fuseblock has no fused version of it"
    return f"a subclass of {_qualified(_nearest(cls))}; its forward may differ"


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


def _nearest(cls: type) -> type:
    return next(base for base in cls.__mro__ if base in _FUSED or base in _STOCK)


def _class_name(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return f"torch.jit.ScriptModule of {module.original_name}"
    cls = _plain_class(module)
    return _qualified(cls) + (" (parametrized)" if cls is not type(module) else "")


def _qualified(cls: type) -> str:
    """The public name: torch.nn.LSTM rather than torch.nn.modules.rnn.LSTM."""
    for package, names in (
        ("torch.nn", vars(torch.nn)),
        ("fuseblock.nn", {"LSTM": LSTM, "LSTMCell": LSTMCell}),
    ):
        if names.get(cls.__name__) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
