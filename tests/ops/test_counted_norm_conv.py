"""What norm_act_conv_bwd loads and stores is what the performance model says: of its kernels, and of the block's design."""

from __future__ import annotations

import pytest

import fuseblock
from fuseblock import ops

from .. import traffic
from ..backends import DEVICE, available
from ..benchmarks_package import load
from .conv_stats_cases import LAYOUTS
from .test_counted_passes import TOLERANCE, check
from .test_norm_act_conv_bwd import SLOPE, Case


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are counted in the interpreter")
@pytest.mark.parametrize(
    ("taps", "stride", "name", "layout"),
    [(3, 1, "norm_act_conv_bwd", "channels_last"), (4, 2, "conv_transpose2d_subpixel", "rows")],
)
def test_counted_passes(taps: int, stride: int, name: str, layout: str) -> None:
    """Besides what the convolution moves: it reads the norm's input; then that and G are read, and dx is written."""
    case = Case((taps, taps), (stride, stride), channels=21, out_channels=13, image=(24, 28))
    x, w, weight, bias, dy = case.draw()
    x, w, dy = (t.bfloat16().contiguous(memory_format=LAYOUTS[layout]) for t in (x, w, dy))
    per_channel = (t.float() for t in (weight, bias, bias, weight.abs()))
    registry = load("model_kernels")
    with available("triton"), fuseblock.backend("triton"), traffic.of_interpreted() as launches:
        ops.norm_act_conv_bwd(x, w, dy, *per_channel, *case.geometry, case.activation, SLOPE)
    shared = {"b": x.element_size(), "p": 0}
    sizes = {"X": dy.numel(), "Y": x.numel(), "W": w.numel(), "g": 1, "q": 1, "C": 13, "O": 21, "P": stride}
    gradient, apply = launches
    kernel = registry.CONVOLUTION.kernel(name)
    assert gradient.name == kernel.triton
    check([gradient], kernel, **shared, **sizes)
    norm = registry.NORM
    check(
        [apply],
        norm.kernel("batch_norm_act_bwd"),
        **dict.fromkeys(norm.symbols, 0) | {"E": x.numel(), "C": 21, "b": 2},
    )
    own = dy.nbytes + x.nbytes + w.nbytes
    moved = sum(launch.read + launch.written for launch in launches) - own
    assert moved / x.nbytes == pytest.approx(load("model_blocks").REDUCED.backward, rel=TOLERANCE)
