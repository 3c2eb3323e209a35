"""torch.func transforms and forward mode over the functional layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import fuseblock
from fuseblock import functional, ops
from fuseblock.reference import lstm_recurrence_reference

T, B, H = 3, 2, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def new(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gates_loss(gates: Tensor, c: Tensor) -> Tensor:
    h, c_new = functional.lstm_gates(gates, c)
    return h.sin().sum() + c_new.pow(2).sum()


def recurrence_inputs(directions: int = 1) -> tuple[Tensor, ...]:
    return (
        new(T, B, directions * 4 * H),
        new(directions, B, H),
        new(directions, B, H),
        new(directions, 4 * H, H),
    )


def recurrence_loss(*args: Tensor, lengths: Tensor | None = None) -> Tensor:
    y, h_n, c_n = functional.lstm_recurrence(*args, lengths=lengths)
    return y.sin().sum() + h_n.pow(2).sum() + c_n.sum()


def plain(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss on plain PyTorch equations."""

    def run(*args: Tensor) -> Tensor:
        with fuseblock.backend("reference"):
            return loss(*args)

    return run


LOSSES = {
    "lstm_gates": (gates_loss, lambda: (new(2, 4 * H), new(2, H))),
    "lstm_recurrence": (recurrence_loss, recurrence_inputs),
    "two directions": (recurrence_loss, lambda: recurrence_inputs(2)),
}


@pytest.fixture(params=LOSSES)
def problem(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    loss, inputs = LOSSES[request.param]
    return loss, inputs()


def same(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, **CLOSE)


def test_grad(problem) -> None:
    loss, args = problem
    where = tuple(range(len(args)))
    same(grad(loss, where)(*args), grad(plain(loss), where)(*args))


def test_vmap(problem) -> None:
    loss, args = problem
    many = tuple(torch.stack([a, a + 1, a * 2]) for a in args)
    same(vmap(loss)(*many), torch.stack([plain(loss)(*one) for one in zip(*many, strict=True)]))


@pytest.mark.parametrize("mapped", range(4))
def test_vmap_over_one_argument(mapped: int) -> None:
    args = list(recurrence_inputs())
    dim = args[mapped].dim()
    args[mapped] = torch.stack([args[mapped], args[mapped] + 1], dim)  # the mapped dimension is the last
    in_dims = tuple(dim if k == mapped else None for k in range(4))
    got = vmap(functional.lstm_recurrence, in_dims)(*args)
    singles = []
    for n in range(2):
        one = [a.select(dim, n) if k == mapped else a for k, a in enumerate(args)]
        singles.append(lstm_recurrence_reference(*one)[:3])
    same(got, tuple(torch.stack(parts) for parts in zip(*singles, strict=True)))


def test_vmap_over_lengths() -> None:
    args = recurrence_inputs(2)
    lengths = torch.tensor([[3, 1], [0, 2]])
    got = vmap(lambda n: functional.lstm_recurrence(*args, lengths=n))(lengths)
    singles = [lstm_recurrence_reference(*args, lengths=n)[:3] for n in lengths]
    same(got, tuple(torch.stack(parts) for parts in zip(*singles, strict=True)))


def test_per_sample_gradients_equal_a_loop() -> None:
    gx, h0, c0, w_hh = recurrence_inputs()
    samples = gx.unbind(1)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return recurrence_loss(x.unsqueeze(1), h0[:, :1], c0[:, :1], w)

    got = vmap(grad(loss), (None, 0))(w_hh, torch.stack(samples))
    want = []
    for x in samples:
        leaf = w_hh.clone().requires_grad_()
        want.append(torch.autograd.grad(loss(leaf, x), leaf)[0])
    same(got, torch.stack(want))


def test_jacrev(problem) -> None:
    loss, args = problem
    same(jacrev(loss)(*args), jacrev(plain(loss))(*args))


def test_hessian(problem) -> None:
    loss, args = problem
    same(hessian(loss)(*args), hessian(plain(loss))(*args))


def test_grad_of_grad(problem) -> None:
    loss, args = problem

    def penalty(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: grad(f)(*a).pow(2).sum()

    same(grad(penalty(loss))(*args), grad(penalty(plain(loss)))(*args))


def test_forward_mode_falls_back_to_the_reference(problem) -> None:
    loss, args = problem
    tangents = tuple(torch.randn_like(a) for a in args)
    same(jvp(loss, args, tangents), jvp(plain(loss), args, tangents))


def test_dual_numbers(problem) -> None:
    loss, args = problem
    tangent = torch.randn_like(args[0])
    with forward_ad.dual_level():
        value = loss(forward_ad.make_dual(args[0], tangent), *args[1:])
        got = forward_ad.unpack_dual(value).tangent
    _, want = jvp(lambda x: plain(loss)(x, *args[1:]), (args[0],), (tangent,))
    same(got, want)


@pytest.mark.parametrize("where", ["forced backend", "operator"])
def test_forward_mode_of_kernels_raises(where: str) -> None:
    gates, c = new(2, 4 * H), new(2, H)

    def run(x: Tensor) -> Tensor:
        if where == "operator":
            return ops.lstm_gates(x, c)[0]
        with fuseblock.backend("cpu"):
            return functional.lstm_gates(x, c)[0]

    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
        jvp(run, (gates,), (gates,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        run(forward_ad.make_dual(gates, gates))


def test_transforms_under_autocast() -> None:
    gates, c = new(2, 4 * H).float(), new(2, H).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = grad(lambda x: functional.lstm_gates(x, c)[0].float().sum())(gates)
        leaf = gates.clone().requires_grad_()
        (want,) = torch.autograd.grad(functional.lstm_gates(leaf, c)[0].float().sum(), leaf)
    assert got.dtype == torch.float32
    same(got, want)


def test_batched_gradients() -> None:
    """`is_grads_batched`, which `torch.autograd.functional.jacobian(vectorize=True)` uses, equals a loop."""
    args = tuple(a.requires_grad_() for a in recurrence_inputs())
    y = functional.lstm_recurrence(*args)[0].sum((0, 1))
    rows = torch.eye(y.numel(), dtype=y.dtype)
    got = torch.autograd.grad(y, args, rows, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(y, args, row, retain_graph=True) for row in rows]
    same(got, tuple(torch.stack(column) for column in zip(*loop, strict=True)))


@pytest.mark.parametrize("mistake", ["no weights", "odd weights", "h0", "c0", "both layouts"])
def test_mistakes_in_a_stack(mistake: str) -> None:
    layer = (new(4 * H, H), new(4 * H, H), None, None, None)
    x, state, three = new(T, B, H), new(1, B, H), torch.tensor([3, 3])
    calls: dict[str, Callable[[], object]] = {
        "no weights": lambda: functional.lstm(x, None, None, []),
        "odd weights": lambda: functional.lstm(x, None, None, [layer], bidirectional=True),
        "h0": lambda: functional.lstm(x, state, None, [layer] * 2),
        "c0": lambda: functional.lstm(x, None, state, [layer] * 2),
        "both layouts": lambda: functional.lstm(x, None, None, [layer], lengths=three, batch_sizes=three),
    }
    with pytest.raises(ValueError, match="lstm: expected"):
        calls[mistake]()


@pytest.mark.parametrize("engine", ["auto", "aten"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_mode_over_a_recorded_layer(engine: str, create_graph: bool) -> None:
    """The forward has run on kernels, before anybody knew of tangents."""
    torch.manual_seed(0)
    layer = fuseblock.nn.LSTM(3, 4, num_layers=2).double()
    stock = torch.nn.LSTM(3, 4, num_layers=2).double()
    stock.load_state_dict(layer.state_dict())
    x, dy, tangent = new(5, 2, 3), new(5, 2, 4), new(5, 2, 4)
    found = []
    for module, run in ((stock, "auto"), (layer, engine)):
        leaf = x.clone().requires_grad_()
        with fuseblock.backend(run):
            y = module(leaf)[0]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(dy, tangent)
            found.append(
                torch.autograd.grad(y, [leaf, *module.parameters()], dual, create_graph=create_graph)
            )
            found[-1] = [forward_ad.unpack_dual(g) for g in found[-1]]
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.primal, want.primal, **CLOSE)
        torch.testing.assert_close(got.tangent, want.tangent, **CLOSE)
