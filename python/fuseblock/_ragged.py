"""Between the two layouts of ragged batches, once for a whole stack of layers.

On a CPU padded rows are packed, which saves the input projections beyond a row's end, too. On a GPU, where the kernels
take lengths, packed rows are padded. The packed layout is that of ``torch.nn.utils.rnn.PackedSequence``: rows sorted by
length, time-major, step t owning batch_sizes[t] rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._recompute import LayerWeights, Run


@dataclass(frozen=True)
class Packing:
    """How the rows of a padded batch lie in packed layout, and the way back. Differentiable to any order."""

    batch_sizes: Tensor  # (T',), T' = the longest length
    positions: Tensor  # (N,): where a packed row lies in the (T * B, ...) tensors
    order: Tensor  # (B,): packed row -> batch row
    back: Tensor  # (B,): batch row -> packed row
    padded: tuple[int, int]  # T, B

    def pack(self, padded: Tensor) -> Tensor:
        """(N, F) of (T, B, F)."""
        return padded.reshape(-1, padded.shape[-1]).index_select(0, self.positions)

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, B, F) of (N, F), zero beyond a row's end."""
        time, batch = self.padded
        rows = packed.new_zeros(time * batch, packed.shape[-1]).index_copy_(0, self.positions, packed)
        return rows.view(time, batch, -1)

    def pack_state(self, state: Tensor) -> Tensor:
        """A state (L*D, B, ...) in packed order."""
        return state.index_select(1, self.order)

    def unpack_state(self, state: Tensor) -> Tensor:
        """A state in packed order in that of the batch."""
        return state.index_select(1, self.back)

    def around(self, run: Run) -> Run:
        """``run``, which takes a packed batch, on a padded one."""

        def padded_run(
            input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[LayerWeights]
        ) -> tuple[Tensor, Tensor, Tensor]:
            h0 = None if h0 is None else self.pack_state(h0)
            c0 = None if c0 is None else self.pack_state(c0)
            output, h_n, c_n = run(self.pack(input), h0, c0, weights)
            return self.unpack(output), self.unpack_state(h_n), self.unpack_state(c_n)

        return padded_run


def packing(input: Tensor, lengths: Tensor) -> Packing | None:
    """How to pack ``input`` (T, B, I) by ``lengths`` (B,). None when a row is empty or nothing would be saved.

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
    return Packing(
        batch_sizes=active.sum(1),
        positions=step * batch + order[rank],
        order=order,
        back=order.argsort(),
        padded=(time, batch),
    )


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
