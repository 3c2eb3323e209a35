"""What `dcgan.py` shows: sample grids, curves, and the share of generated digits that a classifier of real ones accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
JUNK = 10


def save_grid(images: Tensor, path: Path, columns: int = 10, zoom: int = 2) -> None:
    """Images ``(N, 1 or 3, H, W)`` in [-1, 1] as one PNG, ``columns`` in a row, each pixel ``zoom`` wide."""
    from PIL import Image

    channels, height, width = images.shape[1:]
    rows = -(-len(images) // columns)
    pad = images.new_full((rows * columns - len(images), channels, height, width), -1.0)
    cells = F.pad(torch.cat([images, pad]), (1, 1, 1, 1), value=-1.0)
    grid = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    pixels = ((grid + 1) * 127.5).round().clamp(0, 255).byte().cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def plot(history: dict[str, list[float]], title: str, logits_name: str, path: Path) -> None:
    """Losses, what D says and gradient norms of every step, in three panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "loss": {"D loss": "D, without penalty", "penalty": "penalty", "G loss": "G"},
        logits_name: {"D(x)": "D(x)", "D(G(z))": "D(G(z)), step of D", "D(G(z)) in G": "D(G(z)), step of G"},
        "gradient norm": {"D gradient": "D", "G gradient": "G"},
    }
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 10), sharex=True)
    steps = len(history["D loss"])
    width = max(1, steps // 200)
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for key, label in curves.items():
            values = np.asarray(history[key])
            (line,) = axis.plot(values, lw=0.5, alpha=0.25)
            smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
            axis.plot(np.arange(len(smooth)) + width // 2, smooth, color=line.get_color(), label=label)
        axis.set_ylabel(name)
        axis.legend(fontsize=8, loc="upper right")
    axes[-1].set_yscale("log")
    axes[-1].set_xlabel("step")
    axes[0].set_title(f"{title} (means of {width} steps over single ones)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Verdict:
    """What the judge says of some images.

    Attributes:
        accepted: share that is taken for a digit.
        counts: accepted images per class.
    """

    accepted: float
    counts: list[int]


class Judge:
    """A support vector machine that tells ten digits, and junk: it accepts what is a digit to it.

    Trained on four fifths of the real digits, and on junk made of them, so that it does not have to call every picture some
    digit: shuffled pixels, pixels of many digits, means of two digits, left and right halves of two digits, noise.
    The last fifth checks it: `accepts_real` and `accepts_junk` are the shares it accepts of unseen digits and of junk
    made of them.
    """

    def __init__(self, images: Tensor, labels: NDArray[np.int64]) -> None:
        from sklearn.svm import SVC

        pixels = features(images)
        held = np.arange(len(pixels)) % 5 == 4
        random = np.random.default_rng(0)
        junk = make_junk(pixels[~held], labels[~held], 400, random)
        self.classifier = SVC(gamma=0.25, C=10.0)
        self.classifier.fit(
            np.concatenate([pixels[~held], junk]),
            np.concatenate([labels[~held], np.full(len(junk), JUNK)]),
        )
        found = self.classifier.predict(pixels[held])
        self.accuracy = float((found == labels[held]).mean())
        self.accepts_real = float((found != JUNK).mean())
        unseen = self.classifier.predict(make_junk(pixels[held], labels[held], 100, random))
        self.accepts_junk = float((unseen != JUNK).mean())

    def __call__(self, images: Tensor) -> Verdict:
        """Judge images ``(N, 1, H, W)`` in [-1, 1]."""
        found = self.classifier.predict(features(images))
        counts = np.bincount(found, minlength=JUNK + 1)
        return Verdict(1 - float(counts[JUNK]) / len(found), [int(count) for count in counts[:JUNK]])


def features(images: Tensor) -> Array:
    """8x8 pixels in [0, 1], whatever the size was."""
    small = F.interpolate(images, (8, 8), mode="area") if images.shape[-1] > 8 else images
    pixels: Array = ((small + 1) / 2).flatten(1).double().cpu().numpy()
    return pixels


def make_junk(pixels: Array, labels: NDArray[np.int64], count: int, random: np.random.Generator) -> Array:
    """Pictures ``(about 4.25 count, 64)`` with the pixels of digits that are none."""
    some = pixels[random.integers(0, len(pixels), count)]
    pairs = random.integers(0, len(pixels), (4 * count, 2))
    first, second = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]][:count].T
    left = np.tile(np.arange(8) < 4, 8)
    parts: Sequence[Array] = (
        random.permuted(some, axis=1),
        random.permuted(some, axis=0),
        (pixels[first] + pixels[second]) / 2,
        np.where(left, pixels[first], pixels[second]),
        random.random((count // 4, 64)),
    )
    return np.concatenate(parts)
