"""Statistics shared by two processes equal those of one process on the whole batch, in all orders; DDP on top."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fuseblock
from fuseblock import _ext, functional

#: Rows of each rank.
ROWS = (slice(0, 3), slice(3, 5))
#: (activation, residual, channels last, backend)
CASES = [
    (activation, residual, activation == "silu", backend)
    for activation, residual in (("leaky_relu", True), ("prelu", True), ("silu", True), ("identity", False))
    for backend in ("cpu", "reference")
    if backend == "reference" or _ext.has("fuseblock_cpu", "batch_norm_act")
]


def full(seed: int, channels_last: bool) -> Tensor:
    x = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def results(case: tuple[str, bool, bool, str], rows: slice, group: Any) -> dict[str, Tensor]:
    """Everything of three orders that a rank with these rows gets to see."""
    activation, with_residual, channels_last, backend = case

    def own(seed: int) -> Tensor:
        return full(seed, channels_last)[rows].clone().requires_grad_()

    x, residual, dy, v, v_r = (own(seed) for seed in range(5))
    weight, bias, slope, v_w, v_b = (torch.linspace(-1 + k, 2 - k / 2, 3).double() for k in range(5))
    leaves = {"x": x, "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}
    if with_residual:
        leaves["residual"] = residual
    if activation == "prelu":
        leaves["slope"] = slope.requires_grad_()
    running = torch.zeros(3).double(), torch.ones(3).double()
    with fuseblock.backend(backend) if group is not None else contextlib.nullcontext():
        y = functional.batch_norm_act(
            x,
            weight,
            bias,
            leaves.get("residual"),
            slope=leaves.get("slope"),
            running_mean=running[0],
            running_var=running[1],
            activation=activation,
            process_group=group,
        )
        first = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
        # The gradient of what all ranks sum: per-channel gradients are sums over ranks, so are their cotangents' shares.
        loss = (first[0] * v).sum() + (first[1] * v_w).sum() + (first[2] * v_b).sum()
        if with_residual:
            loss = loss + (first[3] * v_r).sum()
        targets = {"dy": dy, **leaves}
        second = torch.autograd.grad(loss, list(targets.values()), allow_unused=True, materialize_grads=True)
    found = {"y": y.detach(), "running_mean": running[0], "running_var": running[1]}
    found |= {f"d {name}": g.detach() for name, g in zip(leaves, first, strict=True)}
    return found | {f"dd {name}": g.detach() for name, g in zip(targets, second, strict=True)}


def networks() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        fuseblock.nn.BatchNormAct2d(4, activation="leaky_relu"),
        nn.Flatten(),
        nn.LazyLinear(1),
    ).double()
    real, fake = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
    model(real)
    return model, real, fake


def loss_of(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Two forwards before one backward, as a discriminator's loss has."""
    return model(real).exp().mean() + (-model(fake)).exp().mean()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[Any, Any] = {case: results(case, ROWS[rank], dist.group.WORLD) for case in CASES}
    model, real, fake = networks()
    rows = slice(2 * rank, 2 * rank + 2)
    for name, module in (("local", model), ("shared", copy.deepcopy(model))):
        if name == "shared":
            module[1].process_group = dist.group.WORLD
        parallel = DistributedDataParallel(module)
        loss_of(parallel, real[rows], fake[rows]).backward()
        found[name] = [p.grad for p in module.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_shared_statistics_equal_the_whole_batch(found: list[dict[Any, Any]], case: Any) -> None:
    whole = results(case, slice(0, 5), None)
    for name, want in whole.items():
        shares = [rank[case][name] for rank in found]
        if want.dim() == 4:
            got = torch.cat(shares)
        elif name.startswith("running"):
            assert torch.equal(*shares)
            got = shares[0]
        else:
            got = shares[0] + shares[1]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_two_forwards_and_one_backward_under_ddp(found: list[dict[Any, Any]]) -> None:
    model, real, fake = networks()
    per_rank = []
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        copied = copy.deepcopy(model)
        loss_of(copied, real[rows], fake[rows]).backward()
        per_rank.append([p.grad for p in copied.parameters()])
    loss_of(model, real, fake).backward()
    for rank in found:
        for got, a, b in zip(rank["local"], *per_rank, strict=True):
            torch.testing.assert_close(got, (a + b) / 2)
        for got, parameter in zip(rank["shared"], model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)
