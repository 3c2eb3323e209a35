"""fuseblock.nn.spectral_norm on several devices: replicas of DataParallel, ranks of DistributedDataParallel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fuseblock
from fuseblock._conv_engine import Call
from fuseblock.nn import _fused_convolution, spectral_norm

from .test_spectral_norm import assert_same_gradients, assert_same_state, pair


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.nn.Module]]:
    """DataParallel's, of which a CPU is as many devices as one likes."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        kept = [t.detach() if detach else t for t in tensors]  # of the first device they are the same
        return [kept, *([t.clone() for t in kept] for _ in devices[1:])]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return module.replicate  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [spectral_norm, torch.nn.utils.spectral_norm])
def test_replicas_that_may_run_fused(
    replicate: Callable[..., list[torch.nn.Module]],
    method: Callable[[torch.nn.Module], torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who runs is chosen before the weight is made, of which a replica has none till then, or another device's."""
    monkeypatch.setattr(_fused_convolution, "may_choose", lambda x: True)
    asked: list[int] = []

    def choose(call: Call) -> tuple[str, str]:
        asked.append(call.weight.data_ptr())
        return "aten", ""

    monkeypatch.setattr(_fused_convolution, "choose", choose)
    net = fuseblock.nn.Sequential(method(fuseblock.nn.Conv2d(3, 4, 3)), fuseblock.nn.LeakyReLU(0.1))
    _, second = replicate(net, [0, 1])
    second(torch.randn(2, 3, 8, 8))
    assert asked == [second[0].weight_orig.data_ptr()]


def test_replicas_of_data_parallel(replicate: Callable[..., list[torch.nn.Module]]) -> None:
    """Each normalises its own layers; the first one's u and v are the model's."""
    x = torch.randn(2, 3, 8, 8)
    mine, other = pair()[1], pair()[1]
    first, second = replicate(mine, [0, 1])
    assert torch.equal(first(x), second(x))
    mine.load_state_dict(other.state_dict())
    first, second = replicate(mine, [0, 1])
    first(x).square().sum().backward()
    other(x).square().sum().backward()
    assert_same_gradients(mine, other)
    assert_same_state(mine, other)
    assert not any("weight" in m.__dict__ for model in (mine, first) for m in model.modules())


def distributed_worker(rank: int, folder: str, broadcast_buffers: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(
        rank if broadcast_buffers else 0
    )  # other buffers at first are broadcast, if that is asked for
    model = spectral_norm(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 1))
    )
    parallel = DistributedDataParallel(model, **({} if broadcast_buffers else {"broadcast_buffers": False}))
    torch.manual_seed(rank)
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (parallel(x).mean() - parallel(x + 1).square().mean()).backward()  # two forwards, one backward
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("broadcast_buffers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes(tmp_path: Path, broadcast_buffers: bool) -> None:
    mp.spawn(distributed_worker, args=(str(tmp_path), broadcast_buffers), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
