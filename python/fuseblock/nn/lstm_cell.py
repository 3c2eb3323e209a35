"""`LSTMCell`: `torch.nn.LSTMCell` on the fused cell."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._calls import State, check_not_forced, is_pair, same_kind


class LSTMCell(torch.nn.LSTMCell):
    r"""A drop-in replacement of :class:`torch.nn.LSTMCell`: one step of an LSTM.

    Constructor, parameters, initial values, ``state_dict``, ``repr`` and results are those of
    :class:`torch.nn.LSTMCell`; for the same mistake it raises the same error:

    .. math::
        i, f, g, o = \text{split}(W_{ih} x + b_{ih} + W_{hh} h + b_{hh}),\quad
        c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g),\quad h' = \sigma(o) \odot \tanh(c')

    Shapes: ``input`` ``(B, input_size)`` or ``(input_size,)``; ``hx`` = ``(h, c)``, each ``(B,
    hidden_size)`` or ``(hidden_size,)``, default zeros; returns ``(h', c')`` of the same shapes.

    Dtypes: float64, float32, float16 and bfloat16, the same for input, state and weights unless autocast is
    on. Other calls that :class:`torch.nn.LSTMCell` accepts (B = 0, complex, a state of another dtype) run
    on its own code.

    Beyond :class:`torch.nn.LSTMCell`: double backward on every device. Weights are read by attribute name
    on each call, so ``weight_norm``, ``spectral_norm`` and parametrizations work. ``torch.jit.script`` and
    ONNX export need :func:`fuseblock.unfuse` first.

    Raises:
        ValueError: input or state that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not match.

    Examples::

        >>> import torch, fuseblock
        >>> cell = fuseblock.nn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
        >>> h.shape
        torch.Size([3, 20])
    """

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Advance the state by one step; see the class for shapes and errors."""
        parameters = self._parameters
        w_ih: Tensor | None
        w_hh: Tensor | None
        b_ih: Tensor | None
        b_hh: Tensor | None
        try:
            w_ih, w_hh = parameters["weight_ih"], parameters["weight_hh"]
            b_ih, b_hh = parameters["bias_ih"], parameters["bias_hh"]
        except KeyError:  # reparametrized: a property of the class or a plain attribute
            w_ih, w_hh, b_ih, b_hh = (
                self.weight_ih,
                self.weight_hh,
                self.bias_ih,
                self.bias_hh,
            )
        if w_ih is None or w_hh is None or not isinstance(input, Tensor):
            return super().forward(input, hx)
        if hx is None:
            h = c = torch.zeros((*input.shape[:-1], w_hh.shape[1]), dtype=input.dtype, device=input.device)
        elif is_pair(hx):
            h, c = hx
        else:
            return super().forward(input, hx)

        shape = input.shape
        state_shape = (*shape[:-1], w_hh.shape[1])
        if (
            len(shape) in (1, 2)
            and shape[0] != 0
            and shape[-1] == w_ih.shape[1]
            and h.shape == state_shape
            and c.shape == state_shape
            and same_kind(input, w_ih, h, c)
        ):
            if len(shape) == 1:
                input, h, c = input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0)
            h, c = functional.lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh)
            if h.dtype is not c.dtype:  # autocast: torch.nn returns both in the state's dtype
                h = h.to(c.dtype)
            return (h.squeeze(0), c.squeeze(0)) if len(shape) == 1 else (h, c)
        result = super().forward(input, hx)
        check_not_forced("LSTMCell", input)
        return result
