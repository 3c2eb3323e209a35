"""fold_batch_norm leaves what it cannot fold rightly: the copy computes what the model does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fuseblock
from fuseblock.nn import fold_batch_norm


class Inner(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.relu(self[0](x)))


class RectifiedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Named(nn.Sequential):
    """As torchvision's blocks: a class of its own with the forward of Sequential."""


def pair(conv: type = nn.Conv2d, norm: type = nn.BatchNorm2d, parent: type = nn.Sequential) -> nn.Sequential:
    return parent(conv(3, 4, 3), norm(4))


def shared() -> nn.Module:
    """One convolution, a norm per domain."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3)))


def changed(change: Callable[[nn.Sequential], object]) -> nn.Module:
    model = pair()
    change(model)
    return model


def replace_forward(module: nn.Module) -> None:
    stock = module.forward
    module.forward = lambda x: stock(x) * 2


LEFT: dict[str, Callable[[], nn.Module]] = {
    "one conv, two norms": shared,
    "a Sequential's subclass": lambda: pair(parent=Inner),
    "a convolution's subclass": lambda: pair(RectifiedConv),
    "a norm's subclass": lambda: pair(norm=ShiftedNorm),
    "no running statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "norm in training": lambda: changed(lambda m: m[1].register_buffer("in_training", torch.ones(()))),
    "hook on the conv": lambda: changed(lambda m: m[0].register_forward_hook(lambda m, i, o: o * 2)),
    "hook before the norm": lambda: changed(lambda m: m[1].register_forward_pre_hook(lambda m, i: i[0] * 2)),
    "forward of the conv": lambda: changed(lambda m: replace_forward(m[0])),
    "forward of the norm": lambda: changed(lambda m: replace_forward(m[1])),
    "forward of the Sequential": lambda: changed(lambda m: setattr(m, "forward", lambda x: x + 1)),
    "PyTorch's spectral norm": lambda: changed(lambda m: parametrizations.spectral_norm(m[0])),
    "PyTorch's weight norm": lambda: changed(lambda m: parametrizations.weight_norm(m[0])),
    "PyTorch's older spectral norm": lambda: changed(lambda m: nn.utils.spectral_norm(m[0])),
    "spectral norm": lambda: changed(fuseblock.nn.spectral_norm),
}


def prepared(model: nn.Module) -> nn.Module:
    """In eval mode, with parameters and statistics that folding would show."""
    torch.manual_seed(0)
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            for p in module.parameters():
                nn.init.normal_(p)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if hasattr(module, "in_training"):
                module.train()
    return model


@pytest.mark.filterwarnings("ignore:.*spectral_norm")
@pytest.mark.parametrize("case", LEFT)
def test_left_as_it_is(case: str) -> None:
    model = prepared(LEFT[case]())
    x = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norm(model)
    assert torch.equal(folded(x), model(x))
    assert [type(m).__name__ for m in folded.modules()] == [type(m).__name__ for m in model.modules()]


def test_a_class_that_keeps_the_forward_of_sequential_is_folded() -> None:
    model = prepared(pair(parent=Named))
    folded, x = fold_batch_norm(model), torch.randn(2, 3, 8, 8)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), model(x))


def test_sizes_that_do_not_fit_are_still_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(1)).eval()
    with pytest.raises(RuntimeError):
        fold_batch_norm(model)(torch.randn(2, 3, 8, 8))


def test_one_norm_after_two_convolutions() -> None:
    norm = nn.BatchNorm2d(3)
    model = prepared(nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.Conv2d(3, 3, 3), norm))
    folded, x = fold_batch_norm(model), torch.randn(2, 3, 8, 8)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity] * 2
    torch.testing.assert_close(folded(x), model(x))
