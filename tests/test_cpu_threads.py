"""The CPU recurrence and threads: PyTorch's setting is respected, and nothing hangs where threads are missing.

Every scenario runs in a process of its own with a time limit, since a lost thread shows as a barrier that never opens.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from fuseblock import _ext

pytestmark = [
    pytest.mark.skipif(not _ext.has("fuseblock_cpu", "lstm_recurrence"), reason=str(_ext.why_not)),
    pytest.mark.timeout(150),
]

# `wide`, `both` and `narrowed` split their units over threads that meet at a barrier in every step; `tall` splits its rows.
_PRELUDE = """
import os, threading
import torch
import fuseblock

op = torch.ops.fuseblock_cpu


def problem(time, batch, hidden, directions=1, proj=None):
    gen = torch.Generator().manual_seed(batch)
    randn = lambda *shape: torch.randn(shape, generator=gen)
    c0 = randn(directions, batch, hidden)
    h0 = c0[..., :proj].contiguous()
    gx = randn(time, batch, directions * 4 * hidden)
    w_hh = randn(directions, 4 * hidden, proj or hidden) / hidden**0.5
    w_hr = None if proj is None else randn(directions, proj, hidden) / hidden**0.5
    lengths = torch.randint(0, time, (batch,), generator=gen)
    weights = w_hh, w_hr, lengths, None

    def run():
        y, h_n, c_n, gates, c = op.lstm_recurrence(gx, h0, c0, *weights, True)
        given = y, h_n, c_n, None, c, gates, c, c0, *weights
        grads = op.lstm_recurrence_bwd(*given)
        v_dh = None if proj is None else grads[3]
        second = op.lstm_recurrence_bwd_bwd(*grads[:3], v_dh, *given, grads[0])
        return [t for t in (y, h_n, c_n, gates, c, *grads, *second) if t.numel()]

    return run


wide, tall, both = problem(12, 2, 400), problem(40, 50, 64), problem(12, 3, 300, directions=2)
narrowed = problem(12, 3, 300, proj=200)
problems = wide, tall, both, narrowed


def close(got, expected):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5 * float(e.abs().max() + 1))


def tasks():
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(1)
before = tasks()
expected = [run() for run in problems]
"""


def _run(body: str, limit: float = 100.0) -> None:
    script = _PRELUDE + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_one_thread_starts_no_other() -> None:
    _run("assert tasks() == before, (before, tasks())")


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads_gives_the_same_result(threads: int) -> None:
    """8 are more than most test machines have cores: barriers must let go of the CPU."""
    _run(
        f"""
        torch.set_num_threads({threads})
        for _ in range(3):
            for run, value in zip(problems, expected):
                close(run(), value)
        """
    )


def test_number_of_threads_can_change_between_calls() -> None:
    _run(
        """
        for threads in (1, 4, 2, 1, 3):
            torch.set_num_threads(threads)
            for run, value in zip(problems, expected):
                close(run(), value)
        """
    )


def test_concurrent_callers() -> None:
    _run(
        """
        torch.set_num_threads(2)
        failures = []

        def caller(index):
            try:
                for _ in range(3):
                    for run, value in zip(problems, expected):
                        close(run(), value)
            except BaseException as error:
                failures.append(error)

        callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        assert not failures, failures
        """
    )


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_forked_child_does_not_wait_for_the_pool_of_its_parent() -> None:
    _run(
        """
        import signal
        torch.set_num_threads(2)
        values = [run() for run in problems]  # the pool exists now
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            results = [run() for run in problems]
            torch.set_num_threads(1)  # the comparison is PyTorch's, which would wait
            same = all(torch.allclose(g, e, atol=1e-4) for r, v in zip(results, values) for g, e in zip(r, v))
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        for run, value in zip(problems, values):  # the parent's pool is as it was
            close(run(), value)
        """
    )


def test_one_cpu_for_many_threads() -> None:
    """Threads that cannot run at the same time must not spin for each other."""
    _run(
        """
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(4)
        for run, value in zip(problems, expected):
            close(run(), value)
        """
    )


def test_inside_a_parallel_backward() -> None:
    """Called from autograd's own threads, which have a pool of their own."""
    _run(
        """
        torch.set_num_threads(2)

        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                for run, value in zip(problems, expected):
                    close(run(), value)
                return grad

        x = torch.ones(3, requires_grad=True)
        Call.apply(x).sum().backward()
        assert x.grad is not None
        """
    )
