"""Comparing a fuseblock module with the torch.nn module that it replaces."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fuseblock

FUSED = {
    torch.nn.LSTM: fuseblock.nn.LSTM,
    torch.nn.LSTMCell: fuseblock.nn.LSTMCell,
    torch.nn.Conv1d: fuseblock.nn.Conv1d,
    torch.nn.Conv2d: fuseblock.nn.Conv2d,
    torch.nn.ConvTranspose1d: fuseblock.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d: fuseblock.nn.ConvTranspose2d,
}


def twins(
    stock_class: type, *args: Any, seed: int = 0, **kwargs: Any
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A stock module and a fuseblock module with equal weights."""
    torch.manual_seed(seed)
    stock = stock_class(*args, **kwargs)
    ours = FUSED[stock_class](*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and packed sequences, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [tensor for item in value or () for tensor in tensors_of(item)]


def with_leaves(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of nested inputs whose floating tensors are fresh leaves that require gradients, in their strides."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        leaf = torch.empty_strided(value.size(), value.stride(), dtype=dtype or value.dtype)
        return leaf.copy_(value.detach()).requires_grad_()
    if isinstance(value, PackedSequence):
        return value._replace(data=with_leaves(value.data, dtype))
    if isinstance(value, (tuple, list)):
        return type(value)(with_leaves(item, dtype) for item in value)
    return value


def weighted_sum(outputs: list[Tensor], seed: int = 1) -> Tensor:
    """Sum of every output times fixed random numbers, so that each element's gradient counts."""
    generator = torch.Generator().manual_seed(seed)
    terms = [(out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs]
    return torch.stack([term.double() for term in terms]).sum()


def evaluate(
    module: torch.nn.Module, args: tuple, kwargs: dict | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs and first gradients (inputs, states, parameters) by name, in float64."""
    args = with_leaves(args, dtype)
    outputs = tensors_of(module(*args, **(kwargs or {})))
    leaves = {f"d(arg {i})": leaf for i, leaf in enumerate(tensors_of(args)) if leaf.is_floating_point()}
    leaves |= {f"d({name})": parameter for name, parameter in module.named_parameters()}
    grads = torch.autograd.grad(weighted_sum(outputs), list(leaves.values()))
    values = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    values |= dict(zip(leaves, grads, strict=True))
    return {name: value.double() for name, value in values.items()}


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance between neighbours of ``dtype`` at a positive value."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(value, info.tiny)))


def errors(values: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Largest error of each tensor, in ulps of its largest exact value."""
    assert values.keys() == exact.keys()
    found = {}
    for name, want in exact.items():
        assert values[name].shape == want.shape, name
        if want.numel():
            found[name] = float((values[name] - want).abs().max()) / ulp(float(want.abs().max()), dtype)
    return found


def assert_equal_float64(ours: dict[str, Tensor], stock: dict[str, Tensor], longest_sum: int) -> None:
    """Each float64 tensor agrees up to n * eps of its largest value, n the length of the longest sum."""
    assert ours.keys() == stock.keys()
    for name, want in stock.items():
        assert ours[name].shape == want.shape, name
        if want.numel() == 0:
            continue
        bound = longest_sum * torch.finfo(torch.float64).eps * max(1.0, float(want.abs().max()))
        error = float((ours[name] - want).abs().max())
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def check_against_stock(
    stock: torch.nn.Module,
    ours: torch.nn.Module,
    args: tuple,
    dtype: torch.dtype = torch.float32,
    draws: int = 4,
) -> None:
    """The error of ``ours`` against float64 is at most twice stock's plus one ulp, in outputs and in gradients.

    Both errors are means over tensors and over a few draws (the same numbers in another order) of a tensor's largest
    error, in ulps of its largest value: in one tensor of a few elements that error may be anything down to zero.
    """
    sums: dict[tuple[str, str], float] = {}
    for draw in range(draws):
        if draw:
            args = shuffled(args, draw)
            for parameter in stock.parameters():
                parameter.data = shuffled(parameter.data, draw)
            ours.load_state_dict(stock.state_dict())
        exact = evaluate(copy.deepcopy(stock).double(), args, dtype=torch.float64)
        for who, module in (("stock", stock), ("ours", ours)):
            for name, error in errors(evaluate(module, args), exact, dtype).items():
                kind = "output" if name.startswith("output") else "gradient"
                sums[who, kind] = sums.get((who, kind), 0.0) + error / draws
    outputs = sum(name.startswith("output") for name in exact)
    for kind, names in (("output", outputs), ("gradient", len(exact) - outputs)):
        mean, bound = sums["ours", kind] / names, 2 * sums["stock", kind] / names + 1
        assert mean <= bound, f"{kind}: error {mean:.3g} ulp > {bound:.3g} ulp"


def shuffled(value: Any, seed: int) -> Any:
    """The same numbers in another order, strides kept."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        value = value.detach()
        order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(seed))
        return torch.empty_like(value).copy_(value.flatten()[order].view(value.shape))
    if isinstance(value, PackedSequence):
        return value._replace(data=shuffled(value.data, seed))
    return type(value)(shuffled(item, seed + 1) for item in value)


def packed(data: Tensor, lengths: list[int], enforce_sorted: bool = False) -> PackedSequence:
    """A packed sequence of a time-major batch."""
    return pack_padded_sequence(data, torch.tensor(lengths), enforce_sorted=enforce_sorted)
