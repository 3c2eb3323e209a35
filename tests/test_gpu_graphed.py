"""On a GPU: steps under `fuseblock.graphed`, and that no operator of ours waits for the GPU, which no graph could hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fuseblock
from fuseblock import _fused_layer, _tables, functional, gan

from .tables import entry, table

pytestmark = pytest.mark.gpu

BACKENDS = ["auto", "triton", "cuda"]
CONVOLUTIONS = ["reference", "triton"]


@contextmanager
def no_synchronization() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def second_order(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Forward, backward and a backward of that."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    y = run(*leaves)
    first = torch.autograd.grad(y.float().sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.float().cos().sum() for g in first), leaves, allow_unused=True)
    return [y.detach(), *(g.detach() for g in (*first, *second) if g is not None)]


def lstm(gx: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor) -> Tensor:
    return functional.lstm_recurrence(gx, h0, c0, w_hh, lengths=torch.full((5,), 4, device="cuda"))[0]


def spectral(*weights: Tensor) -> Tensor:
    us = [torch.ones(len(w), device="cuda", dtype=w.dtype) for w in weights]
    vs = [torch.ones(w[0].numel(), device="cuda", dtype=w.dtype) for w in weights]
    return sum(y.sum() for y in functional.spectral_norm(weights, us, vs))


def lstm_layer(x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """In one launch, which it is in 16 bit where a table says so."""
    x, h0, c0, w_ih, w_hh = (t.bfloat16() for t in (x, h0, c0, w_ih, w_hh))
    weights = w_ih, w_hh, None, None, None
    key = _tables.plain_key(_fused_layer.layer_key(x, weights, 1, False, True))
    with _tables.using(table(lstm_layer=[entry(key, _fused_layer.FUSED, fused=1.0, apart=2.0)])):
        return functional.lstm(x, h0, c0, [weights])[0]


def normalised(convolve: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor, w: Tensor) -> Tensor:
    """A convolution's statistics in the batch norm behind it."""
    y, *statistics = convolve(x, w)
    return functional.batch_norm_act(y, activation="leaky_relu", statistics=tuple(statistics))


#: An operator, the shapes of its inputs, and the backends that may be forced.
OPERATORS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], list[str]]] = {
    "lstm_recurrence": (lstm, [(6, 5, 512), (2, 5, 64), (2, 5, 64), (2, 256, 64)], BACKENDS),
    "batch_norm_act": (
        lambda x, w, b, r: functional.batch_norm_act(x, w, b, r, activation="leaky_relu"),
        [(6, 48, 20, 20), (48,), (48,), (6, 48, 20, 20)],
        BACKENDS,
    ),
    "instance_norm_act": (functional.instance_norm_act, [(6, 48, 20, 20)], BACKENDS),
    "bias_act": (
        lambda x, b: functional.bias_act(x, b, activation="silu", clamp=3.0), [(6, 48, 20, 20), (48,)], BACKENDS
    ),
    "upfirdn2d": (
        lambda x: functional.upsample2d(x, torch.full((4, 4), 1 / 16, device="cuda")), [(6, 48, 20, 20)], BACKENDS
    ),
    "lstm_layer": (lstm_layer, [(6, 5, 16), (1, 5, 64), (1, 5, 64), (256, 16), (256, 64)], ["cuda"]),
    "conv2d_act": (
        lambda x, w, b: functional.conv2d_act(x, w, b, 2, 1), [(6, 48, 20, 20), (32, 48, 4, 4), (32,)], CONVOLUTIONS
    ),
    "conv_transpose2d_act": (
        functional.conv_transpose2d_act, [(6, 48, 20, 20), (48, 3, 4, 4), (3,)], CONVOLUTIONS
    ),
    "conv2d_stats": (
        partial(normalised, functional.conv2d_stats), [(6, 48, 20, 20), (32, 48, 3, 3)], CONVOLUTIONS
    ),
    "conv_transpose2d_subpixel": (
        partial(normalised, functional.conv_transpose2d_subpixel), [(6, 48, 20, 20), (48, 32, 4, 4)], CONVOLUTIONS
    ),
    "spectral_norm": (spectral, [(48, 3, 3, 3), (1, 512)], ["auto", "triton"]),
}  # fmt: skip
CASES = [(name, backend) for name, (_, _, backends) in OPERATORS.items() for backend in backends]


@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels_last"])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_operators_in_a_graph(name: str, backend: str, channels_last: bool) -> None:
    """No order of derivative waits for the GPU, and a replay follows its inputs."""
    run, shapes, _ = OPERATORS[name]

    def draw() -> list[Tensor]:
        inputs = [torch.randn(s, device="cuda") for s in shapes]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return [x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in inputs]

    with fuseblock.backend(backend):
        step = fuseblock.graphed(lambda *inputs: second_order(run, *inputs), warmup=2)
        second_order(run, *draw())  # compiles
        inputs = draw()
        with no_synchronization():
            want = second_order(run, *inputs)
        for _ in range(3):
            step(*draw())
        got = step(*inputs)
    assert step.graphs == 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Trainer:
    """An alternating DCGAN step with a lazy penalty and averaged weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.g = gan.DCGANGenerator(32, 3, 16, 24).cuda()
        self.d = fuseblock.nn.spectral_norm(gan.DCGANDiscriminator(32, 3, 16, norm=None).cuda())
        self.ema = gan.ExponentialMovingAverage(self.g, 0.9)
        self.optimizers = [
            torch.optim.Adam(m.parameters(), torch.tensor(2e-4, device="cuda"), capturable=True)
            for m in (self.d, self.g)
        ]

    def train_d(self, real: Tensor, penalise: bool) -> Tensor:
        with torch.no_grad():
            fake = self.g(torch.randn(len(real), 24, device="cuda"))
        loss = gan.non_saturating_discriminator_loss(self.d(real), self.d(fake))
        if penalise:
            loss = loss + gan.r1_penalty(self.d, real)
        return self._step(loss, 0)

    def train_g(self) -> Tensor:
        self.d.requires_grad_(False)
        loss = gan.non_saturating_generator_loss(self.d(self.g(torch.randn(8, 24, device="cuda"))))
        self._step(loss, 1)
        self.d.requires_grad_(True)
        self.ema.update(self.g)
        return loss

    def _step(self, loss: Tensor, which: int) -> Tensor:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()
        return loss


def test_a_gan_step_trains_as_eagerly() -> None:
    """Both steps with the penalty in every third, one pool; random numbers and schedules go on in replays."""
    torch.backends.cudnn.deterministic = True
    try:
        losses = []
        for captured in (False, True):
            trainer, losses_here = Trainer(), []
            train_d, train_g = trainer.train_d, trainer.train_g
            if captured:
                train_d = fuseblock.graphed(trainer.train_d)
                train_g = fuseblock.graphed(trainer.train_g, device="cuda", pool=train_d)
            schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizers[0], 0.97)
            torch.manual_seed(1)
            reals = torch.rand(20, 8, 3, 32, 32, device="cuda")
            for n, real in enumerate(reals):
                losses_here += [train_d(real, n % 3 == 0).clone(), train_g().clone()]
                schedule.step()
            if captured:
                assert (train_d.graphs, train_g.graphs) == (2, 1)
            losses.append(torch.stack(losses_here))
    finally:
        torch.backends.cudnn.deterministic = False
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-3)


def test_own_generators() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(4, generator=generator, device="cuda")

    step = fuseblock.graphed(draw, device="cuda", generators=[generator])
    seen = torch.stack([step().clone() for _ in range(8)])
    assert len(seen.unique(dim=0)) == 8


def test_what_cannot_be_captured_is_named() -> None:
    x, weight = torch.ones(2, device="cuda"), nn.Parameter(torch.ones(2, device="cuda"))
    step = fuseblock.graphed(lambda x: x * x.sum().item(), warmup=2)
    step(x)
    with pytest.raises(RuntimeError, match=r"waits for the GPU, at .*test_gpu_graphed.py"):
        step(x)
    optimizer = torch.optim.Adam([weight])
    step = fuseblock.graphed(lambda x: ((weight * x).sum().backward(), optimizer.step())[0])
    with pytest.raises(ValueError, match="construct it with capturable=True"):
        step(x)
    for fused in (False, True):
        scaler = torch.amp.GradScaler("cuda")
        optimizer = torch.optim.Adam([weight], capturable=True, fused=fused)

        def scaled(x: Tensor, optimizer=optimizer, scaler=scaler) -> None:
            optimizer.zero_grad()
            scaler.scale((weight * x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

        step = fuseblock.graphed(scaled, warmup=3)
        if fused:
            for _ in range(6):
                step(x)
            assert step.graphs == 1
        else:
            step(x), step(x)
            with pytest.raises(RuntimeError, match="in GradScaler: it needs an optimizer with fused=True"):
                step(x)
