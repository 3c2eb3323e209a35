"""Blocks of GANs in the performance model: what stands between two convolutions, in passes over the activation.

What convolutions themselves move (their input, their output, gradients of both) is the same everywhere and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.model import Rates
from benchmarks.model_kernels import BIAS_ACT, NORM


def passes(*kernels: str, **flags: float) -> float:
    """Passes over the activation of norms' and activations' kernels; operands of channels do not count.

    ``flags``: symbols of the kernels' formulas that are not 0. ``b``, of which masks are a part, is the bytes of an element.
    """
    names = {name for family in (NORM, BIAS_ACT) for name in family.symbols}
    sizes = dict.fromkeys(names, 0.0) | {"E": 1.0, "b": 1.0, "P": 1.0} | flags
    own = {kernel.name: kernel for family in (NORM, BIAS_ACT) for kernel in family.kernels}
    return sum(own[name].moved(sizes) for name in kernels) / sizes["b"]


@dataclass(frozen=True)
class Design:
    """One way to run convolution, batch norm in training, LeakyReLU, convolution.

    Attributes:
        name: what the table calls it.
        forward, backward: passes over the activation besides the convolutions'.
        saved: tensors that forward keeps for backward, the next convolution's input included.
    """

    name: str
    forward: float
    backward: float
    saved: int

    def bytes_of_element(self, itemsize: int = 2) -> float:
        """Bytes that a training step moves for each element besides the convolutions'."""
        return (self.forward + self.backward) * itemsize


_FWD = ("batch_norm_act_fwd",)
_SWEEPS = ("batch_norm_act_stats", *_FWD)
_BWD = ("batch_norm_act_bwd_reduce", "batch_norm_act_bwd")
_SECOND = ("batch_norm_act_bwd_bwd_reduce", "batch_norm_act_bwd_bwd")
_WHOLE_FWD, _WHOLE_BWD = ("batch_norm_act_whole_fwd",), ("batch_norm_act_whole_bwd",)
_TWO_PASSES = Design(
    "fuseblock: norm and activation in one, two sweeps over x", passes(*_SWEEPS), passes(*_BWD), 2
)
_WHOLE = Design(
    "fuseblock: the same, one launch and one sweep, where a channel fits on chip",
    passes(*_WHOLE_FWD),
    passes(*_WHOLE_BWD),
    2,
)
_EPILOGUE = Design(
    "fuseblock: statistics in the convolution's epilogue (`conv2d_stats`)", passes(*_FWD), passes(*_BWD), 2
)
#: Its epilogue reads the norm's input, and the norm's own pass for sums goes.
REDUCED = Design(
    "fuseblock: and the norm's sums in the epilogue of the next input gradient (`norm_act_conv_bwd`)",
    passes(*_FWD),
    1 + passes("batch_norm_act_bwd"),
    2,
)
#: PyTorch's are what its kernels read and write: statistics R; norm R + W; activation R + W; backward 2R + W, 2R, 2R + W.
EAGER = Design("PyTorch, eager", 5, 8, 3)
DESIGNS = (
    EAGER,
    Design("PyTorch, torch.compile: statistics R, norm and activation R + W; 2R, 2R + W", 3, 5, 2),
    _TWO_PASSES,
    _WHOLE,
    _EPILOGUE,
    REDUCED,
    Design("ideal: nothing in between is written; backward reads y three times", 0, 3, 1),
)

#: Norm's second derivative, with the activation: passes of PyTorch's composition, counted in a trace, and ours.
SECOND_ORDER = (82, passes(*_SECOND))


@dataclass(frozen=True)
class Call:
    """A module of `fuseblock.nn` in training in float32, and who runs it: tests call it, and count.

    Attributes:
        module: the expression that makes it.
        backend: "cuda" or "triton".
        how: what is chosen, where there is a choice.
        kernels: of norms and activations that run, in order: in forward, in backward and, where it is counted, in the
            backward of the backward.
        launches: of our kernels, in each of these.
        small: launches at most of PyTorch's operations on what is small: operands of channels, weights, running statistics.
        more: passes besides: PyTorch's own (the sum that is the gradient of a convolution's bias, an activation's gradient,
            the sum of two gradients), and a residual that is read.
        convolution: the Triton kernel that takes the convolution's place, "": PyTorch's convolution runs.
    """

    module: str
    backend: str
    how: str
    kernels: tuple[tuple[str, ...], ...]
    launches: tuple[int, ...]
    small: tuple[int, ...]
    more: tuple[int, ...] = (0, 0, 0)
    convolution: str = ""

    def passes(self, itemsize: int) -> list[float]:
        """Over one activation, those of convolutions left out; masks count as what they are of ``itemsize`` bytes."""
        masks = {"b": float(itemsize), "m": float(("bias_act",) in self.kernels)}
        return [passes(*own, **masks) + more for own, more in zip(self.kernels, self.more, strict=False)]


_CONV, _UP = "Conv2dBlock(8, 8, 3, 1, 1)", "ConvTranspose2dBlock(8, 8, 4, 2, 1)"
_INSTANCE, _LEAKY = "Conv2dBlock(8, 8, 3, 1, 1, norm='instance')", "Conv2dBlock(8, 8, 3, 1, 1, norm=None)"
_NORM, _CONV2D = "BatchNormAct2d(8, activation='relu')", "conv2d_stats, conv2d_act"
_SUBPIXEL = "conv_transpose2d_subpixel"
CALLS = (
    Call(_CONV, "cuda", "two sweeps", (_SWEEPS, _BWD), (3, 3), (7, 2)),
    Call(_CONV, "cuda", "one sweep", (_WHOLE_FWD, _WHOLE_BWD), (1, 1), (7, 2)),
    Call(_CONV, "triton", "PyTorch's convolution", (_SWEEPS, _BWD), (3, 2), (11, 8)),
    Call(_CONV, "triton", "`conv2d_stats`", (_FWD, _BWD), (3, 2), (12, 8), convolution=_CONV2D),
    Call(_UP, "triton", f"`{_SUBPIXEL}`", (_FWD, _BWD), (3, 2), (12, 8), convolution=_SUBPIXEL),
    Call(_INSTANCE, "cuda", "one sweep", (_WHOLE_FWD, _WHOLE_BWD), (1, 1), (1, 0)),
    Call("ResidualBlock2d(8)", "cuda", "two sweeps", (_SWEEPS * 2, _BWD * 2), (6, 6), (14, 4), (1, 3)),
    Call(_NORM, "cuda", "two sweeps", (_SWEEPS, _BWD, _SECOND), (3, 3, 3), (7, 2, 60)),
    Call(_NORM, "triton", "two sweeps", (_SWEEPS, _BWD, _SECOND), (3, 2, 2), (11, 8, 61)),
    Call(_LEAKY, "cuda", "PyTorch's convolution", (("bias_act",), ("bias_act_bwd",)), (1, 1), (0, 0), (0, 1)),
    Call(_LEAKY, "triton", "`conv2d_act`", ((), ()), (1, 0), (1, 0), (0, 4), convolution=_CONV2D),
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A convolution of a published GAN and what follows it.

    Attributes:
        name: network, channels and geometry; ``batch`` is its users'.
        cin, cout, kernel: of the convolution; transposed ones have kernel 4, stride 2.
        size: height and width of the output.
        stride: of an ordinary convolution; 0: transposed.
        groups: of the convolution.
        norm: that follows: "batch" or "instance"; "": a bias and a LeakyReLU.
    """

    name: str
    batch: int
    cin: int
    cout: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1
    norm: str = "batch"

    @property
    def elements(self) -> int:
        """Of the output."""
        return self.batch * self.cout * self.size**2

    @property
    def inputs(self) -> float:
        """Elements of the input."""
        return self.batch * self.cin * (self.size * self.stride if self.stride else self.size / 2) ** 2

    def convolution(self, rates: Rates) -> float:
        """Seconds of the convolution alone in bfloat16."""
        taps = self.kernel**2 if self.stride else 4
        weights = self.kernel**2 * self.cin * self.cout / self.groups
        flops = 2 * self.elements * taps * self.cin / self.groups
        moved = 2 * (self.inputs + self.elements + weights)
        return max(flops / rates.achievable(True), moved / rates.achievable_memory)

    def passes(self, design: Design) -> tuple[float, float]:
        """Of forward and backward between this convolution and the next."""
        if self.norm:
            return design.forward, design.backward
        # The activation R + W. Backward, eager: activation 2R + W; ours: R + W and a bit an element. The bias's gradient: R.
        return (2, 4) if design is EAGER else (2 + 1 / 16, 3 + 1 / 16)

    def seconds(self, design: Design, rates: Rates) -> tuple[float, float]:
        """Of forward and backward: two convolutions' worth of products there."""
        convolution = self.convolution(rates)
        of_pass = 2 * self.elements / rates.achievable_memory
        forward, backward = self.passes(design)
        return convolution + forward * of_pass, 2 * convolution + backward * of_pass


BLOCKS = (
    Block("DCGAN-64 D 3 > 64 k4 s2, LeakyReLU", 128, 3, 64, 4, 32, 2, norm=""),
    Block("DCGAN-64 D 64 > 128 k4 s2", 128, 64, 128, 4, 16, 2),
    Block("DCGAN-64 D 256 > 512 k4 s2", 128, 256, 512, 4, 4, 2),
    Block("DCGAN-64 G 128 > 64 transposed", 128, 128, 64, 4, 32, 0),
    Block("DCGAN-128 G 64 > 64 transposed", 64, 64, 64, 4, 128, 0),
    Block("SNGAN, BigGAN-128 96 at 128^2", 64, 96, 96, 3, 128),
    Block("BigGAN-128 192 at 64^2", 64, 192, 192, 3, 64),
    Block("BigGAN-128 384 at 32^2", 64, 384, 384, 3, 32),
    Block("SNGAN-32 128 at 32^2", 64, 128, 128, 3, 32),
    Block("StyleGAN2-256 D 64 at 256^2, LeakyReLU", 32, 64, 64, 3, 256, norm=""),
    Block("pix2pix PatchGAN 64 > 128 k4 s2", 16, 64, 128, 4, 64, 2),
    Block("CycleGAN 256 at 64^2, instance norm", 4, 256, 256, 3, 64, norm="instance"),
    Block("SRGAN 64 at 96^2", 16, 64, 64, 3, 96),
    Block("ESRGAN conv5 192 > 64 at 32^2, LeakyReLU", 16, 192, 64, 3, 32, norm=""),
    Block("R3GAN grouped 3x3, 1536 in 96 groups at 32^2, LeakyReLU", 32, 1536, 1536, 3, 32, groups=96, norm=""),
)  # fmt: skip

#: Those of ours that a block can run on: the second with a kernel of its own for the convolution.
OURS = (_TWO_PASSES, _EPILOGUE)
