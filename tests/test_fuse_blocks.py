"""fuse and unfuse on convolution models: norm and activation become one where the order is known, nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fuseblock


class Named(nn.Module):
    """Consecutive attributes, called in order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.2)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.prelu = nn.PReLU(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.prelu(self.norm(self.up(self.act(self.bn(self.conv(x))))))


def discriminator() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
    )


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grads = torch.autograd.grad(y.sin().sum() + dx.square().sum(), list(model.parameters()))
    return {"y": y, "dx": dx, **{n: g for (n, _), g in zip(model.named_parameters(), grads, strict=True)}}


@pytest.mark.parametrize("make", [Named, discriminator])
def test_fuse_and_unfuse(make) -> None:
    torch.manual_seed(0)
    model = make().double()
    stock = copy.deepcopy(model)
    objects = {n: id(m) for n, m in model.named_modules()}
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    types = {n: type(m) for n, m in model.named_modules()}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    report = fuseblock.fuse(model, verbose=False)
    assert not report.skipped
    assert {n: id(m) for n, m in model.named_modules()} == objects
    assert list(model.state_dict()) == list(stock.state_dict())
    want = results(stock, x)
    torch.testing.assert_close(results(model, x), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(results(copy.deepcopy(model), x), want, rtol=1e-8, atol=1e-8)
    fuseblock.unfuse(model, verbose=False)
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    torch.testing.assert_close(model.state_dict(), stock.state_dict() | model.state_dict(), rtol=0, atol=0)


def test_report_says_who_applies() -> None:
    model = Named()
    text = str(fuseblock.fuse(model, verbose=False))
    assert "act: torch.nn.LeakyReLU -> applied by bn" in text
    assert "prelu: torch.nn.PReLU -> applied by norm" in text
    assert "conv: torch.nn.Conv2d -> fuseblock.nn.Conv2d" in text
    assert model.calls == 0
    assert fuseblock.fuse(model, verbose=False).swapped == ()


class Elsewhere(Named):
    """The norm's result is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        return self.act(h) + h


class Flagged(Named):
    """Python's own choice, which a trace does not show."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        if self.training:
            h = h * 2
        return self.act(h)


class Features(Named):
    """Another way in, which reads the norm's result."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.features(x)) if x is not None else x

    def features(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Dynamic(Named):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.bn(self.conv(x))
        return self.act(self.bn(self.conv(x)))


class Repeated(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(self.act(self.bn(self.conv(x)))))


class Functional(Named):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("cls", [Elsewhere, Flagged, Features, Dynamic, Repeated, Functional])
def test_order_that_does_not_allow_it(cls: type[Named]) -> None:
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(2, 3, 8, 8)
    want = model(x), model(-x)
    report = fuseblock.fuse(model, verbose=False)
    assert type(model.bn) is fuseblock.nn.BatchNormAct2d
    assert not model.bn.applies
    reasons = {entry.name: entry.outcome for entry in report.skipped}
    if cls is Dynamic:
        assert "cannot be traced" in reasons["act"]
    if cls is Repeated:
        assert "called several times" in reasons["act"]
    if cls is Flagged:
        assert "several ways" in reasons["act"]
    if cls is Features:
        assert "other methods" in reasons["act"]
        torch.testing.assert_close(model.features(x), model.bn(model.conv(x)))
    torch.testing.assert_close((model(x), model(-x)), want)


def test_hooks_shared_modules_and_other_alphas_are_left() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        relu,
        nn.BatchNorm2d(3),
        relu,
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.BatchNorm2d(3),
        nn.ELU(0.5),
    )
    seen: list[Tensor] = []
    model[4].register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(2, 3, 4, 4)
    want = model(x)
    report = fuseblock.fuse(model, verbose=False)
    assert {e.name: e.outcome.split(": ", 1)[1] for e in report.skipped} == {
        "5": "there are hooks on it or on its norm, or a forward of their own",
        "7": "its alpha is 0.5, the fused ELU has 1",
    }
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(seen[1], seen[0])


def test_norms_exchanged_and_hooks_added_after_fuse() -> None:
    """Consecutive attributes: the activation applies itself where its norm no longer does."""
    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(2, 3, 8, 8)
    stock = copy.deepcopy(model)
    fuseblock.fuse(model, verbose=False)
    assert model.bn.applies == (model.act,)
    seen: list[Tensor] = []
    handle = model.bn.register_forward_hook(lambda m, i, o: seen.append(o))
    torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(seen[0], stock.bn(stock.conv(x)))
    handle.remove()
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))(x), stock(x))
    model.bn = nn.Identity()
    stock.bn = nn.Identity()
    torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), stock(x))


class Impure(Named):
    """What the forward does besides computing must not happen in fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.seen.append(1)
        return self.act(self.bn(self.conv(x))) + torch.rand(())


def test_looking_at_a_forward_changes_nothing() -> None:
    model, state = Impure(), torch.random.get_rng_state()
    fuseblock.fuse(model, verbose=False)
    assert model.bn.applies
    assert float(model.steps) == 0
    assert model.seen == []
    assert torch.random.get_rng_state().equal(state)


def test_unbatched_per_channel_prelu_is_pytorchs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.InstanceNorm2d(8), nn.PReLU(8)), torch.randn(8, 8, 8)
    nn.init.normal_(model[1].weight)
    want = model(x)
    fuseblock.fuse(model, verbose=False)
    torch.testing.assert_close(model(x), want)


def test_blocks_become_stock_sequentials_and_come_back() -> None:
    model = nn.Sequential(fuseblock.nn.Conv2dBlock(3, 4, 3), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    want, keys = model(x), list(model.state_dict())
    fuseblock.unfuse(model, verbose=False)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch"}
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    fuseblock.fuse(model, verbose=False)
    assert type(model[0]) is fuseblock.nn.Sequential
    torch.testing.assert_close(model(x), want)
    assert list(model.state_dict()) == keys


def test_a_norm_with_an_activation_of_its_own_cannot_become_stock() -> None:
    model = nn.Sequential(fuseblock.nn.BatchNormAct2d(3, activation="relu"), fuseblock.nn.BatchNormAct2d(3))
    report = fuseblock.unfuse(model, verbose=False)
    assert "no module of its own" in report.skipped[0].outcome
    assert type(model[1]) is nn.BatchNorm2d


def test_models_of_blocks_are_unfused_all_over() -> None:
    critic, images = fuseblock.gan.DCGANDiscriminator(8, width=4), torch.randn(2, 3, 8, 8)
    want = critic(images)
    report = fuseblock.unfuse(critic, verbose=False)
    assert report.skipped == ()
    ours = [
        name for name, module in critic.named_modules() if type(module).__module__.startswith("fuseblock.nn")
    ]
    assert ours == []
    torch.testing.assert_close(critic(images), want)
