"""DCGAN's and SNGAN's networks: shapes, channels and initial values of the papers, equality with torch.nn, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fuseblock
from fuseblock import gan


def mirror(model):
    """The same network of torch.nn's layers, with the same state_dict keys."""
    blocks = []
    for block in model:
        if not isinstance(block, nn.Sequential):
            blocks.append(nn.Conv2d(block.in_channels, 1, 4, bias=False))
            continue
        conv, *rest = block
        kind = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose2d) else nn.Conv2d
        layers = [kind(conv.in_channels, conv.out_channels, 4, conv.stride, conv.padding)]
        layers[0].bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        generator = kind is nn.ConvTranspose2d
        if isinstance(rest[0], nn.BatchNorm2d):
            layers += [nn.BatchNorm2d(conv.out_channels), nn.ReLU() if generator else nn.LeakyReLU(0.2)]
        else:
            layers += [nn.Tanh() if generator else nn.LeakyReLU(0.2)]
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("size", [8, 16, 32, 128])
def test_dcgan_shapes(size):
    width = 2
    generator = gan.DCGANGenerator(size, 3, width, 7)
    discriminator = gan.DCGANDiscriminator(size, 3, width)
    z = torch.randn(3, 7)
    images = generator(z)
    assert images.shape == (3, 3, size, size)
    assert float(images.detach().abs().max()) <= 1
    assert discriminator(images).shape == (3,)
    generator.eval()
    assert torch.equal(generator(z), generator(z[:, :, None, None]))
    stages = size.bit_length() - 3
    widths = [width * min(8, 2**n) for n in range(stages)]
    assert [block[0].out_channels for block in generator] == [*reversed(widths), 3]
    assert [block[0].out_channels for block in list(discriminator)[:-1]] == widths


def weights_init(m):
    """As it stands in PyTorch's DCGAN tutorial."""
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight.data, 1.0, 0.02)
        nn.init.constant_(m.bias.data, 0)


def test_initialisations_by_names_of_classes():
    """They take blocks for convolutions."""
    for model in (gan.DCGANGenerator(32, width=8), gan.DCGANDiscriminator(32, width=8)):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
        names = [name for name, _ in model.named_parameters()]
        model.apply(weights_init)
        assert [name for name, _ in model.named_parameters()] == names
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                assert 0.01 < float(module.weight.detach().std()) < 0.03
            if isinstance(module, nn.BatchNorm2d):
                assert abs(float(module.weight.detach().mean()) - 1) < 0.05
                assert not module.bias.any()
    block = model[0]
    assert block.weight is block[0].weight and block.bias is block[0].bias
    block[0] = nn.Identity()
    assert not hasattr(block, "weight")


def test_dcgan_64_is_the_papers():
    """1024, 512, 256, 128 channels at 4, 8, 16, 32 pixels (figure 1)."""
    generator = gan.DCGANGenerator(64, width=128)
    assert [block[0].out_channels for block in generator] == [1024, 512, 256, 128, 3]
    assert generator[0][0].weight.shape == (100, 1024, 4, 4)


@pytest.mark.parametrize("norm", ["batch", None])
def test_dcgan_is_torch_nns(norm):
    """Checkpoints go both ways; outputs, gradients and gradients of penalties are torch.nn's in float64."""
    generator = gan.DCGANGenerator(16, 2, 4, 5).double()
    discriminator = gan.DCGANDiscriminator(16, 2, 4, norm=norm).double()
    twins = [mirror(model).double() for model in (generator, discriminator)]
    for twin, model in zip(twins, (generator, discriminator), strict=True):
        twin.load_state_dict(model.state_dict())
        model.load_state_dict(twin.state_dict())
    z = torch.randn(6, 5, 1, 1, dtype=torch.float64)
    results = []
    for g, d in ((generator, discriminator), twins):
        fake = g(z)
        logits = d(fake)
        loss = gan.non_saturating_generator_loss(logits) + gan.r1_penalty(d, fake)
        loss = loss + gan.wgan_gp_penalty(d, fake, -fake, generator=torch.Generator().manual_seed(0))
        loss.backward()
        gradients = [p.grad for model in (g, d) for p in model.parameters()]
        results.append([fake.detach(), logits.detach().flatten(), *gradients])
    for ours, stock in zip(*results, strict=True):
        # The longest sum: a batch of 6 images of 8x8 pixels in 16 taps of 4 channels.
        bound = 6 * 64 * 16 * 4 * torch.finfo(torch.float64).eps
        assert float((ours - stock).abs().max()) <= bound * float(stock.abs().max())
    for twin, model in zip(twins, (generator, discriminator), strict=True):
        for (name, ours), stock in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, stock, msg=lambda text, name=name: f"{name}: {text}")


def check_spread(weights, expected, mean=0.0):
    """The sample's mean and deviation within 5 of their own deviations."""
    count = weights.numel()
    assert abs(float(weights.mean()) - mean) < 5 * expected / math.sqrt(count)
    assert abs(float(weights.std()) / expected - 1) < 5 / math.sqrt(2 * count)


def test_dcgan_initial_values():
    """Convolutions N(0, 0.02), batch norm weights N(1, 0.02), biases 0: the paper's section 4 and its usual code."""
    for model in (gan.DCGANGenerator(32, width=16), gan.DCGANDiscriminator(32, width=16)):
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                check_spread(module.weight.detach(), 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                check_spread(module.weight.detach(), 0.02, 1.0)
                assert not module.bias.detach().any()


@pytest.mark.parametrize("size", [8, 32])
def test_resnet_shapes(size):
    generator = gan.ResNetGenerator(size, 3, 4, 7)
    discriminator = gan.ResNetDiscriminator(size, 3, 4)
    images = generator(torch.randn(2, 7))
    assert images.shape == (2, 3, size, size)
    assert float(images.detach().abs().max()) <= 1
    assert discriminator(images).shape == (2,)


def test_resnet_ends():
    """Before and behind the residual blocks, in torch.nn.functional's words."""
    generator = gan.ResNetGenerator(8, 2, 4, 7).eval()
    discriminator = gan.ResNetDiscriminator(8, 2, 4, spectral=False)
    with torch.no_grad():
        for p in (generator.norm.weight, generator.norm.bias, generator.norm.running_mean):
            p.normal_()
        z = torch.randn(3, 7)
        norm, conv = generator.norm, generator.conv
        start = nn.functional.linear(z, generator.linear.weight, generator.linear.bias).reshape(3, 4, 4, 4)
        hidden = nn.functional.batch_norm(
            generator.blocks(start), norm.running_mean, norm.running_var, norm.weight, norm.bias
        )
        images = torch.tanh(nn.functional.conv2d(hidden.relu(), conv.weight, conv.bias, padding=1))
        torch.testing.assert_close(generator(z), images)
        pooled = discriminator.blocks(images).relu().sum((2, 3))
        torch.testing.assert_close(discriminator(images), discriminator.linear(pooled).flatten())


def test_dcgan_norms():
    for norm, kind, count in (
        ("batch", nn.BatchNorm2d, 2),
        ("instance", nn.InstanceNorm2d, 2),
        (None, None, 0),
    ):
        discriminator = gan.DCGANDiscriminator(32, 1, 2, norm=norm)
        found = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d)]
        assert len(found) == count and all(isinstance(m, kind) for m in found)
    with pytest.raises(ValueError, match="norm"):
        gan.DCGANDiscriminator(32, 1, 2, norm="layer")
    norms = [m for m in gan.DCGANGenerator(32, 1, 2).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3


def test_resnet_channels_are_the_papers():
    """Tables 4 and 5 of SNGAN, at 32 and 128 pixels (the latter's widths divided by 16)."""
    blocks = gan.ResNetDiscriminator(32, spectral=False).blocks
    assert [block.conv2.out_channels for block in blocks] == [128] * 4
    assert [block.conv2.out_channels for block in gan.ResNetGenerator(32).blocks] == [256] * 3
    wide = gan.ResNetGenerator(128, width=4, max_multiplier=16)
    assert wide.linear.out_features == 16 * 64
    assert [block.conv2.out_channels for block in wide.blocks] == [64, 32, 16, 8, 4]
    deep = gan.ResNetDiscriminator(128, width=4, max_multiplier=16, spectral=False)
    assert [block.conv2.out_channels for block in deep.blocks] == [4, 8, 16, 32, 64, 64]


def test_resnet_initial_values():
    """Xavier uniform: gain sqrt(2) in residual blocks, 1 elsewhere."""
    for model in (gan.ResNetGenerator(8, 3, 16, 32), gan.ResNetDiscriminator(8, 3, 16, spectral=False)):
        for name, module in model.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            inner = name.startswith("blocks") and "shortcut" not in name
            fans = sum(module.weight.shape[:2]) * module.weight[0, 0].numel()
            bound = (math.sqrt(2) if inner else 1) * math.sqrt(6 / fans)
            largest = float(module.weight.detach().abs().max())
            assert largest <= bound
            if module.weight.numel() > 300:
                assert largest > 0.98 * bound
            assert module.bias is None or not module.bias.detach().any()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("init", [gan.init_dcgan, gan.init_sngan])
def test_initialising_normalised_weights(init):
    """What they are computed from is initialised: by what the plain model gets from the same random numbers."""
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 2))
    ours = fuseblock.nn.spectral_norm(copy.deepcopy(plain))
    stock = copy.deepcopy(plain)
    for layer in stock:
        nn.utils.parametrizations.spectral_norm(layer)
    for model in (plain, ours, stock):
        torch.manual_seed(0)
        assert init(model) is model
    for k in range(2):
        assert torch.equal(ours[k].weight_orig, plain[k].weight)
        assert torch.equal(stock[k].parametrizations.weight.original, plain[k].weight)
        assert not ours[k].bias.any()
    assert ours(torch.randn(2, 3, 4, 6)).isfinite().all()
    with pytest.raises(ValueError, match="parameter 'weight' to initialise in Conv2d"):
        init(nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 5, 3))))


def test_spectral_norm_reaches_every_weight():
    discriminator = gan.ResNetDiscriminator(8, 1, 4)
    images = torch.randn(4, 1, 8, 8)
    for _ in range(40):
        discriminator(images)
    real_logits, fake_logits = discriminator(images), discriminator(-images)
    loss = gan.hinge_discriminator_loss(real_logits, fake_logits) + gan.r1_penalty(discriminator, images)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())
    fuseblock.nn.remove_spectral_norm(discriminator)
    layers = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 6
    for layer in layers:
        sigma = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(sigma) == pytest.approx(1.0, abs=0.05)


def test_spectral_norm_compiles_as_one_graph():
    discriminator = gan.ResNetDiscriminator(8, 1, 3).double()
    other = copy.deepcopy(discriminator)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    compiled = torch.compile(discriminator, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(images), other(images))


def test_penalties_with_spectral_norm():
    """Against torch's own parametrizations, in float64."""
    torch.manual_seed(1)
    stock = gan.ResNetDiscriminator(8, 1, 3, spectral=False).double()
    ours = gan.ResNetDiscriminator(8, 1, 3).double()
    for module in list(stock.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.utils.parametrizations.spectral_norm(module)
    ours.load_state_dict(stock.state_dict())
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    gradients = []
    for model in (ours, stock):
        loss = gan.hinge_discriminator_loss(model(images), model(-images)) + gan.r1_penalty(model, images)
        (loss + gan.r2_penalty(model, -images)).backward()
        gradients.append(
            {
                name.replace("parametrizations.weight.original", "weight_orig"): p.grad
                for name, p in model.named_parameters()
            }
        )
    first, second = gradients
    assert first.keys() == second.keys()
    # The longest sum: 4 images of 8x8 pixels in 9 taps of 3 channels.
    bound = 4 * 64 * 9 * 3 * torch.finfo(torch.float64).eps
    for name, gradient in second.items():
        assert float((first[name] - gradient).abs().max()) <= bound * float(gradient.abs().max()), name


def test_same_size_block():
    """SNGAN's: x + conv(relu(conv(relu(x))))."""
    block = gan.ResNetDiscriminator(8, 1, 4, spectral=False).blocks[-1]
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        expected = x + nn.functional.conv2d(
            nn.functional.conv2d(x.relu(), block.conv1.weight, block.conv1.bias, padding=1).relu(),
            block.conv2.weight,
            block.conv2.bias,
            padding=1,
        )
        torch.testing.assert_close(block(x), expected)


def test_same_seed_same_network():
    for build in (lambda: gan.DCGANGenerator(8, 1, 4, 5), lambda: gan.ResNetDiscriminator(8, 1, 4)):
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(build().state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bad_input():
    for build in (gan.DCGANGenerator, gan.DCGANDiscriminator, gan.ResNetGenerator, gan.ResNetDiscriminator):
        for size in (4, 12, 0):
            with pytest.raises(ValueError, match=f"size: expected a power of two from 8 on, got {size}"):
                build(size)
        with pytest.raises(ValueError, match="width: expected a positive number, got 0"):
            build(8, width=0)
    with pytest.raises(ValueError, match="1 to 3 halvings of size 8"):
        gan.ResNetDiscriminator(8, halvings=4)
    for generator in (gan.DCGANGenerator(8, 1, 2, 5), gan.ResNetGenerator(8, 1, 2, 5)):
        for shape in ((2, 4), (2, 5, 2, 2), (5,)):
            with pytest.raises(ValueError, match=r"expected latents \(N, 5\)"):
                generator(torch.randn(shape))
    for discriminator in (gan.DCGANDiscriminator(8, 1, 2), gan.ResNetDiscriminator(8, 1, 2)):
        with pytest.raises(ValueError, match=r"expected images \(N, 1, 8, 8\), got \(2, 3, 8, 8\)"):
            discriminator(torch.randn(2, 3, 8, 8))
