"""`fuseblock.explain("block", ...)`: what it says is what runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fuseblock
from fuseblock import dispatch, gan
from fuseblock.nn import BatchNormAct2d, Conv2d, Conv2dBlock, LeakyReLU, ResidualBlock2d, Sequential

from ..backends import _ON_GPU, DEVICE, available

pytestmark = _ON_GPU

#: What an operator runs for.
OPS = {
    "conv2d_act": "conv_act",
    "conv2d_stats": "conv_norm_act",
    "conv_transpose2d_subpixel": "conv_norm_act",
    "norm_act_conv_bwd": "norm_act_conv",
}


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with available("triton"), fuseblock.backend("triton"):
        yield


def explained(block: nn.Module, x: torch.Tensor) -> list[fuseblock.Explanation]:
    first = fuseblock.explain("block", block, x)
    return [first, *first.parts]


def head() -> Sequential:
    return Sequential(BatchNormAct2d(4), Conv2d(4, 8, 3, 1, 1), LeakyReLU(0.2))


def normalised() -> Sequential:
    block = Sequential(*Conv2dBlock(4, 4, 3, norm=None), Conv2dBlock(4, 4, 3, padding="same"))
    fuseblock.nn.spectral_norm(block)
    return block


def mixed() -> Sequential:
    return Sequential(
        BatchNormAct2d(4),
        Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        nn.PReLU(),
        nn.Upsample(scale_factor=2),
        Conv2dBlock(3, 4, 3),
        nn.utils.parametrizations.spectral_norm(Conv2d(4, 4, 1)),
        LeakyReLU(0.2),
    )


BLOCKS = {
    "activation behind": (head, (4, 8, 8)),
    "norm before": (lambda: head()[:2], (4, 8, 8)),
    "discriminator": (lambda: gan.DCGANDiscriminator(16, width=4), (3, 16, 16)),
    "generator": (lambda: gan.DCGANGenerator(8, width=4, latent=6), (6, 1, 1)),
    "same": (lambda: ResidualBlock2d(4), (4, 6, 6)),
    "up": (lambda: ResidualBlock2d(4, mode="up"), (4, 3, 3)),
    "down": (lambda: ResidualBlock2d(4, mode="down", norm="batch"), (4, 6, 6)),
    "spectral norm": (normalised, (4, 6, 6)),
    "mixed": (mixed, (4, 5, 5)),
}


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_said_is_what_runs(name: str, wants: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, sizes = BLOCKS[name]
    block, x = make().to(DEVICE), torch.randn(2, *sizes, device=DEVICE)
    ran: Counter[str] = Counter()
    run = dispatch.run

    def note(op: str, args: tuple[object, ...]) -> object:
        ran.update([OPS[op]] if op in OPS else [])
        return run(op, args)

    before = [t.clone() for t in block.state_dict().values()]
    with torch.set_grad_enabled(wants):
        told = explained(block, x)
        assert all(a.equal(b) for a, b in zip(before, block.state_dict().values(), strict=True))
        monkeypatch.setattr(dispatch, "run", note)
        y = block(x)
        if wants:
            y.sum().backward()
    assert ran == Counter(part.op.split(" at ")[0] for part in told if part.chosen == "triton")


def test_reasons() -> None:
    x = torch.randn(2, 4, 8, 8, device=DEVICE)
    norm, conv = explained(head().to(DEVICE), x)
    assert norm.rule == "an activation in the convolution's epilogue saves more"
    assert (conv.op, conv.chosen) == ("conv_act at 1", "triton")
    with torch.no_grad():
        assert "wants a gradient" in str(explained(head().to(DEVICE), x)[0])
    stock = explained(nn.Sequential(*head()).to(DEVICE), x)
    assert [part.chosen for part in stock] == ["aten"]
    assert "PyTorch's Sequential runs its modules one by one (`fuse` swaps it)" in str(stock[0])
    conv = nn.utils.parametrizations.spectral_norm(Conv2d(4, 4, 1, device=DEVICE))
    assert "a parametrization makes the weight anew" in str(explained(Sequential(conv, LeakyReLU()), x)[0])
    assert "no convolution in it" in str(explained(Sequential(nn.Flatten()), x)[0])


def test_ends_where_only_a_call_can_tell() -> None:
    x = torch.randn(2, 4, 8, 8, device=DEVICE)
    block = Sequential(Conv2dBlock(4, 4, 3), ResidualBlock2d(4), Conv2dBlock(4, 4, 3)).to(DEVICE)
    told = explained(block, x)
    assert [(part.op, part.chosen) for part in told][-1] == ("ResidualBlock2d at 1", "unknown")
    assert [part.op for part in told[:-1]] == ["conv_norm_act", "norm_act_conv at 0.1"]
    assert len(explained(block[:2], x)) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        told = explained(ResidualBlock2d(4, mode="up").to(DEVICE), x)
    finally:
        handle.remove()
    assert (told[-1].op, told[-1].chosen) == ("Upsample at -", "unknown")


def test_raises_what_the_convolution_raises() -> None:
    x = torch.randn(2, 4, 8, 8, device=DEVICE)
    block = Sequential(Conv2d(4, 4, 3), LeakyReLU(), Conv2d(4, 4, 3), LeakyReLU()).to(DEVICE)
    for wrong in (x[:, :3], x.double(), x[0, 0], x[..., :4, :4]):
        with pytest.raises(RuntimeError) as raised:
            block(wrong)
        with pytest.raises(RuntimeError) as told:
            fuseblock.explain("block", block, wrong)
        assert str(told.value) == str(raised.value)
