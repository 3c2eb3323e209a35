"""fuseblock.nn.Sequential: neighbours run as one, and nobody can tell but by the clock and the memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseblock


def stock() -> nn.Sequential:
    shared = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1),
        shared,
        nn.Sequential(nn.BatchNorm2d(8), nn.PReLU(8)),
        nn.InstanceNorm2d(8),
        shared,
        nn.ConvTranspose2d(8, 8, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.BatchNorm2d(8),
        nn.ELU(0.5),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.LeakyReLU(0.2),
    )


def pair() -> tuple[nn.Sequential, fuseblock.nn.Sequential, Tensor]:
    """A stock model in double precision, its fused twin, an input large enough for the kernels."""
    torch.manual_seed(0)
    model = stock().double()
    fused = copy.deepcopy(model)
    fuseblock.fuse(fused, verbose=False)
    assert type(fused) is fuseblock.nn.Sequential
    return model, fused, torch.randn(4, 3, 34, 34, dtype=torch.float64)


def everything(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    gradients = torch.autograd.grad(dx.square().sum() + y.cos().sum(), list(model.parameters()))
    return [y.detach(), dx.detach(), *gradients, *model.buffers()]


@pytest.mark.parametrize("training", [True, False])
def test_values_and_derivatives_are_the_stock_ones(training: bool) -> None:
    model, fused, x = pair()
    model.train(training)
    fused.train(training)
    want = everything(model, x)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    for candidate in (fused, copied):
        for got, expected in zip(everything(candidate, x), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x[:1, :, :6, :6]), model(x[:1, :, :6, :6]))


def features(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = []
    for module in model:
        x = module(x)
        found.append(x)
    return found


def test_modules_called_by_themselves_are_the_stock_ones() -> None:
    model, fused, x = pair()
    for got, want in zip(features(fused, x), features(model, x), strict=True):
        torch.testing.assert_close(got, want)
    for end in range(1, len(model)):
        torch.testing.assert_close(fused[:end](x), model[:end](x))
    torch.testing.assert_close(
        fused[2:](x[:, :1].expand(-1, 8, -1, -1)), model[2:](x[:, :1].expand(-1, 8, -1, -1))
    )


def test_hooks_see_the_stock_values() -> None:
    model, fused, x = pair()
    seen: dict[str, list[Tensor]] = {"stock": [], "fused": []}
    for name, module in (("stock", model), ("fused", fused)):
        for child in module.modules():
            if not list(child.children()):
                child.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o.clone()))
        module(x)
    for got, want in zip(seen["fused"], seen["stock"], strict=True):
        torch.testing.assert_close(got, want)


def test_a_hook_on_one_of_two_is_enough() -> None:
    for place in range(5):
        model = fuseblock.nn.Sequential(
            fuseblock.nn.Conv2d(3, 4, 3),
            fuseblock.nn.BatchNormAct2d(4),
            nn.ReLU(),
            fuseblock.nn.Conv2d(4, 4, 3),
            fuseblock.nn.ReLU(),
        )
        seen: list[Tensor] = []
        model[place].register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        x = torch.randn(2, 3, 9, 9)
        model(x)
        assert len(seen) == 1
        again = x
        model[1].momentum = 0.0
        for module in model[: place + 1]:
            again = module(again)
        torch.testing.assert_close(seen[0], again)


@pytest.mark.parametrize("exchange", [nn.Identity(), nn.GroupNorm(2, 4)])
def test_a_norm_may_be_exchanged(exchange: nn.Module) -> None:
    block = fuseblock.nn.Conv2dBlock(3, 4, 3, activation="leaky_relu")
    block[1] = exchange
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(block(x), nn.functional.leaky_relu(exchange(block[0](x)), 0.2))


def test_sync_batch_norm_conversion_keeps_the_activation() -> None:
    block = fuseblock.nn.Conv2dBlock(3, 4, 3).eval()
    x = torch.randn(2, 3, 8, 8)
    want = block(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(block)(x), want)


class Echo(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_subclasses_of_convolutions_may_return_what_they_like() -> None:
    model = nn.Sequential(Echo(3, 3, 1), nn.ReLU())
    fuseblock.fuse(model, verbose=False)
    x = torch.randn(2, 3, 30, 30)
    before = x.clone()
    model(x)
    assert x.equal(before)


def test_large_leaky_relus_behind_convolutions_save_bits() -> None:
    model, kept = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.2)), []
    fuseblock.fuse(model, verbose=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    sizes = sorted(t.numel() * t.itemsize for t in kept)
    assert sizes == sorted([x.numel() * 4, model[0].weight.numel() * 4, y.numel() // 8])


@pytest.mark.parametrize("normalise", [fuseblock.nn.spectral_norm, nn.utils.spectral_norm])
def test_convolutions_under_spectral_norm_are_overwritten_too(normalise: Any) -> None:
    """Its hooks do not see what a convolution returns."""
    model = nn.Sequential(normalise(nn.Conv2d(3, 16, 3, padding=1)), nn.LeakyReLU(0.2))
    fused, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    fuseblock.fuse(fused, verbose=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fused(x)
    sizes = {t.numel() * t.itemsize for t in kept}
    assert y.numel() // 8 in sizes
    assert y.numel() * 4 not in sizes
    torch.testing.assert_close(y, model(x))


def test_what_the_next_convolution_keeps_is_kept_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LeakyReLU(0.2), nn.Conv2d(16, 2, 3))
    kept: list[Tensor] = []
    fuseblock.fuse(model, verbose=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 3, 64, 64))
    big = [t for t in kept if t.numel() == 2 * 16 * 62 * 62]
    assert len(big) == 2
    assert big[0].data_ptr() == big[1].data_ptr()
    assert not any(t.dtype == torch.uint8 for t in kept)


def test_compiled_whole() -> None:
    model, fused, x = pair()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_residual_blocks_without_norm_overwrite_nothing_that_hooks_see() -> None:
    torch.manual_seed(0)
    block = fuseblock.nn.ResidualBlock2d(3, 4, "down")
    x = torch.randn(2, 3, 8, 8)
    want, seen = block(x), []
    block.conv1.register_forward_hook(lambda m, i, o: seen.append(o))
    torch.testing.assert_close(block(x), want)
    torch.testing.assert_close(
        seen[0], nn.functional.conv2d(block.norm1(x), block.conv1.weight, block.conv1.bias, 1, 1)
    )


def test_slices_of_blocks() -> None:
    block = fuseblock.nn.Conv2dBlock(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    assert type(block[:1]) is fuseblock.nn.Sequential
    torch.testing.assert_close(block[:1](x), block[0](x))
    assert block[0] is block[:1][0]


def test_a_compiled_module_of_a_sequence_runs_compiled() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled.append(graph)
        return graph

    inner, conv = fuseblock.nn.Sequential(nn.Tanh()), fuseblock.nn.Conv2d(3, 3, 1)
    model = fuseblock.nn.Sequential(inner, conv, fuseblock.nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    want = model(x)
    for count, module in enumerate((inner, conv), 1):
        torch._dynamo.reset()
        module.compile(backend=backend)
        torch.testing.assert_close(model(x), want)
        assert len(compiled) >= count
    torch._dynamo.reset()


def test_slices_of_subclasses() -> None:
    critic = fuseblock.gan.DCGANDiscriminator(8, width=4)
    features = critic[:-1]
    assert type(features) is fuseblock.nn.Sequential
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(critic[-1](features(images)).flatten(), critic(images))
