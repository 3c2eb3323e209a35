"""The adjoint of a plain function, which the second order of the reference is made of."""

from __future__ import annotations

import torch

from fuseblock.reference._adjoint import adjoint

X, Y, V = (torch.randn(3, dtype=torch.float64) for _ in range(3))


def test_inputs_and_outputs_without_a_connection_give_zeros() -> None:
    a_x, a_y = adjoint(lambda x, y: (2 * x, torch.ones(3), y * y), (X, Y), (V, V, None))
    assert torch.equal(a_x, 2 * V)
    assert torch.equal(a_y, torch.zeros_like(Y))


def test_no_cotangent_at_all_gives_zeros() -> None:
    for cotangents in ((None,), (V,)):
        [a_x] = adjoint(lambda x: (torch.ones(3),), (X,), cotangents)
        assert torch.equal(a_x, torch.zeros_like(X))
    [a_x] = adjoint(lambda x: (x * x,), (X,), (None,))
    assert torch.equal(a_x, torch.zeros_like(X))


def test_it_records_where_autograd_is_switched_off() -> None:
    with torch.no_grad(), torch.inference_mode(False):
        [a_x] = adjoint(lambda x: (x * x,), (X,), (V,))
    torch.testing.assert_close(a_x, 2 * X * V)
