"""`LSTM`: `torch.nn.LSTM` on the fused recurrence, plus `lengths=` on the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from .._recompute import LayerWeights
from ._calls import State, check_not_forced, is_pair, same_kind


class LSTM(torch.nn.LSTM):
    r"""A drop-in replacement of :class:`torch.nn.LSTM`.

    Constructor, parameters, initial values, ``state_dict``, ``repr`` and results are those of
    :class:`torch.nn.LSTM`; for the same mistake it raises the same error. Per layer and direction

    .. math::
        i, f, o = \sigma(\cdot),\quad g = \tanh(\cdot),\quad
        c_t = f \odot c_{t-1} + i \odot g,\quad h_t = o \odot \tanh(c_t)

    where each gate's argument is :math:`W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}`; with ``proj_size``
    > 0 :math:`h_t` is multiplied by :math:`W_{hr}`.

    Shapes (L layers, D = 2 if bidirectional else 1, P = ``proj_size`` or H):

    * ``input``: ``(T, B, input_size)``, ``(B, T, input_size)`` with ``batch_first``, ``(T, input_size)``
      unbatched, or a :class:`~torch.nn.utils.rnn.PackedSequence`, sorted or not. Its ``batch_sizes`` are
      positive, as PyTorch's packing functions make them: zeros at their end, which :class:`torch.nn.LSTM`
      takes on a CPU, are refused by the kernels;
    * ``hx``: ``(h_0, c_0)`` of shapes ``(L*D, B, P)`` and ``(L*D, B, H)`` (without B if unbatched); default
      zeros;
    * ``lengths``: ``(B,)``, see below;
    * returns ``output, (h_n, c_n)``: ``output`` is laid out like ``input`` with D*P features.

    Dtypes: float64, float32, float16 and bfloat16, the same for input, state and weights unless autocast is on.
    For 16-bit inputs the cell state is carried in float32 between the steps. (Complex weights run on
    :class:`torch.nn.LSTM`'s own code.)

    Beyond :class:`torch.nn.LSTM`:

    * ``lengths``: an int64 tensor ``(B,)`` on the input's device (on CPU also a list of ints), in any
      order, each 0 <= length <= T. Row b is read up to ``lengths[b]`` in both directions; ``output`` is
      zero beyond, ``h_n`` and ``c_n`` are the states at the row's true end; length 0 gives ``h_0`` and
      ``c_0``. Nothing is packed, sorted or copied to the host. On a GPU lengths out of range are clamped
      instead of raising;
    * backward works in eval mode, and twice, on every device;
    * more than 65,535 time steps;
    * ``lstm.save_gates = False``: training keeps half of the memory or less, and backward computes the gates again; not
      under autocast, in compiled code and some more (:func:`fuseblock.functional.lstm`);
    * ``torch.compile(fullgraph=True)`` after :func:`fuseblock.enable_compile`; without that call the
      compiler breaks its graph at this module, as it does at every :class:`torch.nn.LSTM`. ``torch.export``
      needs no call.

    Weights are read by attribute name on each call, so ``weight_norm``, ``spectral_norm``, parametrizations
    and wrappers that replace ``weight_hh_l0`` by a tensor work. ``torch.jit.script`` and ONNX export need
    :func:`fuseblock.unfuse` first.

    Raises:
        TypeError: ``lengths`` together with a PackedSequence, or not int64.
        ValueError: ``lengths`` of a wrong shape, device or range; a weight that was replaced by one of another
            shape; and what :class:`torch.nn.LSTM` raises.
        RuntimeError: ``batch_sizes`` that end in 0; and what :class:`torch.nn.LSTM` raises, for example for a
            wrong ``hx`` shape.

    Examples::

        >>> import torch, fuseblock
        >>> lstm = fuseblock.nn.LSTM(10, 20, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]))
        >>> output, _ = lstm(torch.randn(3, 5, 10), lengths=torch.tensor([2, 5, 3]))
        >>> bool(output[0, 2:].any())
        False
    """

    #: Whether gates are kept for backward; see the class.
    save_gates = True

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the layers; see the class for shapes and errors."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise TypeError("LSTM: lengths cannot be combined with a PackedSequence, which has its own")
            return self._forward_packed(input, hx)
        weights = self._live_weights()
        if not self._is_regular(input, hx, weights[0][0]):
            return self._forward_stock(input, hx, lengths)

        self._check_shapes(weights)
        unbatched = input.dim() == 2
        x = self._time_major(input)
        if lengths is not None:
            lengths = _check_lengths(lengths, x, unbatched)
        h0, c0 = (None, None) if hx is None else hx
        if unbatched and h0 is not None and c0 is not None:
            h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        output, h_n, c_n = functional.lstm(
            x,
            h0,
            c0,
            weights,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            save_gates=self.save_gates,
        )
        if unbatched:
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def _forward_packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._live_weights()
        if not self._is_regular_packed(data, batch_sizes, sorted_indices, hx, weights[0][0]):
            result = super().forward(packed, hx)
            check_not_forced("LSTM", data)
            return result
        self._check_shapes(weights)
        h0, c0 = (None, None) if hx is None else self.permute_hidden(hx, sorted_indices)
        output, h_n, c_n = functional.lstm(
            data,
            h0,
            c0,
            weights,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            save_gates=self.save_gates,
        )
        if data.device.type == "cpu":
            # Under autocast torch.nn promotes with the state's dtype: on a CPU, when packed, and only then.
            dtype = torch.promote_types(output.dtype, data.dtype if c0 is None else c0.dtype)
            if output.dtype is not dtype:
                output, h_n, c_n = output.to(dtype), h_n.to(dtype), c_n.to(dtype)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _forward_stock(
        self, input: Tensor, hx: State | None, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, State]:
        """torch.nn.LSTM's own code: it raises its own errors, and runs what only it runs (B = 0, complex)."""
        result = super().forward(input, hx)
        check_not_forced("LSTM", input)
        if lengths is not None:
            _check_lengths(lengths, self._time_major(input), input.dim() == 2)
            if input.numel() != 0:
                raise TypeError(f"LSTM: lengths needs real, uniform dtypes; the input is {input.dtype}")
        return result

    def _time_major(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return input.unsqueeze(1)
        return input.transpose(0, 1) if self.batch_first else input

    def _live_weights(self) -> list[LayerWeights]:
        """(w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction, as the attributes are now."""
        parameters = self._parameters
        weights: list[LayerWeights] = []
        for names in self._all_weights:
            tensors: list[Any]
            try:
                tensors = [parameters[name] for name in names]
            except KeyError:  # reparametrized: a property of the class or a plain attribute
                tensors = [getattr(self, name) for name in names]
            if len(tensors) == 4:
                weights.append((tensors[0], tensors[1], tensors[2], tensors[3], None))
            elif len(tensors) == 2:
                weights.append((tensors[0], tensors[1], None, None, None))
            elif len(tensors) == 3:
                weights.append((tensors[0], tensors[1], None, None, tensors[2]))
            else:
                weights.append((tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]))
        return weights

    def _check_shapes(self, weights: list[LayerWeights]) -> None:
        """Weights may have been replaced, and PyTorch's own layer would read beyond the end of a smaller one."""
        hidden, proj, directions = self.hidden_size, self.proj_size, 2 if self.bidirectional else 1
        four, out = 4 * hidden, proj or hidden
        rest = [(four, out), *([(four,), (four,)] if self.bias else []), *([(proj, hidden)] if proj else [])]
        for n, tensors in enumerate(weights):
            inputs = self.input_size if n < directions else directions * out
            expected = [(four, inputs), *rest]
            found = [x.shape for x in tensors if x is not None]
            if found != expected:
                each = zip(self._all_weights[n], expected, found, strict=True)
                name, shape, got = next((name, shape, got) for name, shape, got in each if shape != got)
                raise ValueError(f"LSTM: expected {name} of shape {shape}, got {tuple(got)}")

    def _is_regular(self, input: Tensor, hx: State | None, weight: Tensor | None) -> bool:
        """False for a call that torch.nn.LSTM must judge: most of them it rejects."""
        if not isinstance(input, Tensor) or weight is None:
            return False
        dim = input.dim()
        if dim != 3 and dim != 2:
            return False
        shape = input.shape
        if shape[-1] != self.input_size or shape[0] == 0 or shape[1] == 0:
            return False
        h, c = input, input
        if hx is not None:
            if not is_pair(hx):
                return False
            h, c = hx
            rows = self.num_layers * (2 if self.bidirectional else 1)
            batch: tuple[int, ...] = () if dim == 2 else (shape[0 if self.batch_first else 1],)
            if h.shape != (rows, *batch, self.proj_size or self.hidden_size):
                return False
            if c.shape != (rows, *batch, self.hidden_size):
                return False
        return same_kind(input, weight, h, c)

    def _is_regular_packed(
        self,
        data: Tensor,
        batch_sizes: Tensor,
        sorted_indices: Tensor | None,
        hx: State | None,
        weight: Tensor | None,
    ) -> bool:
        if weight is None or data.dim() != 2 or data.size(1) != self.input_size or data.size(0) == 0:
            return False
        h, c = data, data
        if hx is not None:
            if not is_pair(hx):
                return False
            h, c = hx
            rows = self.num_layers * (2 if self.bidirectional else 1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)
            for state, features in zip(hx, sizes, strict=True):
                if state.dim() != 3 or state.size(0) != rows or state.size(2) != features:
                    return False
                # With an order to apply, stock takes the rows it names: more rows than that are no error.
                if sorted_indices is None and state.size(1) != int(batch_sizes[0]):
                    return False
        return same_kind(data, weight, h, c)


def _check_lengths(lengths: Tensor | Sequence[int], x: Tensor, unbatched: bool) -> Tensor:
    """Lengths as an int64 tensor (B,) for the time-major batch x; values are checked by the operator."""
    if not isinstance(lengths, Tensor):
        if x.device.type != "cpu":
            raise TypeError(
                f"LSTM: lengths must be an int64 tensor on {x.device} for an input on {x.device}, "
                f"got {type(lengths).__name__}"
            )
        lengths = torch.tensor(lengths)
    if lengths.dtype != torch.int64:
        raise TypeError(f"LSTM: lengths must be int64, got {lengths.dtype}")
    if unbatched and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if lengths.dim() != 1 or lengths.shape[0] != x.shape[1]:
        raise ValueError(f"LSTM: lengths must have shape ({x.shape[1]},), got {tuple(lengths.shape)}")
    if lengths.device != x.device:
        raise ValueError(f"LSTM: lengths must be on the input's device {x.device}, got {lengths.device}")
    return lengths
