"""`fuseblock.graphed`: its contract on a CPU, and PyTorch's graph calls on stand-ins; real graphs: test_gpu_graphed.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuseblock
from fuseblock import gan

module = sys.modules["fuseblock.graphed"]  # the function hides it


class Trainer:
    """An alternating step of two small networks, with a penalty on request."""

    def __init__(self, lr: float | Tensor = 1e-2) -> None:
        torch.manual_seed(0)
        self.d = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 1))
        self.g = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
        self.optimizers = [torch.optim.Adam(m.parameters(), lr) for m in (self.d, self.g)]

    def train_d(self, real: Tensor, z: Tensor, *, penalise: bool = False) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.g(z)
        loss = gan.hinge_discriminator_loss(self.d(real), self.d(fake))
        if penalise:
            loss = loss + gan.r1_penalty(self.d, real)
        return {"loss": self._step(loss, 0), "fake": fake}

    def train_g(self, z: Tensor) -> Tensor:
        return self._step(gan.hinge_generator_loss(self.d(self.g(z))), 1)

    def _step(self, loss: Tensor, which: int) -> Tensor:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()
        return loss

    def state(self) -> list[Tensor]:
        return [t for m in (self.d, self.g) for t in m.state_dict().values()]


def draws(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(n)
    ]


def test_every_call_is_one_step() -> None:
    """Losses, weights and running statistics are those of plain calls, in warm-up and after."""
    plain, ours = Trainer(), Trainer()
    step_d = fuseblock.graphed(ours.train_d)
    step_g = fuseblock.graphed(ours.train_g, pool=step_d)
    for n, (real, z) in enumerate(draws(14)):
        want = plain.train_d(real, z, penalise=n % 3 == 0), plain.train_g(z)
        got = step_d(real, z, penalise=n % 3 == 0), step_g(z)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(ours.state(), plain.state(), rtol=0, atol=0)
    assert (step_d.graphs, step_g.graphs) == (2, 1)


def test_outputs_belong_to_their_kind_and_are_overwritten() -> None:
    step = fuseblock.graphed(lambda x, scale: {"y": (x * scale, scale), "const": "name"}, warmup=2)
    first, other = step(torch.ones(3), 2.0), step(torch.ones(3), 5.0)
    assert first["y"][1] == 2.0 and first["const"] == "name"
    for value in (3.0, 4.0, 6.0):
        again = step(torch.full((3,), value), 2.0)
        assert again["y"][0] is first["y"][0]
        assert first["y"][0].tolist() == [2 * value] * 3
        assert other["y"][0].tolist() == [5.0] * 3
    assert not step(torch.ones(3), 2.0)["y"][0].requires_grad


def test_the_step_sees_copies() -> None:
    seen = []

    def step(x: Tensor) -> Tensor:
        seen.append(x)
        return x.add_(1)

    run, given = (
        fuseblock.graphed(step, warmup=2),
        torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    )
    for _ in range(3):
        assert run(given).is_contiguous(memory_format=torch.channels_last)
        assert given.sum() == 0
    assert all(x is seen[0] for x in seen) and seen[0] is not given
    assert seen[0].stride() == given.stride()


def test_kinds_of_calls_are_limited() -> None:
    step = fuseblock.graphed(lambda x: x.sum(), max_graphs=2)
    step(torch.ones(3, 4))
    with torch.no_grad():
        step(torch.ones(3, 4))
    with pytest.raises(
        RuntimeError, match=r"2 kinds of calls are the limit.*\(2, 4\).*for.*\(3, 4\).*drop_last"
    ):
        step(torch.ones(2, 4))
    step.reset()
    assert step(torch.ones(2, 4)) == 8


def recorded(trainer: Trainer) -> Any:
    step = fuseblock.graphed(trainer.train_d, warmup=2)
    for real, z in draws(3):
        step(real, z)
    return step


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.optimizers[0].param_groups[0].update(lr=0.5),
            r"Adam 0 group 0 lr \(recorded 0.01, now 0.5\)",
        ),
        (lambda t: t.d.eval(), r"Linear \d training"),
        (lambda t: t.d[0].weight.requires_grad_(False), r"Linear \d weight requires_grad"),
        (lambda t: setattr(t.d[0], "weight", deepcopy(t.d[0].weight)), r"Linear \d weight address"),
        (
            lambda t: t.optimizers[0].load_state_dict(deepcopy(t.optimizers[0].state_dict())),
            r"Adam 0 state 0 exp_avg",
        ),
    ],
    ids=["lr", "mode", "frozen", "replaced", "optimizer state"],
)
def test_what_a_recording_holds_may_not_change(change: Any, named: str) -> None:
    trainer = Trainer()
    step = recorded(trainer)
    change(trainer)
    with pytest.raises(RuntimeError, match=named):
        step(*draws(1)[0])
    step.reset()
    assert step(*draws(1)[0])["loss"].isfinite() and step.graphs == 0


def test_a_step_may_put_buffers_in_the_place_of_others() -> None:
    """Its Python does not run in a replay, so a recording does not see it; nor may an eager step be refused for it."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * x
            return self.mean

    kept, step = [], fuseblock.graphed(Mean(), warmup=2)
    for _ in range(5):
        kept.append(step.step.mean)  # lest an address is given out again
        step(torch.ones(3))
    assert torch.equal(step.step.mean, torch.full((3,), 1 - 0.5**5))


def test_another_kind_may_train_further_parameters() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.Adam(weights)

    def train(x: Tensor, both: bool) -> Tensor:
        loss = (weights[0] * x).sum() + ((weights[1] * x).sum() if both else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    step = fuseblock.graphed(train, warmup=2)
    for both in (False,) * 3 + (True,) * 3 + (False,):
        assert step(torch.ones(2), both).isfinite()
    assert step.graphs == 2


def test_a_schedule_of_a_tensor_is_followed() -> None:
    plain, ours = Trainer(), Trainer(torch.tensor(1e-2))
    step = fuseblock.graphed(ours.train_d)
    schedules = [torch.optim.lr_scheduler.StepLR(t.optimizers[0], 2, 0.5) for t in (plain, ours)]
    for real, z in draws(8):
        torch.testing.assert_close(step(real, z), plain.train_d(real, z))
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(ours.state(), plain.state())


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="warmup of at least 2, got 1"):
        fuseblock.graphed(torch.sin, warmup=1)
    with pytest.raises(ValueError, match="max_graphs of at least 1, got 0"):
        fuseblock.graphed(torch.sin, max_graphs=0)
    step = fuseblock.graphed(lambda *args: args[0])
    with pytest.raises(ValueError, match="tensor 1 of the arguments requires a gradient"):
        step(torch.ones(1), torch.ones(1, requires_grad=True))
    with pytest.raises(TypeError, match="hashable values, got set"):
        step(torch.ones(1), {1})
    with pytest.raises(ValueError, match="no argument is a tensor"):
        step(3)
    with pytest.raises(ValueError, match=r"tensors of one device, got \['cpu', 'meta'\]"):
        step(torch.ones(1), torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="tensors on cpu, as at first, got meta"):
        step(torch.ones(1)), step(torch.ones(1, device="meta"))
    sizes = iter((1, 2))
    step = fuseblock.graphed(lambda: torch.ones(next(sizes)), device="cpu")
    step()
    with pytest.raises(RuntimeError, match="tensors of other shapes or dtypes than before"):
        step()
    kinds = iter((torch.ones(1), 2 * (torch.ones(1),)))
    step = fuseblock.graphed(lambda: next(kinds), device="cpu")
    step()
    with pytest.raises(RuntimeError, match="the step returned TreeSpec"):
        step()


# ------------------------------------------------------------------------------------------ on stand-ins of torch.cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for streams and graphs that take CPU tensors: capturing runs nothing of what it notes, replaying does."""
    events: list[Any] = []
    mode = ["default"]

    class Stream:
        def wait_stream(self, other: Any) -> None:
            events.append("wait")

    current, graphs = Stream(), []

    @contextmanager
    def graph(made: Any, **options: Any) -> Iterator[None]:
        events.append(("capture", options["pool"], options["capture_error_mode"], made.generators))
        graphs.append(made)
        yield

    class CUDAGraph:
        def __init__(self) -> None:
            self.generators: list[Any] = []
            self.register_generator_state = self.generators.append

        def replay(self) -> None:
            events.append("replay")

    @contextmanager
    def nothing(_: Any) -> Iterator[None]:
        yield

    def set_mode(value: str) -> None:
        mode[0] = value

    stands = {
        "device": nothing,
        "stream": nothing,
        "current_stream": lambda: current,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": set_mode,
    }
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    monkeypatch.setattr(
        module, "runner_on", lambda device, generators: module.Cuda(device, generators, Stream(), "pool")
    )
    events.append(mode)
    return events


def test_graphs_are_captured_after_warm_up_and_replayed(cuda: list[Any]) -> None:
    mode, modes = cuda.pop(), []
    step = fuseblock.graphed(lambda x: (modes.append(mode[0]), x + 1)[1], generators=("own",))
    other = fuseblock.graphed(lambda x: x + 2, pool=step, warmup=2)
    for _ in range(6):
        step(torch.zeros(2))
    # Three eager calls, the last of which may not wait for the GPU, one recorded, and no Python from then on.
    assert modes == ["default", "default", "error", "default"]
    assert mode == ["default"]
    assert cuda == [*["wait"] * 6, ("capture", "pool", "thread_local", ["own"]), *["replay"] * 3]
    cuda.clear()
    for _ in range(3):
        other(torch.zeros(2))
    assert cuda == [*["wait"] * 4, ("capture", "pool", "thread_local", []), "replay"]


def test_what_cannot_be_captured_is_named(cuda: list[Any]) -> None:
    mode = cuda.pop()

    def waits(x: Tensor) -> Tensor:
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")  # as PyTorch does
        return x

    step = fuseblock.graphed(waits, warmup=2)
    step(torch.ones(1))
    with pytest.raises(
        RuntimeError, match=r"waits for the GPU, at .*test_graphed.py:\d+: raise RuntimeError"
    ):
        step(torch.ones(1))
    assert mode == ["default"]

    def scaled(x: Tensor) -> Tensor:
        code = compile("waits(x)", "torch/amp/grad_scaler.py", "exec")
        exec(code, {"waits": waits, "x": x})
        return x

    step = fuseblock.graphed(scaled, warmup=2)
    step(torch.ones(1))
    with pytest.raises(RuntimeError, match="in GradScaler: it needs an optimizer with fused=True"):
        step(torch.ones(1))

    count = iter(range(9))

    def fails(x: Tensor) -> Tensor:
        if next(count) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    step = fuseblock.graphed(fails, warmup=2)
    step(torch.ones(1)), step(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"cannot be captured, at .*test_graphed.py.*not permitted"):
        step(torch.ones(1))

    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        weight = nn.Parameter(torch.ones(1))
        made = optimizer([weight], lr=0.1)
        step = fuseblock.graphed(lambda x, made=made, w=weight: ((w * x).backward(), made.step())[1])
        if optimizer is torch.optim.Adam:
            with pytest.raises(
                ValueError, match="Adam counts its steps on the CPU: construct it with capturable=True"
            ):
                step(torch.ones(1))
        else:
            step(torch.ones(1))


def test_autocast_around_the_call_is_refused(cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step = fuseblock.graphed(lambda x: x, warmup=2)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    step(torch.ones(1)), step(torch.ones(1))
    with pytest.raises(RuntimeError, match="autocast is on around the call"):
        step(torch.ones(1))


def test_distributed_data_parallel_needs_a_longer_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parallel(nn.Linear):
        pass

    monkeypatch.setattr(module, "DistributedDataParallel", Parallel)
    model = Parallel(2, 2)
    with pytest.raises(ValueError, match="DistributedDataParallel needs warmup of at least 11, got 3"):
        fuseblock.graphed(model)(torch.ones(1, 2))
    assert fuseblock.graphed(model, warmup=11)(torch.ones(1, 2)).shape == (1, 2)


def test_inside_of_another_capture_the_step_just_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(is_available=lambda: True, is_current_stream_capturing=lambda: True)
    )
    given = torch.ones(1)
    assert fuseblock.graphed(lambda x: x)(given) is given


def test_modes_around_a_call_are_kinds() -> None:
    step = fuseblock.graphed(lambda x: x @ x, warmup=2)
    x = torch.randn(3, 3)
    for _ in range(4):
        assert step(x).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert step(x).dtype is torch.bfloat16
    with fuseblock.backend("reference"):
        step(x)
    assert len(step._kinds) == 3


def test_every_call_is_checked() -> None:
    step = fuseblock.graphed(lambda x: x * 2, warmup=2)
    step(torch.zeros(3))
    with pytest.raises(ValueError, match="requires a gradient"):
        step(torch.zeros(3, requires_grad=True))
    with pytest.raises(ValueError, match="expected tensors on meta, as given, got cpu"):
        fuseblock.graphed(lambda x: x, device="meta")(torch.zeros(3))


@pytest.mark.filterwarnings("error::UserWarning")
def test_compiled_modules() -> None:
    """Dynamo traces hooks of modules, which must not show it what they keep."""
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager")
    step = fuseblock.graphed(model, warmup=2)
    x = torch.ones(1, 2)
    for _ in range(4):
        torch.testing.assert_close(step(x), model(x))
    model.eval()
    with pytest.raises(RuntimeError, match="training"):
        step(x)


def test_pools_of_pools() -> None:
    first = fuseblock.graphed(lambda x: x)
    second = fuseblock.graphed(lambda x: x, pool=first)
    third = fuseblock.graphed(lambda x: x, pool=second)
    third(torch.zeros(1))
    second(torch.zeros(1))
    assert first._runner is second._runner is third._runner


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_a_graph_writes_must_stay(cuda: list[Any], set_to_none: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none)
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    step = fuseblock.graphed(train, warmup=2)
    for _ in range(4):
        step(torch.ones(1, 2))
    model.zero_grad()
    if set_to_none:  # they are the graph's own
        step(torch.ones(1, 2))
    else:
        with pytest.raises(RuntimeError, match="gradient"):
            step(torch.ones(1, 2))
