"""DRIVE on disk -> (image, label) pairs.

Source: J. Staal et al., "Ridge-based vessel segmentation in color images of the retina", IEEE TMI 23(4), 2004.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from src.errors import DatasetError
from src.field_of_view import field_of_view_diameter
from src.masks import open_image, read_binary_mask

# Channel mean and standard deviation inside the field of view, over DRIVE's 20 training photographs, in [0, 1].
DRIVE_MEAN = (0.709, 0.381, 0.224)
DRIVE_STD = (0.127, 0.079, 0.043)
DRIVE_FOV_DIAMETER = 540.0  # pixels across the field of view, from 536 to 541

BACKGROUND, VESSEL, OUTSIDE = 0, 1, 255  # the values of a label; OUTSIDE the field of view nothing is learned or scored


def find_drive(root: str | Path) -> Path:
    """The DRIVE folder that `root` contains, or `root` itself where it is the DRIVE folder.

    Raises:
        DatasetError: neither `root/DRIVE/training/images` nor `root/training/images` exists.
    """
    root = Path(root)
    for folder in (root / "DRIVE", root):
        if (folder / "training" / "images").is_dir():
            return folder
    if not root.is_dir():
        found = "there is no such folder"
    else:
        names = sorted(entry.name for entry in root.iterdir())
        found = "found there: " + (", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing")
    raise DatasetError(
        f"--data-path {root}: no DRIVE data set; looked for {root / 'DRIVE' / 'training' / 'images'} and "
        f"{root / 'training' / 'images'}; {found}. Give the folder that contains DRIVE"
    )


def find_photographs(root: str | Path, part: str) -> list[Path]:
    """The photographs of a part, "training" or "test", of a data set, sorted by name.

    Raises:
        DatasetError: as `find_drive`; or there are none.
    """
    folder = find_drive(root) / part / "images"
    # The order of a directory differs between machines, and archives made on a Mac hold "._name" companions.
    photographs = sorted(folder.glob("[!.]*.tif"))
    if not photographs:
        raise DatasetError(f"{folder}: no photographs (*.tif) there; unpack the DRIVE archive again")
    return photographs


def has_test_labels(root: str | Path) -> bool:
    """Whether `test/1st_manual` holds labels; the official download has come without them for years."""
    return any((find_drive(root) / "test" / "1st_manual").glob("[!.]*.gif"))


class DriveDataset(Dataset):
    """DRIVE's photographs with their first observer's labels.

    Everything is read and checked once, here; the decoded photographs stay in memory (1.3 MB each).

    Args:
        root: the folder that contains `DRIVE`, or the DRIVE folder itself.
        train: the training photographs; else those to validate on.
        transforms: called as `transforms(image, label)` on each item.
        val_split: hold the last `val_split` training photographs (sorted by name) out; `train=False` then gives
            these instead of the test photographs.
        prepare: makes of a photograph, uint8 [H, W, 3], and its field of view, bool [H, W], what is to be kept of it.

    Items:
        `(image, label)`: an RGB PIL image, and an 8-bit PIL image with 0 = background, 1 = vessel, 255 = outside the
        field of view; or what `transforms` makes of them.

    Raises:
        DatasetError: files are missing, cannot be read, or hold what no label may hold.
    """

    def __init__(
        self,
        root: str | Path,
        train: bool,
        transforms: Callable | None = None,
        *,
        val_split: int = 0,
        prepare: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.flag = "training" if train or val_split else "test"
        self.held_out = bool(val_split) and not train
        self.transforms = transforms
        self.on_device: list[tuple[tv_tensors.Image, tv_tensors.Mask]] = []  # in place of PIL images, see `to`
        folder = find_drive(root) / self.flag
        self.img_list = _split(find_photographs(root, self.flag), train, val_split)
        keys = [path.name.split("_")[0] for path in self.img_list]
        self.manual = [folder / "1st_manual" / f"{key}_manual1.gif" for key in keys]
        self.roi_mask = [folder / "mask" / f"{key}_{self.flag}_mask.gif" for key in keys]
        self._check_companions()
        self.images = [open_image(path, "RGB") for path in self.img_list]  # uint8 [H, W, 3] each
        self.labels = [
            _read_label(*paths, image.shape[:2])
            for *paths, image in zip(self.manual, self.roi_mask, self.img_list, self.images, strict=True)
        ]  # uint8 [H, W] each
        if prepare is not None:
            photographs = zip(self.images, self.labels, strict=True)
            self.images = [prepare(image, label != OUTSIDE) for image, label in photographs]

    def to(self, device: torch.device) -> "DriveDataset":
        """These photographs in a device's memory: `transforms` gets `tv_tensors` there, not PIL images."""
        moved = copy.copy(self)
        moved.on_device = [
            (
                tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous().to(device)),
                tv_tensors.Mask(torch.from_numpy(label).to(device)),
            )
            for image, label in zip(self.images, self.labels, strict=True)
        ]
        return moved

    @property
    def nbytes(self) -> int:
        """What all photographs and labels take in memory."""
        return sum(array.nbytes for array in (*self.images, *self.labels))

    def fov_diameter(self) -> float:
        """Median diameter of the photographs' fields of view, pixels."""
        return statistics.median(field_of_view_diameter(label != OUTSIDE) for label in self.labels)

    def describe(self) -> str:
        """Which photographs these are: "test", "training", or with their names "held-out training (35, 36)"."""
        if self.held_out:
            return f"held-out training ({', '.join(path.name.split('_')[0] for path in self.img_list)})"
        return self.flag

    def _check_companions(self) -> None:
        for image, *companions in zip(self.img_list, self.manual, self.roi_mask, strict=True):
            for companion in companions:
                if not companion.is_file():
                    raise DatasetError(
                        f"{image}: its {'label' if companion in self.manual else 'field-of-view mask'} {companion} "
                        "is missing; add that file, or take the photograph out of the folder"
                    )

    def __getitem__(self, idx: int) -> tuple[Any, Any]:
        if self.on_device:
            image, label = self.on_device[idx]
        else:
            image, label = Image.fromarray(self.images[idx]), Image.fromarray(self.labels[idx])
        if self.transforms is not None:
            image, label = self.transforms(image, label)
        return image, label

    def __len__(self) -> int:
        return len(self.img_list)

    @staticmethod
    def collate_fn(batch: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Join items of unequal sizes: images [N, C, H, W] padded with 0, labels [N, H, W] padded with 255."""
        images, labels = zip(*batch, strict=True)
        return cat_list(images, fill_value=0), cat_list(labels, fill_value=OUTSIDE)


def cat_list(images: Sequence[Tensor], fill_value: int = 0) -> Tensor:
    """Stack tensors [..., H, W] of unequal sizes, padded at the right and bottom with `fill_value`."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    batch = images[0].new_full((len(images), *images[0].shape[:-2], height, width), fill_value)
    for image, place in zip(images, batch, strict=True):
        place[..., : image.shape[-2], : image.shape[-1]].copy_(image)
    return batch


def _split(photographs: list[Path], train: bool, val_split: int) -> list[Path]:
    if not val_split:
        return photographs
    if not 0 < val_split < len(photographs):
        raise DatasetError(
            f"--val-split {val_split}: {len(photographs)} training photographs in {photographs[0].parent} leave room "
            f"for 1 to {len(photographs) - 1}"
        )
    return photographs[:-val_split] if train else photographs[-val_split:]


def _read_label(manual_path: Path, roi_path: Path, image_path: Path, size: tuple[int, int]) -> np.ndarray:
    vessels, field_of_view = read_binary_mask(manual_path), read_binary_mask(roi_path)
    for path, mask in ((manual_path, vessels), (roi_path, field_of_view)):
        if mask.shape != size:
            raise DatasetError(
                f"{path}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its photograph {image_path} is "
                f"{size[1]} x {size[0]}; they must match"
            )
    if not field_of_view.any():
        raise DatasetError(f"{roi_path}: is black everywhere; the field of view must be white")
    return np.where(field_of_view, vessels, OUTSIDE).astype(np.uint8)
