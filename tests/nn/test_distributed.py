"""DistributedDataParallel on two processes equals one process on the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import fuseblock


def model_and_batch() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return fuseblock.nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(6, 4, 3)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x = model_and_batch()
    parallel = DistributedDataParallel(copy.deepcopy(model))
    parallel(x[:, 2 * rank : 2 * rank + 2])[0].square().sum().backward()
    if rank == 0:
        torch.save([p.grad for p in parallel.parameters()], f"{folder}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    model, x = model_and_batch()
    model(x)[0].square().sum().backward()
    for got, parameter in zip(torch.load(tmp_path / "grads.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad / 2)
