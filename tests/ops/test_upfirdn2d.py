"""Operator upfirdn2d on every backend: values, derivatives of every order, layouts, transforms, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

import fuseblock
from fuseblock import functional

from .. import emulator
from ..backends import DEVICE, Forced, available
from ..emulator.upfirdn2d import EmulatedUpfirdn2d
from .bounds import error_ratio, poisoned_outputs, relative_error, state_dtype

FAMILY = "upfirdn2d"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"rows": torch.contiguous_format, "channels_last": torch.channels_last}


def run(forced: Forced, x: Tensor, f: Tensor | None, *args: Any, **options: Any) -> Tensor:
    with fuseblock.backend(forced.name):
        return functional.upfirdn2d(
            x.to(forced.device), None if f is None else f.to(forced.device), *args, **options
        ).cpu()


def four(padding: Any) -> tuple[int, int, int, int]:
    return (padding,) * 4 if isinstance(padding, int) else padding


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def upsampled(x: Tensor, up: Any, padding: Any) -> Tensor:
    """x with zeros between and around its samples."""
    (n, c, h, w), (ux, uy), (x0, x1, y0, y1) = x.shape, pair(up), four(padding)
    u = x.new_zeros(n, c, h, uy, w, ux)
    u[:, :, :, 0, :, 0] = x
    u = F.pad(u.reshape(n, c, h * uy, w * ux), [max(p, 0) for p in (x0, x1, y0, y1)])
    return u[:, :, max(-y0, 0) : u.shape[2] - max(-y1, 0), max(-x0, 0) : u.shape[3] - max(-x1, 0)]


def by_definition(
    x: Tensor,
    f: Tensor,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Sums over windows."""
    dx, dy = pair(down)
    windows = upsampled(x, up, padding).unfold(2, f.shape[0], dy).unfold(3, f.shape[1], dx)
    return torch.einsum("nchwkl,kl->nchw", windows, (f if flip_filter else f.flip((0, 1))) * gain)


def composite(
    x: Tensor,
    f: Tensor,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """What PyTorch users write by hand, in the dtype of x."""
    u, (dx, dy), c = upsampled(x, up, padding), pair(down), x.shape[1]
    kernel = (f if flip_filter else f.flip((0, 1))).to(x.dtype) * gain
    return F.conv2d(u, kernel.expand(c, 1, *f.shape), stride=(dy, dx), groups=c)


# shape, filter, up, down, padding (x0, x1, y0, y1)
CASES = {
    "blur": ((2, 5, 5, 7), (4, 4), 1, 1, (2, 1, 2, 1)),
    "up": ((1, 3, 6, 5), (4, 4), 2, 1, (2, 1, 2, 1)),
    "up, odd padding": ((1, 8, 5, 4), (4, 4), 2, 1, (3, 2, -1, 4)),
    "down": ((3, 8, 9, 8), (4, 4), 1, 2, 1),
    "one pixel": ((1, 1, 1, 1), (4, 4), 2, 1, (2, 1, 2, 1)),
    "both factors": ((1, 2, 6, 7), (3, 5), (3, 2), (2, 3), (4, 3, 2, 5)),
    "crop": ((1, 3, 9, 11), (2, 3), 1, 1, (-3, -2, -1, -4)),
    "pad and crop beyond": ((1, 1, 2, 1), (1, 2), 2, 1, (-3, 7, 6, -3)),
    "far padding": ((1, 2, 3, 3), (4, 4), 1, 1, (9, 7, 6, 8)),
    "filter shorter than up": ((1, 2, 3, 4), (1, 1), (4, 3), (1, 1), 0),
    "many channels": ((1, 96, 4, 3), (4, 4), 1, 1, (2, 1, 2, 1)),
    "larger": ((1, 3, 33, 31), (4, 4), 1, 2, (1, 1, 1, 1)),
    # Rows of whole vectors, in x and in y.
    "rows": ((2, 3, 5, 16), (4, 4), 1, 1, (2, 1, 2, 1)),
    "rows, far padding": ((1, 1, 2, 8), (4, 4), 1, 1, (9, 10, 3, 4)),
    "rows, crop": ((1, 2, 9, 24), (4, 4), 1, 1, (-9, 4, -2, 0)),
    "rows, up": ((1, 3, 5, 8), (4, 4), 2, 1, (2, 1, 2, 1)),
    "rows, up, odd padding": ((1, 2, 4, 16), (4, 4), 2, 1, (3, 0, 1, 2)),
    "rows, down": ((1, 3, 9, 32), (4, 4), 1, 2, (1, 1, 1, 1)),
    "rows, down, odd padding": ((1, 2, 6, 16), (4, 4), 1, 2, (-3, 5, 4, 0)),
    "rows, long filter": ((1, 2, 5, 16), (1, 12), 1, 1, (6, 5, 0, 1)),
    "rows, up and down": ((1, 2, 6, 8), (3, 5), (2, 1), (1, 2), (3, 1, 2, 1)),
    "rows, down and up": ((1, 1, 3, 32), (5, 3), (1, 2), (2, 1), (2, -1, -1, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_values(forced: Forced, case: str, layout: str) -> None:
    shape, taps, up, down, padding = CASES[case]
    for dtype in DTYPES:
        x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        f = torch.randn(taps, dtype=torch.float64).to(state_dtype(dtype))
        args = (up, down, padding, dtype.itemsize > 2, 1.5)
        want = by_definition(x.double(), f.double(), *args)
        stock = composite(x, f, *args)
        with poisoned_outputs():
            got = run(forced, x, f, *args)
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert got.is_contiguous(memory_format=LAYOUTS[layout])
        ratio = error_ratio(got, want, relative_error(stock, want), 2 * f.numel() + 8)
        assert ratio <= 1, f"{dtype}: error {ratio:.3g} times the allowed one"


@pytest.mark.parametrize(
    ("shape", "taps"),
    [((1, 130, 13, 3), 12), ((1, 1, 3, 300), 4), ((2, 70, 3, 40), 4)],
    ids=["channels", "wide", "groups"],
)
def test_parts_of_large_images_on_a_cpu(shape: tuple[int, ...], taps: int) -> None:
    with available("cpu") as cpu:
        f = torch.randn(taps, taps, dtype=torch.float64)
        for layout in LAYOUTS.values():
            x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
            for up, down in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3)):
                got, want = (run(cpu, x, f, up, down, taps), by_definition(x, f, up, down, taps))
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * taps**2)


@pytest.mark.parametrize(
    "case", ["blur", "up, odd padding", "down", "both factors", "many channels", "rows, up and down"]
)
def test_triton_in_small_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs per launch in both dimensions, the last ones ragged."""
    from fuseblock.launch import triton_upfirdn2d

    shape, taps, up, down, padding = CASES[case]
    f = torch.randn(taps, dtype=torch.float64)
    with available("triton") as triton:
        monkeypatch.setattr(
            triton_upfirdn2d, "_blocks", lambda places, channels, vector: (16, min(channels, 2))
        )
        for layout in LAYOUTS.values():
            x = torch.randn(*shape[:1], min(shape[1], 5), *shape[2:], dtype=torch.float64)
            x = x.contiguous(memory_format=layout)
            with poisoned_outputs():
                got = run(triton, x, f, up, down, padding)
            torch.testing.assert_close(got, by_definition(x, f, up, down, padding), rtol=0, atol=1e-13)


@pytest.mark.skipif(DEVICE != "cpu", reason="launches are the emulator's")
def test_cuda_takes_whole_vectors_of_a_row() -> None:
    """One thread for all elements of a vector, where rows of x and y are whole vectors of 16 bytes."""
    module, f = emulator.load_family("upfirdn2d", "plain"), torch.ones(4, 4)
    run = EmulatedUpfirdn2d(module).upfirdn2d
    for dtype, offset, width, vector in [
        (torch.float32, 0, 64, 4),
        (torch.bfloat16, 0, 64, 8),
        (torch.bfloat16, 0, 68, 1),
        (torch.bfloat16, 1, 64, 1),
        (torch.float64, 0, 64, 1),
    ]:
        x = torch.zeros(32 * 4 * width + offset, dtype=dtype)[offset:].view(1, 32, 4, width)
        f = f.to(state_dtype(dtype))
        run(x, f, 1, 1, 1, 1, 2, 1, 2, 1, False, 1.0)
        assert module.last_launch()[:1] == (32 * width // vector // 128,)
        run(x, f, 1, 1, 1, 1, 2, 2, 2, 1, False, 1.0)  # y's rows are longer by one
        assert module.last_launch()[:1] == (-(-32 * (width + 1) // 128),)


def test_threads_do_not_change_a_bit() -> None:
    x, f = torch.randn(2, 64, 65, 33), torch.randn(4, 4)
    threads = torch.get_num_threads()
    with available("cpu") as cpu:
        try:
            torch.set_num_threads(1)
            want = run(cpu, x, f, 2, 1, (2, 1, 2, 1))
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(run(cpu, x, f, 2, 1, (2, 1, 2, 1)), want)
        finally:
            torch.set_num_threads(threads)


SMALL = [
    ((1, 2, 3, 4), (3, 2), (2, 1), (1, 2), (1, 2, 2, 1)),
    ((1, 1, 4, 3), (4, 4), 2, 1, (2, 1, 3, -1)),
    ((1, 1, 5, 4), (4, 4), 1, 2, 2),
]


@pytest.mark.parametrize("case", range(len(SMALL)))
def test_gradients_of_every_order(forced: Forced, case: int) -> None:
    shape, taps, up, down, padding = SMALL[case]
    f = torch.randn(taps, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return run(forced, x, f, up, down, padding, case == 1, 0.7)

    layout = torch.channels_last if case == 0 else torch.contiguous_format
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(ours, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, x, fast_mode=True)

    def third(resample: Callable[[Tensor], Tensor]) -> Tensor:
        # Every derivative is again a function of x: the cubes are not linear.
        first = grad(resample(x).pow(3).sum(), x, create_graph=True)[0]
        second = grad(first.pow(3).sum(), x, create_graph=True)[0]
        return grad(second.pow(2).sum(), x)[0]

    want = third(lambda x: by_definition(x, f, up, down, padding, case == 1, 0.7))
    assert relative_error(third(ours), want) < 1e-12


def test_path_length_penalty(forced: Forced) -> None:
    """Second-order gradients by the weights, through a generator that upsamples and blurs."""
    f = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)] * 2) / 64
    w = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    latents, noise = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, 10, 10, dtype=torch.float64)

    def penalty(resample: Callable[..., Tensor]) -> Tensor:
        z = latents.clone().requires_grad_()
        x = resample(z[:, :, None, None].expand(-1, -1, 5, 5).tanh(), f, 2, 1, (2, 1, 2, 1), False, 4.0)
        y = resample(F.conv2d(x, w, padding=1).tanh(), f, 1, 1, (2, 1, 2, 1))
        (lengths,) = grad((y * noise).sum(), z, create_graph=True)
        return grad((lengths.norm(dim=1) - 0.5).square().mean(), w)[0]

    torch.testing.assert_close(
        penalty(lambda *args: run(forced, *args)), penalty(composite), rtol=1e-12, atol=1e-12
    )


def test_layouts_that_need_a_copy(forced: Forced) -> None:
    base, f = torch.randn(3, 4, 7, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for x in (
        base[:, 1:3],
        base[..., ::2],
        base.transpose(2, 3),
        base[:1].expand(3, -1, -1, -1),
        base[:0],
        base[:, :0],
    ):
        got = run(forced, x, f.t().contiguous().t(), 2, 1, 3)
        assert got.is_contiguous()
        torch.testing.assert_close(got, by_definition(x, f, 2, 1, 3), rtol=0, atol=1e-13)


def test_one_channel_or_pixel_has_the_strides_of_the_fake(forced: Forced) -> None:
    for shape in ((2, 1, 3, 4), (2, 3, 1, 1)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        assert run(forced, x, torch.ones(2, 2), padding=1).is_contiguous()


def test_separable_filters(forced: Forced) -> None:
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    for taps, up, down in ((4, 1, 1), (12, 1, 1), (12, (4, 2), 1), (13, 2, 2), (7, 1, (2, 1))):
        f = torch.randn(taps, dtype=torch.float64)
        args = (up, down, (7, 6, 9, 5), False, -2.0)
        want = by_definition(x, torch.outer(f, f), *args)
        torch.testing.assert_close(run(forced, x, f, *args), want, rtol=1e-12, atol=1e-11)


def test_helpers_keep_their_sizes() -> None:
    x = torch.randn(1, 2, 8, 6, dtype=torch.float64)
    for f in (None, torch.ones(4, dtype=torch.float64) / 4, torch.ones(3, 5, dtype=torch.float64) / 15):
        assert functional.filter2d(x, f).shape == x.shape
        assert functional.upsample2d(x, f).shape == (1, 2, 16, 12)
        assert functional.upsample2d(x, f, (3, 1)).shape == (1, 2, 8, 18)
        assert functional.downsample2d(x, f).shape == (1, 2, 4, 3)
        assert functional.downsample2d(x, f, [1, 4]).shape == (1, 2, 2, 6)
        assert functional.filter2d(x, f, padding=[1, 2]).shape == (1, 2, 12, 8)
    # Filters whose sum is 1 keep a constant image inside, after upsampling too.
    constant = torch.ones(1, 1, 8, 8)
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for helper in (functional.filter2d, functional.upsample2d, functional.downsample2d):
        inner = helper(constant, f)[..., 2:-2, 2:-2]
        torch.testing.assert_close(inner, torch.ones_like(inner))
    assert torch.equal(functional.upfirdn2d(x, None, down=2), x[..., ::2, ::2])
    assert torch.equal(functional.upsample2d(x, None)[..., ::2, ::2], 4 * x) or torch.equal(
        functional.upsample2d(x, None)[..., 1::2, 1::2], 4 * x
    )


def test_a_ramp_is_filtered_as_documented(forced: Forced) -> None:
    """By hand: convolution turns the filter, correlation does not; `x` comes before `y`."""
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    f = torch.tensor([[1.0, 10.0]])
    assert run(forced, x, f).tolist() == [[[[12.0, 24.0]]]]
    assert run(forced, x, f, flip_filter=True).tolist() == [[[[21.0, 42.0]]]]
    assert run(forced, x, f, up=(2, 1)).tolist() == [[[[10.0, 2.0, 20.0, 4.0, 40.0]]]]
    assert run(forced, x, f, padding=[1, 0, 0, 0], gain=2.0).tolist() == [[[[2.0, 24.0, 48.0]]]]
    assert run(forced, x, f, down=[2, 1], padding=(0, 1, 0, 0)).tolist() == [[[[12.0, 40.0]]]]


def test_nan_and_infinity_travel_no_further_than_the_filter(forced: Forced) -> None:
    x, f = torch.zeros(1, 1, 9, 9), torch.ones(3, 3)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[0, 0, 4, 4] = value
        y = run(forced, x, f, padding=1)
        inside = torch.zeros_like(y, dtype=torch.bool)
        inside[..., 3:6, 3:6] = True
        assert (y[~inside] == 0).all()
        torch.testing.assert_close(y[inside], torch.full((9,), value), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    torch.library.opcheck(
        torch.ops.fuseblock.upfirdn2d.default, (x, torch.randn(3, 4), 2, 1, 1, 2, 2, 1, 3, 0, False, 1.5)
    )


def test_transforms() -> None:
    x, f = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return functional.upfirdn2d(x, f, 2, 1, 1).pow(3).sum()

    def plain(x: Tensor) -> Tensor:
        return composite(x, f, 2, 1, 1).pow(3).sum()

    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), torch.vmap(torch.func.grad(plain))(x))
    mapped = torch.vmap(lambda x, f: functional.upfirdn2d(x, f, 1, 2, 1), in_dims=(1, 0))(
        x, torch.stack([f, 2 * f])
    )
    torch.testing.assert_close(mapped[1], 2 * by_definition(x[:, 1], f, 1, 2, 1))
    tangent = torch.func.jvp(lambda x: functional.upfirdn2d(x, f, 2), (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, by_definition(x[1], f, 2))


def test_compiled_without_a_break() -> None:
    f = torch.randn(4, 4)
    compiled = torch.compile(
        lambda x: functional.upsample2d(x, f).relu(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (5, 8):
        x = torch.randn(2, 3, size, size + 2, requires_grad=True)
        want = functional.upsample2d(x, f).relu()
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(grad(compiled(x).sum(), x)[0], grad(want.sum(), x)[0])


def test_autocast_keeps_the_dtype() -> None:
    x = torch.randn(1, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.filter2d(x, torch.ones(3, 3)).dtype == torch.float32


def test_bad_input() -> None:
    x, f = torch.randn(1, 2, 4, 4), torch.ones(3, 3)
    for error, message, args in (
        (ValueError, "x of shape", (x[0], f)),
        (ValueError, "filter of shape", (x, f[None])),
        (ValueError, "filter of shape", (x, torch.ones(0, 3))),
        (ValueError, "filter of shape", (x, torch.ones(3, 0))),
        (ValueError, r"larger than .* of shape \(2, 4\)", (x, f, 1, 1, (0, 0, -1, -1))),
        (ValueError, r"larger than .* of shape \(4, 2\)", (x, f, 1, 1, (-1, -1, 0, 0))),
        (TypeError, "expected x of a floating point dtype", (x.long(), f)),
        (TypeError, "expected f of a floating point dtype", (x, f.long())),
        (ValueError, "larger than the upsampled and padded image", (x, f, 1, 1, -1)),
        (ValueError, "up of at least 1", (x, f, 0)),
        (ValueError, "down of at least 1", (x, f, 1, (1, 0))),
        (ValueError, "expected up as 1 or 2 numbers", (x, f, (1, 2, 3))),
        (ValueError, "expected padding as 1 or 2 or 4 numbers", (x, f, 1, 1, (1, 2, 3))),
    ):
        with pytest.raises(error, match=message):
            functional.upfirdn2d(*args)
    with pytest.raises(ValueError, match="one device"):
        functional.upfirdn2d(x, f.to("meta"))


def test_the_filter_has_no_gradient() -> None:
    x, f = torch.randn(1, 1, 4, 4), torch.ones(3, 3, requires_grad=True)
    with pytest.raises(ValueError, match="filter requires a gradient"):
        functional.upfirdn2d(x, f)
    with torch.no_grad():
        functional.upfirdn2d(x, f)
    y = torch.ops.fuseblock.upfirdn2d(x, f, 1, 1, 1, 1, 0, 0, 0, 0, False, 1.0)
    with pytest.raises(NotImplementedError, match="no gradient with respect to the filter"):
        y.sum().backward()
