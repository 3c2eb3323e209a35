"""The layouts of ragged batches, against those of torch.nn.utils.rnn."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fuseblock._ragged import packing, pad_rows

LENGTHS = [(3, 1, 4, 1), (2, 5, 3), (1, 2), (4,), (5, 2, 5)]
TIME = 5


def padded(batch: int) -> torch.Tensor:
    return torch.randn(TIME, batch, 2)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pack(lengths: tuple[int, ...]) -> None:
    x, of = padded(len(lengths)), torch.tensor(lengths)
    want = pack_padded_sequence(x, of, enforce_sorted=False)
    got = packing(x, of)
    assert torch.equal(got.pack(x), want.data)
    assert torch.equal(got.batch_sizes, want.batch_sizes)
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    assert torch.equal(got.order, torch.tensor(order))
    state = torch.randn(3, len(lengths), 2)
    assert torch.equal(got.pack_state(state), state[:, order])


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_around(lengths: tuple[int, ...], with_state: bool) -> None:
    x, of = padded(len(lengths)), torch.tensor(lengths)
    h, c = torch.randn(3, len(lengths), 2), torch.randn(3, len(lengths), 4)
    given = (h, c) if with_state else (None, None)
    got = packing(x, of)

    def run(input, h0, c0, weights):
        assert with_state or h0 is c0 is None
        return 2 * input, got.pack_state(h), got.pack_state(c)

    output, h_n, c_n = got.around(run)(x, *given, ())
    inside = torch.arange(TIME)[:, None, None] < of[None, :, None]
    assert torch.equal(output, 2 * x * inside)
    assert torch.equal(h_n, h)
    assert torch.equal(c_n, c)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pad_rows(lengths: tuple[int, ...]) -> None:
    packed = pack_padded_sequence(padded(len(lengths)), torch.tensor(lengths), enforce_sorted=False)
    want, _ = pad_packed_sequence(packed._replace(unsorted_indices=None, sorted_indices=None))
    got, of, positions = pad_rows(packed.data, packed.batch_sizes)
    assert torch.equal(got, want)
    assert of.tolist() == sorted(lengths, reverse=True)
    assert torch.equal(got.flatten(0, 1)[positions], packed.data)


def test_rows_that_need_no_packing() -> None:
    """Nothing to save, or rows that the packed layout cannot hold."""
    for lengths in ((5, 5), (0, 3), (0, 0)):
        assert packing(padded(2), torch.tensor(lengths)) is None
    assert packing(padded(0), torch.empty(0, dtype=torch.int64)) is None


@pytest.mark.parametrize("lengths", [(6, 1), (-1, 2)], ids=str)
def test_lengths_out_of_range(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"within \[0, T = 5\], got"):
        packing(padded(2), torch.tensor(lengths))


@pytest.mark.parametrize("lengths", [torch.tensor([1]), torch.tensor([1, 2], dtype=torch.int32)], ids=str)
def test_lengths_of_another_shape_or_dtype(lengths: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int64 of shape \(2,\)"):
        packing(padded(2), lengths)
