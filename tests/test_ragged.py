"""The layouts of ragged batches, against those of torch.nn.utils.rnn."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fuseblock._ragged import pack_rows, pad_rows, unpack_rows

LENGTHS = [(3, 1, 4, 1), (2, 5, 3), (1, 2), (4,), (5, 2, 5)]
TIME = 5


def padded(batch: int) -> torch.Tensor:
    return torch.randn(TIME, batch, 2)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pack_rows(lengths: tuple[int, ...]) -> None:
    x, of = padded(len(lengths)), torch.tensor(lengths)
    h0, c0 = torch.randn(3, len(lengths), 2), torch.randn(3, len(lengths), 4)
    want = pack_padded_sequence(x, of, enforce_sorted=False)
    got = pack_rows(x, of, h0, c0)
    assert torch.equal(got.input, want.data)
    assert torch.equal(got.batch_sizes, want.batch_sizes)
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    assert torch.equal(got.order, torch.tensor(order))
    assert torch.equal(got.h0, h0[:, order])
    assert torch.equal(got.c0, c0[:, order])
    stateless = pack_rows(x, of, None, None)
    assert stateless.h0 is None
    assert stateless.c0 is None


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_unpack_rows(lengths: tuple[int, ...]) -> None:
    x, of = padded(len(lengths)), torch.tensor(lengths)
    h, c = torch.randn(3, len(lengths), 2), torch.randn(3, len(lengths), 4)
    ragged = pack_rows(x, of, h, c)
    output, h_n, c_n = unpack_rows(ragged, 2 * ragged.input, ragged.h0, ragged.c0)
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
        assert pack_rows(padded(2), torch.tensor(lengths), None, None) is None
    assert pack_rows(padded(0), torch.empty(0, dtype=torch.int64), None, None) is None


@pytest.mark.parametrize("lengths", [(6, 1), (-1, 2)], ids=str)
def test_lengths_out_of_range(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"within \[0, T = 5\], got"):
        pack_rows(padded(2), torch.tensor(lengths), None, None)


@pytest.mark.parametrize("lengths", [torch.tensor([1]), torch.tensor([1, 2], dtype=torch.int32)], ids=str)
def test_lengths_of_another_shape_or_dtype(lengths: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int64 of shape \(2,\)"):
        pack_rows(padded(2), lengths, None, None)
