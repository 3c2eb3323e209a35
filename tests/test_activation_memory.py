"""What Conv -> BatchNorm -> LeakyReLU stacks keep for backward, measured: against LeakyReLU() and LeakyReLU(inplace=True).

Twice over: the storages that autograd saves, and the bytes that PyTorch's allocator has given out when the forward is done,
which also counts what a node might keep without saying so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseblock
from fuseblock.nn import Conv2d, Conv2dBlock, ConvTranspose2dBlock

from .backends import DEVICE, available

DEPTH, CHANNELS = 3, 8


@pytest.fixture(scope="module")
def memory() -> Any:
    """benchmarks/memory.py; its folder is not put on sys.path, where ``kernels`` would be found too."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmarks_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["auto", "cpu", "triton", "cuda"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param in ("triton", "cuda") and DEVICE == "cuda":
        pytest.skip("it is neither interpreted nor emulated on this machine")
    with available(request.param), fuseblock.backend(request.param):
        yield request.param


def stock(*, inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    widths = [3] + [CHANNELS] * DEPTH
    layers: list[nn.Module] = []
    for k in range(DEPTH):
        conv = nn.ConvTranspose2d if k == 1 else nn.Conv2d
        layers += [
            nn.Sequential(
                conv(widths[k], widths[k + 1], 3, 1, 1, bias=False),
                nn.BatchNorm2d(widths[k + 1]),
                nn.LeakyReLU(0.2, inplace),
            )
        ]
    return nn.Sequential(*layers)


def blocks() -> nn.Sequential:
    return nn.Sequential(
        Conv2dBlock(3, CHANNELS, 3, 1, 1),
        ConvTranspose2dBlock(CHANNELS, CHANNELS, 3, 1, 1),
        Conv2dBlock(CHANNELS, CHANNELS, 3, 1, 1),
    )


def fused(*, inplace: bool) -> nn.Module:
    model = stock(inplace=inplace)
    fuseblock.fuse(model, verbose=False)
    assert isinstance(model[0][0], Conv2d)
    return model


def held(memory: Any, model: nn.Module, x: Tensor) -> int:
    """Bytes given out in the forward and still in use, without the result's."""
    outputs: list[Tensor] = []
    *_, now = memory.held_during(lambda: outputs.append(model(x)))
    return now - outputs[0].nbytes


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_third_less_than_eager(engine: str, last: bool, memory: Any) -> None:
    models = {
        "eager": stock(inplace=False),
        "in place": stock(inplace=True),
        "blocks": blocks(),
        "fused": fused(inplace=False),
        "fused, in place": fused(inplace=True),
    }
    x = torch.randn(2, 3, 16, 16).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )

    def gradients(model: nn.Module) -> None:
        torch.autograd.grad(model(x).sum(), list(model.parameters()))

    saved, kept = {}, {}
    for name, model in models.items():
        if last:
            model.to(memory_format=torch.channels_last)
        saved[name] = memory.saved_for_backward(partial(gradients, model))
        kept[name] = held(memory, model, x)
    full = 4 * 2 * CHANNELS * 16 * 16
    # Convolution's and norm's input of every layer, and LeakyReLU's input or result; the stack's own input is not counted.
    assert saved["eager"] // full == 3 * DEPTH - 1
    assert saved["in place"] // full == 2 * DEPTH
    for name in ("blocks", "fused", "fused, in place"):
        assert saved[name] // full == 2 * DEPTH - 1
        assert saved[name] <= saved["eager"] * 2 / 3
        assert saved[name] <= saved["in place"]
        assert kept[name] <= kept["eager"] * 2 / 3
        # In place, the last LeakyReLU keeps the result itself; without it both keep the same.
        assert kept[name] <= kept["in place"] + full
        assert kept[name] < saved[name] + full / 8, "a node keeps something that autograd does not see"


#: Full tensors that batch_norm_act allocates in its three orders: results, and nothing beside them. In backward through
#: autograd a residual's gradient is one more, and so is, in second order, what a smooth activation gives to the residual.
ALLOCATED = {
    ("leaky_relu", False): (1, 1, 2),
    ("silu", False): (1, 1, 2),
    ("leaky_relu", True): (1, 2, 2),
    ("silu", True): (1, 2, 3),
}


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("activation", "residual"), ALLOCATED)
def test_batch_norm_act_allocates_its_results_alone(
    memory: Any, activation: str, residual: bool, last: bool
) -> None:
    def full() -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.randn(4, 8, 32, 32).contiguous(memory_format=layout).requires_grad_()

    x, dy, r = full(), full(), full() if residual else None
    weight, bias = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    leaves = [t for t in (x, weight, bias, r) if t is not None]
    kept: list[Any] = []

    def peak(run: Any) -> float:
        return max(memory.held_during(lambda: kept.append(run()))) / x.nbytes

    with fuseblock.backend("cpu"):
        forward = peak(lambda: fuseblock.functional.batch_norm_act(x, weight, bias, r, activation=activation))
        backward = peak(lambda: torch.autograd.grad(kept[0], leaves, dy, retain_graph=True))
        dx, *_ = torch.autograd.grad(kept[0], leaves, dy, create_graph=True)
        cotangent = torch.randn_like(dx)
        second = peak(lambda: torch.autograd.grad(dx, [dy, *leaves], cotangent, materialize_grads=True))
    mask = 1 / 32 if residual and activation == "leaky_relu" else 0
    want = ALLOCATED[activation, residual]
    zeros = residual and activation == "leaky_relu"  # of the residual: autograd fills in what does not exist
    for got, count in zip((forward - mask, backward, second - zeros), want, strict=True):
        assert count <= got < count + 0.02
