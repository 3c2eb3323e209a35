"""Blocks of GANs in the performance model: what stands between two convolutions, in passes over the activation.

What convolutions themselves move (their input, their output, gradients of both) is the same everywhere and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.model import Rates
from benchmarks.model_kernels import BIAS_ACT, NORM


def passes(*kernels: str) -> float:
    """Passes over the activation of the norm's kernels, for one without residual; operands of channels do not count."""
    names = {name for family in (NORM, BIAS_ACT) for name in family.symbols}
    sizes = dict.fromkeys(names, 0.0) | {"E": 1.0, "b": 1.0, "P": 1.0}
    found = [kernel for kernel in NORM.kernels if kernel.name in kernels]
    assert len(found) == len(kernels)
    return sum(kernel.moved(sizes) for kernel in found)


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


_BACKWARD = passes("batch_norm_act_bwd_reduce", "batch_norm_act_bwd")
_TWO_PASSES = Design(
    "fuseblock: norm and activation in one, two sweeps over x",
    passes("batch_norm_act_stats", "batch_norm_act_fwd"),
    _BACKWARD,
    2,
)
_WHOLE = Design(
    "fuseblock: the same, one launch and one sweep, where a channel fits on chip",
    passes("batch_norm_act_whole_fwd"),
    passes("batch_norm_act_whole_bwd"),
    2,
)
_EPILOGUE = Design(
    "fuseblock: statistics in the convolution's epilogue (`conv2d_stats`)",
    passes("batch_norm_act_fwd"),
    _BACKWARD,
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
    Design("ideal: nothing in between is written; backward reads y three times", 0, 3, 1),
)

#: Norm's second derivative, with the activation: passes of PyTorch's composition, counted in a trace, and ours.
SECOND_ORDER = (82, passes("batch_norm_act_bwd_bwd_reduce", "batch_norm_act_bwd_bwd"))


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
        # The activation R + W. Backward, eager: activation 2R + W, the bias's gradient R; ours: R + W and a bit an element.
        return (2, 4) if design is EAGER else (2 + 1 / 16, 2 + 1 / 16)

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
