"""Between the two layouts of ragged batches, once for a whole stack of layers.

On a CPU padded rows are packed, which saves the input projections beyond a row's end, too. On a GPU, where the kernels
take lengths, packed rows are padded. The packed layout is that of ``torch.nn.utils.rnn.PackedSequence``: rows sorted by
length, time-major, step t owning batch_sizes[t] rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """A ragged batch in packed layout, and the way back."""

    input: Tensor  # (N, I)
    batch_sizes: Tensor  # (T',), T' = the longest length
    h0: Tensor | None  # states of the rows in packed order
    c0: Tensor | None
    positions: Tensor  # (N,): where a packed row lies in the (T * B, I) input
    order: Tensor  # (B,): packed row -> batch row
    padded: tuple[int, int]  # T, B


def pack_rows(input: Tensor, lengths: Tensor, h0: Tensor | None, c0: Tensor | None) -> Ragged | None:
    """Pack ``input`` (T, B, I) by ``lengths`` (B,). None when a row is empty or nothing would be saved.

    Raises:
        ValueError: lengths have another shape or dtype, or values outside [0, T].
    """
    time, batch = input.shape[:2]
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"lengths: expected int64 of shape ({batch},), got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if batch == 0:
        return None
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    longest, shortest = int(sorted_lengths[0]), int(sorted_lengths[-1])
    if shortest < 0 or longest > time:
        raise ValueError(f"lengths: expected values within [0, T = {time}], got [{shortest}, {longest}]")
    if shortest == 0 or shortest == time:
        return None
    active = sorted_lengths > torch.arange(longest).unsqueeze(1)  # (T', B)
    step, rank = active.nonzero(as_tuple=True)
    positions = step * batch + order[rank]
    return Ragged(
        input=input.reshape(time * batch, -1).index_select(0, positions),
        batch_sizes=active.sum(1),
        h0=None if h0 is None else h0.index_select(1, order),
        c0=None if c0 is None else c0.index_select(1, order),
        positions=positions,
        order=order,
        padded=(time, batch),
    )


def unpack_rows(ragged: Ragged, output: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output (T, B, ...), h_n, c_n) in batch order; output is zero beyond a row's end."""
    time, batch = ragged.padded
    padded = output.new_zeros(time * batch, output.shape[-1]).index_copy(0, ragged.positions, output)
    back = ragged.order.argsort()
    return padded.view(time, batch, -1), h_n.index_select(1, back), c_n.index_select(1, back)


def pad_rows(packed: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(input (T, B, I), lengths (B,), positions (N,)) of a packed (N, I) batch; ``batch_sizes`` is on the CPU.

    ``positions`` says where a packed row lies in the padded (T * B, ...) tensors.
    """
    time, batch = batch_sizes.shape[0], int(batch_sizes[0])
    active = batch_sizes.unsqueeze(1) > torch.arange(batch)
    positions = active.flatten().nonzero().squeeze(1).to(packed.device, non_blocking=True)
    lengths = active.sum(0).to(packed.device, non_blocking=True)
    padded = packed.new_zeros(time * batch, packed.shape[1]).index_copy(0, positions, packed)
    return padded.view(time, batch, -1), lengths, positions
