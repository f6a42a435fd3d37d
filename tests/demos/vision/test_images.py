"""Images in memory: the digits, folders, splits, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sklearn import datasets

from lightning_fastmoe.demos.vision import ImageData
from lightning_fastmoe.demos.vision.images import load_digits, load_folder
from lightning_fastmoe.errors import DataError, MissingPackageError

COLOURS = {"green": (0, 255, 0), "red": (255, 0, 51)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for i in range(6):
            suffix = ("png", "PNG", "bmp")[i % 3]
            Image.new("RGB", (5 + i, 7), colour).save(tmp_path / name / f"{i}.{suffix}")
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_digits() -> None:
    images = load_digits()
    assert images.pixels.shape == (1797, 1, 8, 8)
    assert (images.pixels.dtype, images.classes.dtype) == (torch.float32, torch.int64)
    assert (float(images.pixels.min()), float(images.pixels.max())) == (-1.0, 1.0)
    assert images.names == [str(i) for i in range(10)]
    stored = datasets.load_digits()
    assert torch.equal((images.pixels[7, 0] + 1) * 8, torch.from_numpy(stored.images[7]).float())
    assert images.classes.tolist() == stored.target.tolist()


def test_a_folder_has_a_class_per_subfolder(folder: Path) -> None:
    images = load_folder(folder, 4)
    assert images.pixels.shape == (12, 3, 4, 4)
    assert images.names == ["green", "red"]
    assert images.classes.tolist() == 6 * [0] + 6 * [1]
    for pixels, colour in ((images.pixels[0], (-1, 1, -1)), (images.pixels[11], (1, -1, -0.6))):
        expected = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(3, 4, 4)
        torch.testing.assert_close(pixels, expected)


def test_images_are_trained_on_or_validated_on() -> None:
    data = ImageData(val_fraction=0.25, seed=1)
    assert (data.image_size, data.channels, len(data.class_names)) == (8, 1, 10)
    parts = [{(*p.flatten().tolist(), int(c)) for p, c in part} for part in (data.train, data.val)]
    assert [len(part) for part in parts] == [1348, 449]  # all digits differ
    assert parts[0].isdisjoint(parts[1])
    same, other = ImageData(val_fraction=0.25, seed=1), ImageData(val_fraction=0.25, seed=2)
    assert torch.equal(same.val.tensors[1], data.val.tensors[1])
    assert not torch.equal(other.val.tensors[1], data.val.tensors[1])


def test_ranks_share_an_epoch() -> None:
    data = ImageData(batch_size=32)
    seen = []
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        seen += [image for images, _ in data.train_dataloader() for image in images.unbind()]
    assert len(seen) == 1438 // 64 * 64
    assert len({tuple(image.flatten().tolist()) for image in seen}) == len(seen)


def test_an_interrupted_epoch_goes_on_where_it_was() -> None:
    data = ImageData(batch_size=100)
    whole = [classes for _, classes in data.train_dataloader()]
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())  # type: ignore[attr-defined]
    rest = [classes for _, classes in resumed]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sklearn", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lightning-fastmoe\[vision\]'"):
        load_digits()
    with pytest.raises(MissingPackageError, match="Pillow.*fastmoe\\[vision\\]"):
        load_folder(tmp_path, 4)


def test_folders_that_cannot_be_used_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="nowhere' has 0 subfolders"):
        ImageData(str(folder / "nowhere"))
    with pytest.raises(DataError, match="red' has 0 subfolders"):
        ImageData(str(folder / "red"))
    (folder / "blue").mkdir()
    with pytest.raises(DataError, match="blue' has no images"):
        ImageData(str(folder))
    whole = (folder / "red" / "0.png").read_bytes()
    for broken in (b"", b"\x89PNG\r\n", whole[:45], whole[:20] + b"?" + whole[21:]):
        (folder / "blue" / "broken.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"broken.png' can't be read: .+ Remove it"):
            ImageData(str(folder))


def test_sizes_that_cannot_be_used_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="data.batch_size is 0"):
        ImageData(batch_size=0)
    with pytest.raises(DataError, match="data.val_fraction is 1"):
        ImageData(val_fraction=1)
    data = ImageData(str(folder), batch_size=11)
    with pytest.raises(DataError, match=r"10 training images; a step of batch_size 11 .* needs 11"):
        data.setup("fit")
