"""Images and their classes as two tensors: scikit-learn's digits, or a folder of files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_fastmoe.errors import DataError, MissingPackageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})


class Images(NamedTuple):
    """Images in memory.

    Attributes:
        pixels: fp32, (N, C, side, side), between -1 and 1.
        classes: int64, (N,).
        names: what the classes are called.
    """

    pixels: Tensor
    classes: Tensor
    names: list[str]


def load_digits() -> Images:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, in grey.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "The digits come with scikit-learn, which is not installed: pip install"
            " 'lightning-fastmoe[vision]'. Or give a folder of images, with a subfolder per class."
        ) from error
    digits = datasets.load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # of 0 to 16
    classes = torch.from_numpy(digits.target).long()
    return Images(pixels, classes, [str(name) for name in digits.target_names])


def load_folder(path: str | Path, side: int) -> Images:
    """The images of a folder with a subfolder per class, in RGB and scaled to squares.

    Args:
        path: the folder; a class is called as its subfolder, and they are in order of name.
        side: pixels along the side of the squares. All of them are kept in memory.

    Raises:
        MissingPackageError: if Pillow is not installed.
        DataError: if there are fewer than two classes, one has no images, or a file can't be read.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "Reading image files needs Pillow: pip install 'lightning-fastmoe[vision]'"
        ) from error
    root = Path(path).expanduser()
    folders = sorted(f for f in root.glob("*") if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        raise DataError(
            f"data.path {str(path)!r} has {len(folders)} subfolders. It must be a folder with a"
            " subfolder of images for each class, two or more."
        )
    pixels: list[Tensor] = []
    classes: list[int] = []
    for number, folder in enumerate(folders):
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(
                f"The class {str(folder)!r} has no images ({', '.join(sorted(SUFFIXES))}). Add"
                " some, or remove the folder."
            )
        for file in files:
            try:
                with Image.open(file) as image:
                    values = np.array(image.convert("RGB").resize((side, side)))
            except (EOFError, OSError, SyntaxError, ValueError) as error:
                raise DataError(f"{str(file)!r} can't be read: {error}. Remove it.") from error
            pixels.append(torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1)
            classes.append(number)
    return Images(torch.stack(pixels), torch.tensor(classes), [folder.name for folder in folders])
