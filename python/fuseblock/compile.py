"""The one call that lets ``torch.compile`` trace our LSTM modules."""

from __future__ import annotations


def enable_compile() -> None:
    """Let ``torch.compile(..., fullgraph=True)`` and ``torch.export`` trace modules that subclass ``nn.LSTM``.

    Dynamo refuses every instance of ``nn.LSTM`` unless ``torch._dynamo.config.allow_rnn`` is set, because it would
    unroll the stock layer; ours is one operator per layer. Without this call a compiled model is still right: it has a
    graph break at the module. The flag is process-wide and holds for stock ``nn.LSTM`` modules too.
    """
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True
