"""What only a GPU can show: CUDA graphs, streams, several devices, cuDNN, offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fuseblock
from fuseblock import functional
from fuseblock.reference import lstm_gates_reference, lstm_recurrence_reference

pytestmark = pytest.mark.gpu

BACKENDS = ["triton", "cuda"]


def recurrence_inputs(
    dtype: torch.dtype, device: str = "cuda", time: int = 6, hidden: int = 64
) -> list[Tensor]:
    shapes = (time, 5, 8 * hidden), (2, 5, hidden), (2, 5, hidden), (2, 4 * hidden, hidden)
    gx, h0, c0, w_hh = (torch.randn(s, device=device) for s in shapes)
    return [gx.to(dtype), h0.to(dtype), c0, (w_hh * hidden**-0.5).to(dtype)]


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, n: int = 64) -> None:
    bound = n * torch.finfo(dtype).eps * max(1.0, want.abs().max().item())
    assert (got.double() - want.double()).abs().max().item() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_cuda_graph_capture_and_replay(name: str, dtype: torch.dtype) -> None:
    inputs = recurrence_inputs(dtype)
    lengths = torch.tensor([6, 0, 3, 5, 1], device="cuda")
    with fuseblock.backend(name), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            functional.lstm_recurrence(*inputs, lengths=lengths)  # compiles outside of the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _, _ = functional.lstm_recurrence(*inputs, lengths=lengths)
    for x in inputs[:3]:
        x.copy_(torch.randn_like(x))
    lengths.copy_(torch.tensor([2, 6, 0, 4, 6], device="cuda"))
    graph.replay()
    wide = [x.double() for x in inputs]
    assert_near(y, lstm_recurrence_reference(*wide, None, lengths)[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tritons_fused_step_in_a_cuda_graph(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch per step, forward and backward: replays follow the inputs, and one kernel serves all steps and all T."""
    knobs = pytest.importorskip("triton").knobs
    from fuseblock.launch import triton_lstm_recurrence_step as fused_step

    def run(gx: Tensor, h0: Tensor, c0: Tensor, w_hh: Tensor) -> list[Tensor]:
        y, h_n, c_n, gates, c = fused_step.fwd(gx, h0, c0, w_hh, None, lengths, None, True)
        return [y, *fused_step.bwd(y, h_n, c_n, None, None, gates, c, c0, w_hh, None, lengths, None)[:3]]

    inputs = recurrence_inputs(dtype, time=33, hidden=192)
    lengths = torch.tensor([33, 0, 16, 5, 1], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs)  # compiles outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **info: compiled.append(info["repr"]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*inputs)
    for x in inputs[:3]:
        x.copy_(torch.randn_like(x))
    lengths.copy_(torch.tensor([2, 33, 0, 4, 16], device="cuda"))
    graph.replay()
    assert all(map(torch.equal, outputs, run(*inputs)))
    assert_near(
        outputs[0], lstm_recurrence_reference(*(x.double() for x in inputs), None, lengths)[0], dtype, 192
    )
    for time in (1, 2, 16):
        run(inputs[0][:time], *inputs[1:])
    assert compiled == []


@pytest.mark.parametrize("name", BACKENDS)
def test_work_runs_on_the_current_stream(name: str) -> None:
    gates, c = torch.randn(4096, 4096, device="cuda"), torch.randn(4096, 1024, device="cuda")
    with fuseblock.backend(name):
        functional.lstm_gates(gates, c)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            gates.mul_(2)
            h, _ = functional.lstm_gates(gates, c)
        torch.cuda.current_stream().wait_stream(stream)
    assert_near(h, lstm_gates_reference(gates.double(), c.double())[0], torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", BACKENDS)
def test_second_device(name: str) -> None:
    inputs = recurrence_inputs(torch.float32, "cuda:1")
    with fuseblock.backend(name):
        y, _, _ = functional.lstm_recurrence(*inputs)
    assert y.device == torch.device("cuda:1")
    assert_near(y, lstm_recurrence_reference(*(x.double() for x in inputs))[0], torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
def test_lengths_out_of_range_are_clamped(name: str) -> None:
    inputs = recurrence_inputs(torch.float32)
    with fuseblock.backend(name):
        got = functional.lstm_recurrence(*inputs, lengths=torch.tensor([99, -3, 6, 2, 0], device="cuda"))
        want = functional.lstm_recurrence(*inputs, lengths=torch.tensor([6, 0, 6, 2, 0], device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_offsets_beyond_32_bits(name: str) -> None:
    rows, hidden = 2**29 // 256 + 3, 256  # 4 * H * rows > 2^31
    gates = torch.randn(rows, 4 * hidden, device="cuda", dtype=torch.float16)
    c = torch.randn(rows, hidden, device="cuda")
    with fuseblock.backend(name):
        h, _ = functional.lstm_gates(gates, c)
    assert_near(h[-5:], lstm_gates_reference(gates[-5:].double(), c[-5:].double())[0], torch.float16)


@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 32}], ids=str
)
@pytest.mark.parametrize("name", ["auto", "triton", "cuda"])
def test_module_against_cudnn(name: str, options: dict, module_dtype: torch.dtype) -> None:
    """Error against float64 of at most twice cuDNN's, in outputs and first gradients."""
    torch.manual_seed(0)
    stock = torch.nn.LSTM(32, 64, **options).cuda().to(module_dtype)
    ours = fuseblock.nn.LSTM(32, 64, **options).cuda().to(module_dtype)
    ours.load_state_dict(stock.state_dict())
    exact = torch.nn.LSTM(32, 64, **options).cuda().double()
    exact.load_state_dict({k: v.double() for k, v in stock.state_dict().items()})
    x = torch.randn(40, 16, 32, device="cuda").to(module_dtype)

    def run(module: torch.nn.LSTM, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, (h, c) = module(x)
        loss = y.double().sin().sum() + h.double().sum() + c.double().sum()
        return [y, h, c, *torch.autograd.grad(loss, [x, *module.parameters()])]

    want = run(exact, x.double())
    with fuseblock.backend(name):
        got = run(ours, x)
    relative = [
        [
            (a.double() - w).abs().max().item() / w.abs().max().item()
            for a, w in zip(values, want, strict=True)
        ]
        for values in (run(stock, x), got)
    ]
    limit = 2 * max(relative[0]) + torch.finfo(module_dtype).eps
    assert max(relative[1]) <= limit, f"{max(relative[1]):.3g} > {limit:.3g}"


def test_gradient_penalty_on_a_gpu() -> None:
    """What cuDNN refuses: a second derivative, on whatever ran forward."""
    ours = fuseblock.nn.LSTM(8, 16, bidirectional=True, dtype=torch.float64).cuda()
    x = torch.randn(7, 3, 8, dtype=torch.float64, device="cuda")

    def penalty() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(ours(leaf)[0].sum(), leaf, create_graph=True)
        return list(
            torch.autograd.grad(
                g.norm(dim=-1).sub(1).pow(2).sum(), list(ours.parameters()), allow_unused=True
            )
        )

    got = penalty()
    with fuseblock.backend("reference"):
        want = penalty()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_packed_sequences_and_long_sequences() -> None:
    stock = torch.nn.LSTM(4, 8).cuda()
    ours = fuseblock.nn.LSTM(4, 8).cuda()
    ours.load_state_dict(stock.state_dict())
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(9, 3, 4, device="cuda"), torch.tensor([4, 9, 2]), enforce_sorted=False
    )
    torch.testing.assert_close(ours(packed)[0].data, stock(packed)[0].data, rtol=1e-4, atol=1e-5)
    y, _ = ours(0.1 * torch.randn(70_000, 2, 4, device="cuda"))
    assert bool(y.isfinite().all())


NORM_CASES = [
    ("leaky_relu", False, torch.float32),
    ("leaky_relu", True, torch.bfloat16),
    ("silu", True, torch.float32),
]


@pytest.mark.parametrize(("activation", "channels_last", "dtype"), NORM_CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_batch_norm_act_in_a_cuda_graph(
    name: str, activation: str, channels_last: bool, dtype: torch.dtype
) -> None:
    """Forward, backward and second order of a captured call follow what is copied into its inputs."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual = (
        torch.randn(6, 48, 20, 20, device="cuda").to(dtype, memory_format=layout) for _ in range(2)
    )
    weight, bias = torch.randn(2, 48, device="cuda")

    def step(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        y = functional.batch_norm_act(leaves[0], *leaves[2:], leaves[1], activation=activation)
        first = torch.autograd.grad(y.float().sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.float().cos().sum() for g in first), leaves)
        return [t.detach() for t in (y, *first, *second)]

    inputs = [x, residual, weight, bias]
    with fuseblock.backend(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(*inputs)  # compiles outside of the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(*inputs)
        for t in inputs:
            t.copy_(torch.randn_like(t))
        graph.replay()
        again = step(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True)), "sums have a fixed order"
    with fuseblock.backend("reference"):
        want = step(*(t.double() for t in inputs))
    for got, exact in zip(captured[:3], want[:3], strict=True):
        assert_near(got, exact, dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_batch_norm_act_beyond_32_bit_offsets(name: str) -> None:
    x = torch.randn(2**31 // (64 * 1024) + 5, 64, 1024, device="cuda", dtype=torch.float16)
    with fuseblock.backend(name), torch.no_grad():
        y = functional.batch_norm_act(x, activation="relu")
    mean, var = x[:, 5].double().mean(), x[:, 5].double().var(correction=0)
    assert_near(y[-3:, 5], ((x[-3:, 5].double() - mean) * (var + 1e-5).rsqrt()).relu(), torch.float16)
