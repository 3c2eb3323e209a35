"""Convolution blocks: they equal stock modules one after the other, whose checkpoints they load."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fuseblock
from fuseblock.nn import (
    Conv1dBlock,
    Conv2dBlock,
    ConvTranspose1dBlock,
    ConvTranspose2dBlock,
    ResidualBlock2d,
    fold_batch_norm,
)

STOCK_ACTIVATIONS = {
    "identity": None,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "prelu": nn.PReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}
BLOCKS = {
    Conv2dBlock: (nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d, (6, 5)),
    ConvTranspose2dBlock: (nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, (6, 5)),
    Conv1dBlock: (nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d, (7,)),
    ConvTranspose1dBlock: (nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, (7,)),
}


def stock_of(block: type, norm: str | None, activation: str, **options) -> nn.Sequential:
    conv, batch, instance, _ = BLOCKS[block]
    layers = [conv(4, 6, 3, 2, 1, bias=norm is None, **options)]
    layers += [] if norm is None else [(batch if norm == "batch" else instance)(6)]
    layers += [] if STOCK_ACTIVATIONS[activation] is None else [STOCK_ACTIVATIONS[activation]()]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("activation", STOCK_ACTIVATIONS)
@pytest.mark.parametrize("norm", ["batch", "instance", None])
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_stock_modules(block: type, norm: str | None, activation: str) -> None:
    stock = stock_of(block, norm, activation, groups=2)
    ours = block(4, 6, 3, 2, 1, groups=2, norm=norm, activation=activation).double()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(3, 4, *BLOCKS[block][3], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        outputs = [m(x) for m in (ours, stock)]
        grads = [
            torch.autograd.grad(y.sin().sum(), [x, *m.parameters()])
            for y, m in zip(outputs, (ours, stock), strict=True)
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=1e-9, atol=1e-9)
    report = fuseblock.unfuse(ours, verbose=False)
    assert not report.skipped
    assert [type(m) for m in ours] == [type(m) for m in stock]


@pytest.mark.parametrize("block", BLOCKS)
def test_folding(block: type) -> None:
    for groups, activation in ((1, "leaky_relu"), (2, "prelu"), (2, "identity")):
        model = nn.Sequential(block(4, 6, 3, 2, 1, groups=groups, activation=activation)).double()
        x = torch.randn(3, 4, *BLOCKS[block][3], dtype=torch.float64)
        for _ in range(3):
            model(2 * x + 1)
        for p in model.parameters():
            nn.init.normal_(p)
        with pytest.raises(ValueError, match="eval mode"):
            fold_batch_norm(model)
        keys = list(model.state_dict())
        folded = fold_batch_norm(model.eval())
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


def test_folding_stock_modules_and_others() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
    ).eval()
    nn.init.normal_(model[1].running_mean)
    folded = fold_batch_norm(model)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(folded(x), model(x))


def residual_reference(block: ResidualBlock2d, x: torch.Tensor) -> torch.Tensor:
    """The block's equations with stock functions, in its own parameters (batch norm in training, relu)."""

    def norm(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(h, None, None, module.weight, module.bias, True)

    def conv(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(h, module.weight, module.bias, padding=module.padding)

    relu = torch.relu
    if block.mode == "same":
        h = conv(block.conv2, relu(norm(block.norm1, conv(block.conv1, x))))
        return relu(
            norm(block.norm2, h) + (conv(block.shortcut, x) if hasattr(block.shortcut, "weight") else x)
        )
    if block.mode == "up":

        def up(h: torch.Tensor) -> torch.Tensor:
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

        h = conv(block.conv2, relu(norm(block.norm2, conv(block.conv1, up(relu(norm(block.norm1, x)))))))
        return h + conv(block.shortcut, up(x))
    h = x if block.first else relu(x)
    h = conv(block.conv2, relu(conv(block.conv1, h)))
    return nn.functional.avg_pool2d(h + conv(block.shortcut, x), 2)


@pytest.mark.parametrize(
    ("mode", "channels", "options"),
    [
        ("same", (4, 4), {"final_activation": "relu"}),
        ("same", (4, 6), {"final_activation": "relu"}),
        ("up", (4, 6), {}),
        ("down", (4, 6), {}),
        ("down", (3, 6), {"first": True}),
    ],
)
def test_residual_block(mode: str, channels: tuple[int, int], options: dict) -> None:
    block = ResidualBlock2d(*channels, mode, **options).double()
    x = torch.randn(2, channels[0], 6, 8, dtype=torch.float64, requires_grad=True)
    got, want = block(x), residual_reference(block, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    leaves = [x, *block.parameters()]
    orders = []
    for y in (got, want):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        orders.append((first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    torch.testing.assert_close(orders[0], orders[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualBlock2d(4, mode="sideways"), "expected mode"),
        (lambda: ResidualBlock2d(4, mode="up", first=True), "first belongs"),
        (lambda: ResidualBlock2d(4, mode="up", final_activation="relu"), "final_activation belongs"),
        (lambda: ResidualBlock2d(4, norm="layer"), "expected norm"),
        (lambda: ResidualBlock2d(4, kernel_size=4), "odd kernel_size, got 4"),
        (lambda: Conv2dBlock(4, 6, 3, norm="layer"), "expected norm"),
        (lambda: Conv2dBlock(4, 6, 3, activation="gelu"), "expected an activation"),
        (lambda: Conv2dBlock(4, 6, 3, groups=3), "divisible by groups"),
    ],
)
def test_mistakes(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
