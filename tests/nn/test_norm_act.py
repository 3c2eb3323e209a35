"""Norm modules with activation: drop-in as they stand, and equal to norm then activation with one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

import fuseblock
from fuseblock.nn import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BiasAct2d,
    InstanceNormAct1d,
    InstanceNormAct2d,
)

from .parity import evaluate, with_leaves

FUSED = {
    torch.nn.BatchNorm1d: BatchNormAct1d,
    torch.nn.BatchNorm2d: BatchNormAct2d,
    torch.nn.BatchNorm3d: BatchNormAct3d,
    torch.nn.InstanceNorm1d: InstanceNormAct1d,
    torch.nn.InstanceNorm2d: InstanceNormAct2d,
}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in FUSED}
ACTIVATIONS = {
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(0.01),
    "prelu": torch.nn.PReLU(),
    "silu": torch.nn.SiLU(),
    "tanh": torch.nn.Tanh(),
    "elu": torch.nn.ELU(),
}


def samples(stock: type, training: bool) -> list:
    torch.manual_seed(0)
    info = INFOS[stock]
    return list(info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training))


CALLS = [(stock, k) for stock in INFOS for k in range(len(samples(stock, True)))]


def built(stock: type, index: int, training: bool) -> tuple[torch.nn.Module, torch.nn.Module, tuple]:
    sample = samples(stock, training)[index]
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs | {"dtype": torch.float64}
    before, after = stock(*args, **kwargs), FUSED[stock](*args, **kwargs)
    for p in before.parameters():
        torch.nn.init.normal_(p)
    after.load_state_dict(before.state_dict())
    return before.train(training), after.train(training), sample.forward_input.args


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("stock", "index"), CALLS)
def test_pytorch_module_inputs(stock: type, index: int, training: bool) -> None:
    before, after, args = built(stock, index, training)
    torch.testing.assert_close(evaluate(after, args), evaluate(before, args), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        after.state_dict(), before.state_dict(), rtol=1e-12, atol=1e-12, equal_nan=True
    )
    assert repr(after) == repr(before).replace(stock.__name__, FUSED[stock].__name__)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("stock", "index"), [c for c in CALLS if c[0] is torch.nn.BatchNorm2d])
def test_pytorch_module_inputs_gradcheck(stock: type, index: int, training: bool) -> None:
    _, after, args = built(stock, index, training)
    leaves = with_leaves(args)
    names = [name for name, _ in after.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(
            copy.deepcopy(after), dict(zip(names, parameters, strict=True)), (x,)
        )

    inputs = (*leaves, *(p.detach().clone().requires_grad_() for p in after.parameters()))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cls", [BatchNormAct2d, InstanceNormAct2d])
def test_activation_and_residual(cls: type, activation: str, training: bool) -> None:
    ours = cls(3, affine=True, activation=activation, dtype=torch.float64).train(training)
    stock = next(s for s, f in FUSED.items() if f is cls)(3, affine=True, dtype=torch.float64).train(training)
    act = copy.deepcopy(ACTIVATIONS[activation]).double()
    x, residual = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    for r in (None, residual):
        got = ours(x) if r is None else ours(x, r)
        want = act(stock(x) if r is None else stock(x) + r)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_cumulative_moving_average() -> None:
    before, after = torch.nn.BatchNorm2d(3, momentum=None), BatchNormAct2d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(4, 3, 2, 2)
        before(x), after(x)
    torch.testing.assert_close(after.state_dict(), before.state_dict())
    assert int(after.num_batches_tracked) == 3


@pytest.mark.parametrize("module", [BatchNormAct2d(3, activation="prelu"), BiasAct2d(3, activation="silu")])
def test_copies(module: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4)
    module.eval()
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.load_state_dict(torch.load(saved))
        saved.seek(0)
        assert torch.equal(twin(x), module(x))
        assert repr(twin) == repr(module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchNormAct2d(3)(torch.randn(2, 3, 4)), "expected 4D input"),
        (lambda: BatchNormAct2d(3)(torch.randn(2, 4, 3, 3)), "3"),
        (lambda: BatchNormAct2d(3)(torch.randn(1, 3, 1, 1)), "more than 1 value per channel"),
        (lambda: BatchNormAct2d(3, activation="gelu"), "expected an activation among"),
        (lambda: BiasAct2d(3, activation="gelu"), "expected an activation among"),
        (lambda: BatchNormAct2d(3)(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5)), "residual"),
    ],
)
def test_mistakes(call, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_bias_act() -> None:
    module = BiasAct2d(3, "leaky_relu", 0.1, gain=2.0, clamp=1.5)
    torch.nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 4, 4)
    want = (torch.nn.functional.leaky_relu(x + module.bias.view(-1, 1, 1), 0.1) * 2).clamp(-1.5, 1.5)
    torch.testing.assert_close(module(x), want)


def test_leaky_relu_saves_bits() -> None:
    x = torch.randn(4, 8, 64, 64, requires_grad=True)  # small tensors are left to PyTorch
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fuseblock.nn.LeakyReLU(0.2)(x * 1)
    torch.testing.assert_close(y, torch.nn.functional.leaky_relu(x, 0.2))
    assert sum(t.nbytes for t in saved if t.dim() > 0) <= x.nbytes / 32 + 64
