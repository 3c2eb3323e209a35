"""The adjoint of a plain PyTorch function, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView")


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd switched on, even inside the kernel of a dispatcher op, where it is masked out."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD_KEYS:
        keys = keys.remove(getattr(torch._C.DispatchKey, name))
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys),
        torch.enable_grad(),
    ):
        yield


def adjoint(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of ``sum(<cotangent, output>)`` with respect to every input (zeros where nothing depends on it).

    An output whose cotangent is None counts as having a zero cotangent.
    """
    with _recording():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        used = [
            (out, v)
            for out, v in zip(outputs, cotangents, strict=True)
            if v is not None and out.requires_grad
        ]
        if not used:
            return [torch.zeros_like(x) for x in inputs]
        outs, vs = zip(*used, strict=True)
        return list(torch.autograd.grad(outs, leaves, vs, allow_unused=True, materialize_grads=True))
