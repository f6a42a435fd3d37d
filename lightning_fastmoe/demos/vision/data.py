"""The LightningDataModule of images in memory."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_fastmoe.demos.loaders import evaluation_loader, training_loader, world_size
from lightning_fastmoe.demos.vision.images import load_digits, load_folder
from lightning_fastmoe.errors import DataError


class ImageData(LightningDataModule):
    """Images in memory: scikit-learn's digits by default.

    Each epoch has all training images once, in another order. A resumed run continues within an
    epoch.

    Args:
        path: A folder with a subfolder of images per class. Leave it out to use the digits.
        image_size: Pixels that each side of the folder's images is scaled to.
        batch_size: Images per step and process.
        val_fraction: The fraction of images to validate on, between 0 and 1.
        seed: Which images are validated on, and the order of the others.

    Raises:
        DataError: if a size is out of range, the folder's images can't be used, or there are too
            few for a step.
        MissingPackageError: if scikit-learn, or for a folder Pillow, is not installed.
    """

    def __init__(
        self,
        path: str | None = None,
        image_size: int = 32,
        batch_size: int = 32,
        val_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"image_size": image_size, "batch_size": batch_size}.items():
            if value < 1:
                raise DataError(f"data.{name} is {value}; it must be 1 or more.")
        if not 0 < val_fraction < 1:
            raise DataError(f"data.val_fraction is {val_fraction}; it must be between 0 and 1.")
        self.batch_size, self.seed = batch_size, seed
        # Read here, not in setup(), because the model's sizes depend on it.
        images = load_digits() if path is None else load_folder(path, image_size)
        self.class_names = images.names
        order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(seed))
        held_out = min(max(1, round(val_fraction * len(order))), len(order) - 1)
        self.val, self.train = (
            TensorDataset(images.pixels[part], images.classes[part])
            for part in (order[:held_out], order[held_out:])
        )

    @property
    def image_size(self) -> int:
        """Pixels along an image's side."""
        return int(self.train.tensors[0].shape[-1])

    @property
    def channels(self) -> int:
        """Colours of a pixel."""
        return int(self.train.tensors[0].shape[1])

    @override
    def setup(self, stage: str | None = None) -> None:
        needed = self.batch_size * world_size(self)
        if stage in ("fit", None) and len(self.train) < needed:
            raise DataError(
                f"There are {len(self.train)} training images; a step of batch_size"
                f" {self.batch_size} on {world_size(self)} process(es) needs {needed}. Add images,"
                " or lower data.batch_size."
            )

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return training_loader(self, self.train, self.batch_size, seed=self.seed, num_workers=0)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return evaluation_loader(self.val, self.batch_size, num_workers=0)
