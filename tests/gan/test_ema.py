"""Averaged weights: the recurrence, kinds of tensors, swapping, copies and checkpoints, models that do not fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fuseblock
from fuseblock import gan


def model(dtype=torch.float64):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU()).to(dtype)
    net[0].bias.requires_grad_(False)
    return net


@torch.no_grad()
def move(net):
    """What a training step does, to every kind of tensor."""
    for tensor in [*net.parameters(), *net.buffers()]:
        tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 3)


def tensors(net):
    return {name: tensor.detach().clone() for name, tensor in [*net.named_parameters(), *net.named_buffers()]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_recurrence(warmup, buffers):
    net = model()
    ema = gan.ExponentialMovingAverage(net, 0.4, warmup=warmup, buffers=buffers)
    assert_same(ema.averages, tensors(net))
    expected = tensors(net)
    for n in range(8):
        decay = min(0.4, (1 + n) / (10 + n)) if warmup else 0.4
        assert ema.current_decay() == decay
        move(net)
        ema.update(net)
        for name, value in tensors(net).items():
            copied = not value.is_floating_point() or (buffers == "copy" and "running" in name)
            expected[name] = value if copied else decay * expected[name] + (1 - decay) * value
    assert ema.updates == 8
    for name, value in expected.items():
        assert ema.averages[name].dtype == value.dtype
        torch.testing.assert_close(ema.averages[name], value, rtol=1e-13, atol=1e-13)
    assert int(ema.averages["1.num_batches_tracked"]) == 24


@pytest.mark.filterwarnings("ignore:.*spectral_norm")
@pytest.mark.parametrize(
    "normalize", [fuseblock.nn.spectral_norm, parametrizations.spectral_norm, nn.utils.spectral_norm]
)
@pytest.mark.parametrize("nested", [False, True])
def test_vectors_of_spectral_norm_are_copied(normalize, nested):
    layer = normalize(nn.Linear(3, 4))
    layer.register_buffer("own", torch.zeros(2))
    net = nn.Sequential(layer) if nested else layer
    ema = gan.ExponentialMovingAverage(net, 0.5)
    start = tensors(net)
    move(net)
    ema.update(net)
    vectors = {name for name in start if name.endswith(("_u", "_v"))}
    assert len(vectors) == 2 and len(start) == 5
    for name, value in tensors(net).items():
        expected = value if name in vectors else (start[name] + value) / 2
        torch.testing.assert_close(ema.averages[name], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_averaged_in_float32(dtype):
    """Steps of 1e-3 of the way round to nothing in 16 bit."""
    net = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        net.weight.fill_(1.0)
    ema = gan.ExponentialMovingAverage(net, 0.999)
    with torch.no_grad():
        net.weight.fill_(2.0)
    for _ in range(200):
        ema.update(net)
    assert ema.averages["weight"].dtype == torch.float32
    assert float(ema.averages["weight"]) == pytest.approx(2 - 0.999**200, rel=1e-5)
    with ema.swapped_in(net):
        assert net.weight.dtype == dtype
        assert torch.equal(net.weight, ema.averages["weight"].to(dtype))
    assert torch.equal(net.weight, torch.full_like(net.weight, 2.0))


@pytest.mark.parametrize("fails", [False, True])
def test_swapping(fails):
    net = model()
    ema = gan.ExponentialMovingAverage(net, 0.9)
    parameters = list(net.parameters())
    move(net)
    ema.update(net)
    own, averages = tensors(net), {name: tensor.clone() for name, tensor in ema.averages.items()}
    try:
        with ema.swapped_in(net) as inside:
            assert inside is net
            assert_same(tensors(net), averages)
            net(
                torch.randn(4, 1, 5, 5, dtype=torch.float64)
            )  # in training mode: moves the running statistics
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert_same(tensors(net), own)
    assert_same(ema.averages, averages)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True)), "optimizers hold them"
    assert not net[0].bias.requires_grad and net[0].weight.requires_grad
    ema.copy_to(net)
    assert_same(tensors(net), averages)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_copies_are_independent(copier):
    net = model()
    ema = gan.ExponentialMovingAverage(net, 0.9, warmup=True)
    move(net)
    ema.update(net)
    twin = copier(ema)
    before = {name: tensor.clone() for name, tensor in twin.averages.items()}
    move(net)
    ema.update(net)
    assert_same(twin.averages, before)
    twin.update(net)
    assert_same(twin.averages, ema.averages)


def test_state_dict_goes_on_exactly(tmp_path):
    net = model()
    ema = gan.ExponentialMovingAverage(net, 0.9, warmup=True, buffers="copy")
    for _ in range(3):
        move(net)
        ema.update(net)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = gan.ExponentialMovingAverage(model(), 0.5)
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for _ in range(2):
        move(net)
        ema.update(net)
        other.update(net)
    assert_same(ema.averages, other.averages)
    assert (other.decay, other.warmup, other.buffers, other.updates) == (0.9, True, "copy", 5)


def test_tied_parameters_and_other_layouts():
    net = nn.Sequential(
        nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    )
    net[1].weight = net[0].weight
    ema = gan.ExponentialMovingAverage(net, 0.5)
    assert "1.weight" not in ema.averages
    assert ema.averages["2.weight"].is_contiguous(memory_format=torch.channels_last)
    start = tensors(net)
    move(net)
    ema.update(net)
    for name, value in tensors(net).items():
        torch.testing.assert_close(ema.averages[name], (start[name] + value) / 2)


def test_a_model_without_tensors():
    ema = gan.ExponentialMovingAverage(nn.ReLU())
    ema.update(nn.ReLU())
    with ema.swapped_in(nn.ReLU()):
        pass


def test_bad_input():
    net = model()
    ema = gan.ExponentialMovingAverage(net)
    for call in (ema.update, ema.copy_to, lambda other: ema.swapped_in(other).__enter__()):
        with pytest.raises(ValueError, match="the model has other tensors than the averages: .*bias"):
            call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the state has other tensors"):
        ema.load_state_dict({**ema.state_dict(), "averages": {}})
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], got 1.5"):
        gan.ExponentialMovingAverage(net, 1.5)
    with pytest.raises(ValueError, match="buffers: expected 'average' or 'copy', got 'keep'"):
        gan.ExponentialMovingAverage(net, buffers="keep")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_is_a_few_operators_on_lists(dtype, monkeypatch):
    """However many tensors there are; each list has one pair of dtypes, which a launch on a GPU takes."""
    blocks = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)) for _ in range(5)]
    model = fuseblock.nn.spectral_norm(torch.nn.Sequential(*blocks)).to(dtype)
    ema, calls = gan.ExponentialMovingAverage(model, 0.5), []
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3.0)
    runs = {name: getattr(torch, name) for name in ("_foreach_lerp_", "_foreach_copy_")}
    for name in runs:

        def counted(to, of, *rest, name=name, run=runs[name]):
            calls.append(name)
            assert len({x.dtype for x in to}) == len({x.dtype for x in of}) == 1
            run(to, of, *rest)

        monkeypatch.setattr(torch, name, counted)
    ema.update(model)
    # Averaged tensors, u and v of spectral norm, counters of batches; 16-bit values are widened first.
    assert sorted(calls) == ["_foreach_copy_"] * (2 if dtype == torch.float32 else 3) + ["_foreach_lerp_"]
    assert ema.averages["0.0.weight_u"].eq(3.0).all() and ema.averages["4.1.num_batches_tracked"] == 3
