"""`lengths=` on the call equals packing, without a packed sequence."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_packed_sequence

import fuseblock
from benchmarks.memory import peak_of_tensors

from .parity import check_against_stock, packed, twins


class Padded(torch.nn.Module):
    """The stock module on ragged rows of a padded batch."""

    def __init__(self, lstm: torch.nn.LSTM, lengths: list[int]) -> None:
        super().__init__()
        self.lstm, self.lengths = lstm, lengths

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first = self.lstm.batch_first
        steps = x.shape[1 if first else 0]
        output, state = self.lstm(packed(x.transpose(0, 1) if first else x, self.lengths), hx)
        return pad_packed_sequence(output, batch_first=first, total_length=steps)[0], state


class Lengths(Padded):
    """Ours with lengths."""

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.lstm(x, hx, lengths=torch.tensor(self.lengths))


def ragged_call(seed: int) -> tuple[dict, tuple, list[int]]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    hidden, layers = rng.choice([1, 3, 8, 33]), rng.choice([1, 2, 3])
    options = {
        "input_size": rng.choice([1, 5]),
        "hidden_size": hidden,
        "num_layers": layers,
        "bias": rng.random() < 0.7,
        "batch_first": rng.random() < 0.5,
        "bidirectional": rng.random() < 0.5,
        "proj_size": rng.choice([0, 0, hidden // 2]),
    }
    steps, batch = rng.choice([1, 2, 9, 20]), rng.choice([1, 2, 6])
    lengths = [rng.randint(1, steps) for _ in range(batch)]
    shape = (batch, steps) if options["batch_first"] else (steps, batch)
    x = torch.randn(*shape, options["input_size"])
    rows, projected = layers * (1 + options["bidirectional"]), options["proj_size"] or hidden
    hx = torch.randn(rows, batch, projected), torch.randn(rows, batch, hidden)
    return options, ((x, hx) if rng.random() < 0.5 else (x,)), lengths


@pytest.mark.parametrize("seed", range(40))
def test_equals_packing(engine: str, seed: int) -> None:
    options, args, lengths = ragged_call(seed)
    stock, ours = twins(torch.nn.LSTM, **options)
    check_against_stock(Padded(stock, lengths), Lengths(ours, lengths), args)


@pytest.mark.also_on("cuda", "triton")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_length_zero(engine: str, bidirectional: bool) -> None:
    """A row without steps: no output, the state passes through, gradients too."""
    torch.manual_seed(0)
    ours = fuseblock.nn.LSTM(4, 3, 2, bidirectional=bidirectional)
    rows = 4 if bidirectional else 2
    h0, c0 = torch.randn(rows, 3, 3, requires_grad=True), torch.randn(rows, 3, 3, requires_grad=True)
    x = torch.randn(5, 3, 4, requires_grad=True)
    y, (h_n, c_n) = ours(x, (h0, c0), lengths=torch.tensor([2, 0, 5]))
    assert not y[:, 1].any() and not y[2:, 0].any() and y[4, 2].any()
    assert torch.equal(h_n[:, 1], h0[:, 1]) and torch.equal(c_n[:, 1], c0[:, 1])
    (h_n[:, 1].sum() + 2 * c_n[:, 1].sum() + y[:, 1].sum()).backward()
    assert not x.grad.any()
    assert torch.equal(h0.grad[:, 1], torch.ones(rows, 3)) and torch.equal(
        c0.grad[:, 1], 2 * torch.ones(rows, 3)
    )
    assert not h0.grad[:, ::2].any() and not any(p.grad.any() for p in ours.parameters())


def test_all_lengths_zero(engine: str) -> None:
    ours = fuseblock.nn.LSTM(4, 3)
    y, (h_n, c_n) = ours(torch.randn(5, 2, 4), lengths=torch.tensor([0, 0]))
    assert not y.any() and not h_n.any() and not c_n.any()


def test_padding_is_not_read(engine: str) -> None:
    """NaN beyond a row's end reaches no output, and the input's gradient is zero there."""
    ours = fuseblock.nn.LSTM(4, 3, 2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    lengths = torch.tensor([2, 5])
    want = ours(x, lengths=lengths)
    x[2:, 0] = float("nan")
    x.requires_grad_()
    got = ours(x, lengths=lengths)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(got[0].sum(), x)
    assert not grad[2:, 0].any() and grad[:2].any()


def test_full_lengths_change_nothing(engine: str) -> None:
    ours = fuseblock.nn.LSTM(4, 3, 2, bidirectional=True)
    x = torch.randn(5, 2, 4)
    for a, b in zip(ours(x, lengths=torch.tensor([5, 5]))[1], ours(x)[1], strict=True):
        torch.testing.assert_close(a, b)


def test_list_and_unbatched() -> None:
    ours = fuseblock.nn.LSTM(4, 3, batch_first=True)
    x = torch.randn(2, 5, 4)
    want = ours(x, lengths=torch.tensor([2, 5]))
    for lengths in ([2, 5], (2, 5)):
        assert torch.equal(ours(x, lengths=lengths)[0], want[0])
    for length in (torch.tensor(2), torch.tensor([2])):
        y, (h_n, _) = ours(x[0], lengths=length)
        torch.testing.assert_close(y, want[0][0])
        torch.testing.assert_close(h_n, want[1][0][:, 0])


def test_second_order(engine: str) -> None:
    """A gradient penalty on ragged rows, against the stock module with packing."""
    lengths = [3, 1, 5]
    stock, ours = twins(torch.nn.LSTM, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 3, 3, dtype=torch.float64)

    def penalty(module: torch.nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y, (h_n, c_n) = module(leaf)
        (grad,) = torch.autograd.grad(
            y.square().sum() + h_n.sum() + c_n.square().sum(), leaf, create_graph=True
        )
        parameters = [p for _, p in sorted(module.named_parameters())]
        return list(torch.autograd.grad(grad.square().sum(), [leaf, *parameters]))

    for a, b in zip(penalty(Lengths(ours, lengths)), penalty(Padded(stock, lengths)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


MISTAKES = {
    "packed": (
        TypeError,
        "lengths cannot be combined with a PackedSequence",
        lambda m, x: m(packed(x, [5, 2]), lengths=[5, 2]),
    ),
    "int32": (
        TypeError,
        "lengths must be int64",
        lambda m, x: m(x, lengths=torch.tensor([5, 2], dtype=torch.int32)),
    ),
    "floats": (TypeError, "lengths must be int64", lambda m, x: m(x, lengths=[5.0, 2.0])),
    "too few": (ValueError, r"shape \(2,\), got \(1,\)", lambda m, x: m(x, lengths=torch.tensor([5]))),
    "two dimensions": (
        ValueError,
        r"shape \(2,\), got \(1, 2\)",
        lambda m, x: m(x, lengths=torch.tensor([[5, 2]])),
    ),
    "another device": (
        ValueError,
        "device",
        lambda m, x: m(x, lengths=torch.empty(2, dtype=torch.int64, device="meta")),
    ),
    "negative": (ValueError, "lengths", lambda m, x: m(x, lengths=torch.tensor([5, -1]))),
    "beyond T": (ValueError, "lengths", lambda m, x: m(x, lengths=torch.tensor([6, 5]))),
    "complex": (
        TypeError,
        "lengths",
        lambda m, x: m.to(torch.complex64)(x.to(torch.complex64), lengths=[5, 2]),
    ),
    "wrong input": (RuntimeError, "input_size", lambda m, x: m(x[..., :3], lengths=[5, 2])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    error, message, call = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(fuseblock.nn.LSTM(4, 3), torch.randn(5, 2, 4))


def test_list_on_another_device() -> None:
    ours = fuseblock.nn.LSTM(4, 3, device="meta")
    with pytest.raises(TypeError, match="lengths must be an int64 tensor on meta"):
        ours(torch.empty(5, 2, 4, device="meta"), lengths=[5, 2])


def training_step(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    wanted = dict(module.lstm.named_parameters())
    if x.requires_grad:
        wanted["input"] = x
    grads = torch.autograd.grad(module(x)[0].sin().sum(), list(wanted.values()))
    return dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("hidden", [6, 300], ids=["fused", "composed"])
@pytest.mark.parametrize("layers", [1, 2])
def test_only_weights_are_trained(layers: int, hidden: int) -> None:
    stock, ours = twins(
        torch.nn.LSTM, input_size=3, hidden_size=hidden, num_layers=layers, dtype=torch.float64
    )
    x, lengths = torch.randn(5, 4, 3, dtype=torch.float64), [5, 2, 1, 3]
    got, want = training_step(Lengths(ours, lengths), x), training_step(Padded(stock, lengths), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trained", ["all", "weights"])
@pytest.mark.parametrize("sizes", [(256, 64, 2), (16, 20, 1)], ids=["composed", "fused"])
def test_peak_memory_of_training(sizes: tuple[int, int, int], trained: str) -> None:
    """No more than with a PackedSequence on the stock module."""
    hidden, features, directions = sizes
    stock, ours = twins(torch.nn.LSTM, input_size=features, hidden_size=hidden, bidirectional=directions == 2)
    lengths = torch.linspace(60, 2, 64).long().tolist()
    x = torch.randn(60, 64, features, requires_grad=trained == "all")
    peaks = []
    for module in (Lengths(ours, lengths), Padded(stock, lengths)):
        training_step(module, x)
        peaks.append(peak_of_tensors(lambda module=module: training_step(module, x), cuda=False))
    assert peaks[0] <= peaks[1]
