"""What `dcgan.py` is given: numbers on its command line, and images; what it cannot use ends it with a line, exit code 2."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def refuse(message: str) -> NoReturn:
    """Say in one line why a run cannot begin."""
    print(f"dcgan.py: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Without the usage before its errors, which is many times as long as they are."""

    def error(self, message: str) -> NoReturn:
        """The message, and exit code 2."""
        refuse(message)


def number(kind: type, expected: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse: an int or a float that fits; nan never does."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return convert


def at_least(low: int) -> Callable[[str], Any]:
    """A type for argparse: whole numbers from ``low`` on."""
    return number(int, f"a whole number from {low} on", lambda value: value >= low)


def load_digits(size: int) -> tuple[Tensor, np.ndarray]:
    """scikit-learn's 1797 digits, 8x8 or enlarged, ``(N, 1, size, size)`` in [-1, 1], and their labels."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images / 8.0 - 1.0, dtype=torch.float32)[:, None]
    if size > 8:
        images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images, digits.target


def load_image(path: Path, size: int, gray: bool) -> Tensor:
    """The middle square of one image, resized, uint8 ``(3 or 1, size, size)``."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode[0] in "IF":  # 16 bits and more, which convert() would clip to 8
        pixels = np.asarray(picture)
        if picture.mode == "F" or pixels.max() > 65535:
            raise ValueError("pixels of unknown range")
        picture = Image.fromarray((pixels / 257).round().clip(0, 255).astype(np.uint8))
    picture = ImageOps.fit(picture.convert("L" if gray else "RGB"), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if gray else pixels.permute(2, 0, 1)


def load_folder(folder: Path, size: int, gray: bool) -> Tensor:
    """All images below a folder, uint8 ``(N, 3 or 1, size, size)``; broken ones are left out, and counted."""
    readable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    images, broken = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            images.append(load_image(path, size, gray))
        except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
            if not isinstance(error, UnidentifiedImageError) or path.suffix.lower() in readable:
                broken.append(f"{path.relative_to(folder)}: {type(error).__name__}")
    if broken:
        print(f"{folder}: {len(broken)} broken images left out, first {broken[0]}")
    if not images:
        refuse(f"{folder}: no images found")
    return torch.stack(images)


def fingerprint(images: Tensor) -> str:
    """Tells a folder's images from others, also from the same in another order; digits are always the same ones."""
    count = f"{len(images)} images"
    if images.is_floating_point():
        return count
    return f"{count}, SHA-256 {hashlib.sha256(images.contiguous().numpy()).hexdigest()[:16]}"
