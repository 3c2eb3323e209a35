"""Spectral normalisation of all layers of a model, in one call a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from ..functional import spectral_norm as normalize

__all__ = ["remove_spectral_norm", "spectral_norm"]

_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
_TYPES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, *_TRANSPOSED)
_FIRST_ITERATIONS = 15


def spectral_norm(
    model: torch.nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    types: tuple[type, ...] = _TYPES,
) -> torch.nn.Module:
    r"""Divide the weight of every convolution and linear layer of a model by its largest singular value.

    .. math:: \hat W = W / \sigma, \quad \sigma = u^\top W v

    The mathematics of :func:`torch.nn.utils.parametrizations.spectral_norm` on each layer, with all layers in one call: one
    power iteration a layer at every forward of ``model`` in training mode, none for layers in evaluation mode. The gradient
    goes through :math:`\sigma` with :math:`u` and :math:`v` as constants and can be differentiated again.

    A layer's parameter ``weight`` becomes the parameter ``weight_orig``, at the same place among its parameters, and the
    buffers ``weight_u`` and ``weight_v`` join it. ``weight`` is a plain tensor while the model's ``forward`` runs and does
    not exist outside of it. A layer that is called on its own (``model.features(x)``) normalises its weight itself, with a
    power iteration in training mode.

    `torch.utils.checkpoint` of the model or a part of it: what it recomputes in a backward is normalised with the u and v
    of the last forward, without a further iteration. So gradients are right for one forward in training mode a backward,
    and **wrong, without an error, for all but the last of several** (D(real) and D(fake) before one ``backward()``): call
    ``backward()`` after each, pass both batches as one, or do not checkpoint. (PyTorch's parametrization iterates once more
    in the recomputation: gradients differ after one forward already.)

    Checkpoints: the keys are those of the older :func:`torch.nn.utils.spectral_norm` (``weight_orig``, ``weight_u``,
    ``weight_v``), and load both ways. Those of ``parametrizations.spectral_norm`` are understood when they are loaded; the
    other way, rename ``weight_orig`` to ``parametrizations.weight.original`` and ``weight_u``, ``weight_v`` to
    ``parametrizations.weight.0._u``, ``._v``.

    Several processes: the power iteration depends on weights and buffers alone (in the compiled kernels its bits do not even
    depend on the number of threads), so ranks that begin with equal ones stay equal. `DistributedDataParallel` broadcasts
    both when it is built; with ``broadcast_buffers=False`` it does not, and the ranks have to be seeded alike. The graph
    does not refer to the buffers, so that their broadcast in every forward does no harm to two forwards before one backward.

    Under `torch.nn.DataParallel` every replica normalises its layers one by one; the model keeps the first one's u and v.

    Args:
        model: any module; wrappers (`DistributedDataParallel`) go around it afterwards.
        name: name of the weight in each layer.
        n_power_iterations: power iterations in each forward.
        eps: smallest norm that is divided by in the power method.
        dim: dimension of the output channels; None: 1 for transposed convolutions, else 0.
        types: classes of the layers; default: linear layers, convolutions and transposed convolutions.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no such layer, one is spectrally normalised or parametrized already, a weight has fewer than two
            dimensions or is not initialised yet, or ``n_power_iterations`` is not positive.

    Example::

        >>> import torch, fuseblock
        >>> critic = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 1))
        >>> critic = fuseblock.nn.spectral_norm(critic)
        >>> critic(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 1])
        >>> sorted(critic.state_dict())[:4]
        ['0.bias', '0.weight_orig', '0.weight_u', '0.weight_v']
    """
    if n_power_iterations <= 0:
        raise ValueError(f"spectral_norm: expected n_power_iterations > 0, got {n_power_iterations}")
    layers = [m for m in model.modules() if isinstance(m, types) and _has(m, name)]
    if not layers:
        raise ValueError(
            f"spectral_norm: the model has no layer of the types {types} with a parameter {name!r}"
        )
    for layer in layers:
        _check(layer, name, dim)
    BatchedSpectralNorm(model, name, n_power_iterations, eps, dim, layers)
    return model


def remove_spectral_norm(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `spectral_norm`: every weight becomes a parameter again, with its normalised value as of now.

    The Parameter objects stay (an optimizer's references remain valid); there is no further power iteration.

    Returns:
        ``model``.

    Raises:
        ValueError: `spectral_norm` was not applied to ``model`` itself.
    """
    found = _states(model)
    if not found:
        raise ValueError("remove_spectral_norm: spectral_norm was not applied to this module")
    for state in found:
        state.remove()
    return model


def _states(model: torch.nn.Module) -> list[BatchedSpectralNorm]:
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, BatchedSpectralNorm) and owner.model is model]


def _has(layer: torch.nn.Module, name: str) -> bool:
    return hasattr(layer, f"{name}_orig") or isinstance(getattr(layer, name, None), Tensor)


def _check(layer: torch.nn.Module, name: str, dim: int | None) -> None:
    if hasattr(layer, f"{name}_orig") or is_parametrized(layer, name):
        raise ValueError(f"spectral_norm: {name!r} of {layer} is normalised or parametrized already")
    weight = layer._parameters.get(name)
    if weight is None or torch.nn.parameter.is_lazy(weight):
        raise ValueError(f"spectral_norm: expected an initialised parameter {name!r} in {layer}")
    if weight.dim() < 2:
        raise ValueError(
            f"spectral_norm: expected {name!r} of two or more dimensions in {layer}, got {weight.dim()}"
        )
    if dim is not None and not -weight.dim() <= dim < weight.dim():
        raise ValueError(
            f"spectral_norm: expected dim to be one of the {weight.dim()} of {name!r} in {layer}, got {dim}"
        )


def _dim(layer: torch.nn.Module, dim: int | None) -> int:
    if dim is None:
        return 1 if isinstance(layer, _TRANSPOSED) else 0
    return dim


class BatchedSpectralNorm:
    """The hooks of one call of `spectral_norm`, and what they need.

    An object, not closures: it is copied and pickled together with the model, and then belongs to the copy.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        n_power_iterations: int,
        eps: float,
        dim: int | None,
        layers: list[torch.nn.Module],
    ) -> None:
        self.model, self.name, self.n_power_iterations, self.eps = model, name, n_power_iterations, eps
        self.dim, self.layers = dim, layers
        self.handles: list[RemovableHandle] = []
        # The weights of the last forward that a checkpoint without reentry (or another user of saved-tensor hooks) may
        # recompute the layer with: what the graph refers to must be the same tensors.
        self.checkpointed: dict[torch.nn.Module, Tensor] = {}
        #: Layers that have normalised their weight themselves, in a call of their own that is running.
        self.alone: set[torch.nn.Module] = set()
        for layer in layers:
            self._convert(layer, _dim(layer, dim))
            self.handles += [
                layer.register_load_state_dict_pre_hook(self._translate),
                layer.register_forward_pre_hook(self._before_layer),
                layer.register_forward_hook(self._after_layer, always_call=True),
            ]
        self.handles += [
            # First, also where the model is itself a layer.
            model.register_forward_pre_hook(self._before_model, prepend=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "checkpointed": {}}  # parts of a graph are not copied

    def _convert(self, layer: torch.nn.Module, dim: int) -> None:
        name = self.name
        _rename(layer, name, f"{name}_orig")
        with torch.no_grad():
            weight = getattr(layer, f"{name}_orig")
            n_out = weight.shape[dim]
            u, v = (weight.new_empty(n).normal_() for n in (n_out, weight.numel() // n_out))
            u, v = (torch.nn.functional.normalize(x, dim=0, eps=self.eps) for x in (u, v))
            normalize([weight], [u], [v], dims=[dim], n_power_iterations=_FIRST_ITERATIONS, eps=self.eps)
        layer.register_buffer(f"{name}_u", u)
        layer.register_buffer(f"{name}_v", v)

    def _set_weights(self, layers: list[torch.nn.Module], n_power_iterations: int) -> None:
        name = self.name
        weights = normalize(
            [getattr(layer, f"{name}_orig") for layer in layers],
            [getattr(layer, f"{name}_u") for layer in layers],
            [getattr(layer, f"{name}_v") for layer in layers],
            dims=[_dim(layer, self.dim) for layer in layers],
            n_power_iterations=n_power_iterations,
            eps=self.eps,
        )
        for layer, weight in zip(layers, weights, strict=True):
            setattr(layer, name, weight)

    def _before_model(self, model: torch.nn.Module, args: Any) -> None:
        if model is not self.model:
            return  # a replica of DataParallel, whose layers help themselves
        update = not _recomputing()
        training = [layer for layer in self.layers if layer.training and update]
        frozen = [layer for layer in self.layers if not (layer.training and update)]
        if training:
            self._set_weights(training, self.n_power_iterations)
        if frozen:
            self._set_weights(frozen, 0)

    def _after_model(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if model is self.model:
            for layer in self.layers:
                self._forget_weight(layer)

    def _before_layer(self, layer: torch.nn.Module, args: Any) -> None:
        if self.name in layer.__dict__:
            if not is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                self.checkpointed[layer] = layer.__dict__[self.name]
            return
        recomputing = _recomputing()
        if recomputing and layer in self.checkpointed:
            setattr(layer, self.name, self.checkpointed[layer])
        else:
            self._set_weights([layer], self.n_power_iterations if layer.training and not recomputing else 0)
        self.alone.add(layer)

    def _after_layer(self, layer: torch.nn.Module, args: Any, output: Any) -> None:
        if layer in self.alone:
            self.alone.remove(layer)
            self._forget_weight(layer)

    def _forget_weight(self, layer: torch.nn.Module) -> None:
        # Not `__dict__.pop`, which dynamo of torch 2.11 does not know.
        if self.name in layer.__dict__:
            delattr(layer, self.name)

    def _translate(self, layer: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the keys of `torch.nn.utils.parametrizations.spectral_norm` as well."""
        name = self.name
        theirs = f"{prefix}parametrizations.{name}."
        for key, ours in (("original", "orig"), ("0._u", "u"), ("0._v", "v")):
            if theirs + key in state_dict:
                state_dict[f"{prefix}{name}_{ours}"] = state_dict.pop(theirs + key)

    def remove(self) -> None:
        name = self.name
        for handle in self.handles:
            handle.remove()
        with torch.no_grad():
            self._set_weights(self.layers, 0)
            for layer in self.layers:
                parameter = layer._parameters[f"{name}_orig"]
                assert parameter is not None
                parameter.copy_(layer.__dict__.pop(name))
                _rename(layer, f"{name}_orig", name)
                del layer._buffers[f"{name}_u"], layer._buffers[f"{name}_v"]


def _recomputing() -> bool:
    """Whether a backward is running, where a checkpoint has to meet the weights of its forward."""
    # A compiler's trace is no backward, and cannot ask.
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def _rename(layer: torch.nn.Module, old: str, new: str) -> None:
    """Rename a parameter, which keeps its place among the layer's."""
    parameters = [(new if key == old else key, value) for key, value in layer._parameters.items()]
    layer._parameters.clear()
    layer._parameters.update(parameters)
