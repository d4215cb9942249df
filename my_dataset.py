"""Labelled photographs on disk -> (image, label) pairs: DRIVE, and other data sets in its layout or a plainer one.

Source of DRIVE: J. Staal et al., "Ridge-based vessel segmentation in color images of the retina", IEEE TMI 23(4), 2004.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from src.colours import DRIVE_MEAN as DRIVE_MEAN  # also found here
from src.colours import DRIVE_STD as DRIVE_STD
from src.dataset_files import LabelledPhotograph, Split, root_names
from src.errors import DatasetError
from src.field_of_view import DRIVE_FOV_DIAMETER as DRIVE_FOV_DIAMETER
from src.field_of_view import field_of_view_diameter, find_field_of_view, is_rectangle
from src.masks import looks_like_mask, read_binary_mask, read_classes
from src.photograph import is_turned, read_photograph
from src.roi_mask import is_partial, whole_retina
from src.segment import match_scale, prepare_at_scale

BACKGROUND, OUTSIDE = 0, 255  # of the values of a label; OUTSIDE the field of view nothing is learned or scored


# A photograph, its label, and their size in multiples of the size at the working diameter.
Detail = tuple[float, np.ndarray | tv_tensors.Image, np.ndarray | tv_tensors.Mask]


class DriveDataset(Dataset):
    """Photographs with their first observer's labels: DRIVE's, or those of any data set that `src.dataset_files` reads.

    Everything is read and checked once, here; the decoded photographs stay in memory (1.3 MB each of DRIVE's).

    Args:
        root: the folder that contains `DRIVE`, the DRIVE folder itself, or one with `images` and `labels`; or several.
        train: the training photographs; else those to validate on.
        transforms: called as `transforms(image, label)` on each item.
        val_split, fold, train_on_all: which photographs are held out, see `src.dataset_files.Split`; `train=False`
            gives these, or the test photographs where there are none.
        num_classes: classes of the labels, without the background.
        fov_diameter: pixels across the field of view that each photograph is brought to; None: none is resized.
        scale_of: of a photograph, uint8 [H, W, 3], and its field of view, bool [H, W], what it is resized by, in place
            of what `fov_diameter` asks for; None for training. A model sees other photographs at other scales, see
            `src.Segmenter.working_scale`.
        zoom: multiple of that size that the photographs are kept in.
        detail: multiple of that size that each photograph is kept in besides, for `transforms.of_two_sizes`; none is
            enlarged for it. None: there is one size.
        prepare: makes of a photograph, uint8 [H, W, 3], and its field of view, bool [H, W], what is to be kept of it.

    Items:
        `(image, label)`: an RGB PIL image, and an 8-bit PIL image with 0 = background, 1 = vessel, 255 = outside the
        field of view; or what `transforms` makes of them. A `fov_diameter` resizes the image, and the label too for
        training.

    Raises:
        DatasetError: files are missing, cannot be read, or hold what no label may hold.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str | Path],
        train: bool,
        transforms: Callable | None = None,
        *,
        val_split: int | None = 0,
        fold: tuple[int, int] | None = None,
        train_on_all: bool = False,
        **reading: Any,
    ) -> None:
        training, validated = Split(val_split, fold, train_on_all).divide(root, test_needed=not train)
        self._read(training if train else validated, transforms, train, **reading)

    @classmethod
    def of(
        cls,
        files: Sequence[LabelledPhotograph],
        transforms: Callable | None = None,
        train: bool = False,
        **reading: Any,
    ) -> "DriveDataset":
        """These photographs, to train on or to validate on and to score; `reading` as above."""
        dataset = cls.__new__(cls)
        dataset._read(files, transforms, train, **reading)
        return dataset

    def _read(
        self,
        files: Sequence[LabelledPhotograph],
        transforms: Callable | None,
        train: bool,
        *,
        num_classes: int = 1,
        fov_diameter: float | None = None,
        scale_of: Callable[[np.ndarray, np.ndarray], float] | None = None,
        zoom: float = 1.0,
        detail: float | None = None,
        prepare: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.files = list(files)
        self.transforms = transforms
        self.on_device: list[tuple[tv_tensors.Image, tv_tensors.Mask]] = []  # in place of PIL images, see `to`
        self.images: list[np.ndarray] = []  # uint8 [h, w, 3] each
        self.labels: list[np.ndarray] = []  # uint8 [H, W] each; for training of the image's size
        self.details: list[Detail] = []  # of each photograph, or none
        self.without_border: list[bool] = []  # whether the photographs' fields of view have no round border
        self.scales: list[float] = []  # that bring the photographs to the size to work at
        self.shares_outside: list[float] = []  # of each label's vessels, what lies outside an ROI mask of the whole
        # For scores, not for training:
        self.classes: list[np.ndarray] = []  # uint8 [H, W] each: labels without OUTSIDE
        self.second_observers: list[np.ndarray | None] = []  # vessels, bool [H, W] each
        self.faults: list[str] = []  # of files of second observers, which are left out
        for item in self.files:
            photograph, classes, field_of_view = _read_item(item, num_classes)
            retina = field_of_view if item.roi_mask is None else whole_retina(field_of_view, photograph)
            label = np.where(field_of_view, classes, OUTSIDE).astype(np.uint8)
            vessels = (classes != BACKGROUND) & (classes != OUTSIDE)
            outside = 0 if is_partial(field_of_view) else np.count_nonzero(vessels & ~field_of_view)
            self.shares_outside.append(outside / max(np.count_nonzero(vessels), 1))
            if scale_of is not None:
                scale = scale_of(photograph, retina)
            else:
                scale = match_scale(field_of_view_diameter(retina), fov_diameter) if fov_diameter else 1.0
            if detail is not None:
                of_detail = min(scale * detail, 1.0)
                image = prepare_at_scale(photograph, retina, of_detail, prepare)
                resized = label if of_detail == 1 else _resize_label(label, image.shape[:2])
                self.details.append((of_detail / scale, image, resized))
            photograph = prepare_at_scale(photograph, retina, scale * zoom, prepare)
            if scale * zoom != 1 and train:
                label = _resize_label(label, photograph.shape[:2])
            self.without_border.append(is_rectangle(retina))
            self.scales.append(scale)
            self.images.append(photograph)
            self.labels.append(label)
            if not train:
                self.classes.append(classes)
                self.second_observers.append(self._second_observer(item, classes.shape))

    def _second_observer(self, item: LabelledPhotograph, size: tuple[int, int]) -> np.ndarray | None:
        if item.fault is not None:
            self.faults.append(item.fault)
        if item.fault is not None or item.second_observer is None:
            return None
        try:
            vessels = read_binary_mask(item.second_observer)
            require_size(item.second_observer, vessels, item.photograph, size)
        except DatasetError as error:
            self.faults.append(str(error))
            return None
        return vessels

    @property
    def img_list(self) -> list[Path]:
        """The photographs' files."""
        return [item.photograph for item in self.files]

    @property
    def manual(self) -> list[Path]:
        """The files of their labels."""
        return [item.label for item in self.files]

    @property
    def roi_mask(self) -> list[Path | None]:
        """The files of their ROI masks, where they have one."""
        return [item.roi_mask for item in self.files]

    def to(self, device: torch.device) -> "DriveDataset":
        """These photographs in a device's memory: `transforms` gets `tv_tensors` there, not PIL images."""

        def move(image: np.ndarray, label: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
            return (
                tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous().to(device)),
                tv_tensors.Mask(torch.from_numpy(label).to(device)),
            )

        moved = copy.copy(self)
        moved.on_device = [move(*pair) for pair in zip(self.images, self.labels, strict=True)]
        moved.details = [(size, *move(*pair)) for size, *pair in self.details]
        return moved

    def by_root(self) -> dict[str, "DriveDataset"]:
        """The photographs of each data set by its name, in the same memory."""
        names = root_names(self.files)
        if len(names) == 1:
            return {next(iter(names.values())): self}
        return {name: self._of_root(root) for root, name in names.items()}

    def _of_root(self, root: Path) -> "DriveDataset":
        indices = [index for index, item in enumerate(self.files) if item.root == root]
        subset = copy.copy(self)
        of_each = ("files", "images", "labels", "details", "without_border", "scales", "shares_outside")
        for name in (*of_each, "classes", "second_observers", "on_device"):
            values = getattr(self, name)
            setattr(subset, name, [values[index] for index in indices] if values else values)
        return subset

    def median_scale(self) -> float:
        """What the photographs were resized by: the median, or of several data sets the middle one of their medians."""
        return statistics.median_low(statistics.median(data.scales) for data in self.by_root().values())

    def are_close_ups(self) -> bool:
        """Whether most of the photographs show no border of the field of view."""
        return sum(self.without_border) > len(self) / 2

    def what_a_model_knows(self) -> dict[str, float | bool]:
        """What a model that is trained on these photographs must know of their size, by its checkpoint's keys."""
        return {"trained_scale": self.median_scale(), "close_ups": self.are_close_ups()}

    def vessel_shares(self) -> list[float]:
        """The share of each photograph's field of view that is vessel of any class; 0 of an empty one."""
        inside = [label[label != OUTSIDE] for label in self.labels]
        return [np.count_nonzero(classes != BACKGROUND) / max(classes.size, 1) for classes in inside]

    def missing_class(self, num_classes: int) -> str | None:
        """In words, the first class that occurs in no label, or of vessels alone in none of a data set; None: none."""
        for data in self.by_root().values() if num_classes == 1 else [self]:
            found = {int(value) for label in data.labels for value in np.unique(label)}
            missing = sorted(set(range(num_classes + 1)) - found)
            if missing and data.files:
                names = [item.photograph.name for item in data.files]
                return (
                    f"class {missing[0]} occurs in no label of {data.files[0].label.parent} ({len(names)} "
                    f"photograph{'s' if len(names) > 1 else ''}, {names[0]} to {names[-1]})"
                )
        return None

    def __getitem__(self, idx: int) -> tuple[Any, Any]:
        if self.on_device:
            image, label = self.on_device[idx]
        else:
            image, label = Image.fromarray(self.images[idx]), Image.fromarray(self.labels[idx])
        if self.transforms is None:
            return image, label
        if not self.details:
            return self.transforms(image, label)
        size, *detail = self.details[idx]
        if not self.on_device:
            detail = map(Image.fromarray, detail)
        return self.transforms.of_two_sizes((1.0, image, label), (size, *detail))

    def __len__(self) -> int:
        return len(self.files)

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


def working_diameter(files: Iterable[LabelledPhotograph]) -> float:
    """The default of the working diameter, pixels: the median diameter of the photographs' fields of view.

    Of several data sets each counts alike, however large: it is the middle one of their medians, or the lower one of
    the two in the middle.

    Raises:
        DatasetError: a file cannot be read.
    """
    by_root: dict[Path, list[float]] = {}
    for item in files:
        field_of_view = read_field_of_view(item)
        if item.roi_mask is not None and is_partial(field_of_view):
            photograph = read_photograph(item.photograph)
            require_size(item.roi_mask, field_of_view, item.photograph, photograph.shape[:2])
            field_of_view = whole_retina(field_of_view, photograph)
        by_root.setdefault(item.root, []).append(field_of_view_diameter(field_of_view))
    return float(statistics.median_low(statistics.median(diameters) for diameters in by_root.values()))


def read_field_of_view(item: LabelledPhotograph, photograph: np.ndarray | None = None) -> np.ndarray:
    """The field of view of a photograph, bool [H, W]: its ROI mask, or what is found in the photograph.

    Raises:
        DatasetError: a file cannot be read, or the mask is black everywhere or of another size than the photograph.
    """
    if item.roi_mask is None:
        return find_field_of_view(read_photograph(item.photograph) if photograph is None else photograph)
    field_of_view = read_binary_mask(item.roi_mask)
    if photograph is not None:
        require_size(item.roi_mask, field_of_view, item.photograph, photograph.shape[:2])
    if not field_of_view.any():
        raise DatasetError(f"{item.roi_mask}: is black everywhere; the field of view must be white")
    return field_of_view


def _read_item(item: LabelledPhotograph, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photograph, uint8 [H, W, 3], its classes, uint8 [H, W], and its field of view, bool [H, W]."""
    photograph = read_photograph(item.photograph)
    if looks_like_mask(photograph):
        raise DatasetError(
            f"{item.photograph}: is black and white, as a label or a mask is; take it out of {item.photograph.parent} "
            "(if it is a photograph, cut white text and borders off)"
        )
    classes, field_of_view = read_classes(item.label, num_classes), read_field_of_view(item, photograph)
    require_size(item.label, classes, item.photograph, photograph.shape[:2])
    return photograph, classes, field_of_view


def require_size(path: Path | None, array: np.ndarray, photograph: Path, size: tuple[int, int]) -> None:
    """Raise unless what `path` holds, [H, W], has the size (H, W) of its photograph.

    Raises:
        DatasetError: it has another.
    """
    if array.shape != size:
        turned = " (turned by its EXIF orientation)" if is_turned(photograph) else ""
        raise DatasetError(
            f"{path}: is {array.shape[1]} x {array.shape[0]} pixels, but its photograph {photograph} is "
            f"{size[1]} x {size[0]}{turned}; they must match"
        )


def _resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label, uint8 [H, W], brought to another size (h, w): of each pixel the class that covers most of it.

    Measured on every fifth label of HRF, brought to a field of view of 540 and 1024 px and back: Dice 0.852 and 0.926,
    with the nearest pixel's class 0.847 and 0.924. Tried and left out: the vessel's share of each pixel itself, as a
    soft label. By 500 steps of the quick recipe on four fifths of DRIVE and HRF at 720 px (one seed), HRF's fold gained
    0.0027 of Dice (standard error 0.0010) and lost 0.0077 of clDice (0.0011).
    """
    height, width = size
    resampling = Image.Resampling.BOX if height < label.shape[0] else Image.Resampling.BILINEAR
    values = np.unique(label)
    shares = [
        np.array(Image.fromarray((label == value).astype(np.float32)).resize((width, height), resampling))
        for value in values
    ]
    return values[np.argmax(shares, axis=0)]
