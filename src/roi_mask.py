"""The choice of a photograph's field of view: a given ROI mask, one beside the photograph, or the photograph itself."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .dataset_files import LATER_ROI_ENDINGS, ROI_ENDINGS, comparable
from .field_of_view import field_of_view_diameter, find_field_of_view
from .masks import read_binary_mask
from .photograph import PhotographError, images_in


def require_roi_mask(choice: str | None, photographs: Iterable[Path]) -> None:
    """Check that the file or folder of --roi-mask is there, and that no mask of a folder is that of two photographs.

    Raises:
        PhotographError: it is not there, or one is.
    """
    if choice in (None, "auto", "none"):
        return
    if not os.path.exists(choice):
        raise PhotographError(f"--roi-mask {choice}: no such file or folder; give one, or auto, or none")
    if os.path.isdir(choice):
        by_stem: dict[str, Path] = {}
        for path in photographs:
            other = by_stem.setdefault(comparable(path.stem), path)
            if other is not path:
                raise PhotographError(
                    f"--roi-mask {choice}: {other} and {path} would have one mask, as their stems are the same; "
                    "segment them by two commands, with an --output each"
                )


def choose_field_of_view(path: Path, photograph: np.ndarray, choice: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Where vessels count in a photograph, by the flag --roi-mask, and where its retina is: bool [H, W] both."""
    mask_path = roi_mask_path(path, choice)
    if mask_path is None:
        found = find_field_of_view(photograph)
        # Without a mask every pixel counts, but the scale and the colours still follow from the retina.
        return np.ones_like(found) if choice == "none" else found, found
    field_of_view = read_binary_mask(mask_path)
    (height, width), (mask_height, mask_width) = photograph.shape[:2], field_of_view.shape
    if (height, width) != (mask_height, mask_width):
        raise PhotographError(
            f"--roi-mask {mask_path}: is {mask_width} x {mask_height} pixels, but its photograph {path} is "
            f"{width} x {height}; they must match (--roi-mask auto does without)"
        )
    if not field_of_view.any():
        raise PhotographError(f"--roi-mask {mask_path}: is black everywhere; the field of view must be white")
    return field_of_view, whole_retina(field_of_view, photograph)


def whole_retina(mask: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    """What the scale and the colours of a photograph, uint8 [H, W, 3], with an ROI mask follow from: bool [H, W].

    It is the mask, bool [H, W]. One that is small in its frame may cover a part of the retina only; then it is what is
    found in the photograph, with the mask.
    """
    return find_field_of_view(photograph) | mask if is_partial(mask) else mask


def is_partial(mask: np.ndarray) -> bool:
    """Whether an ROI mask, bool [H, W], may cover a part of the retina only."""
    return field_of_view_diameter(mask) < 0.8 * min(mask.shape)


def roi_mask_path(path: Path, choice: str | None) -> Path | None:
    """The file of a photograph's ROI mask; None where its field of view is to be found in itself."""
    if choice in ("auto", "none"):
        return None
    if choice is None:
        beside = Path(os.path.abspath(path)).parent.parent / "mask" / f"{path.stem}_mask.gif"  # as in DRIVE
        return beside if os.path.isfile(beside) else None
    if not os.path.isdir(choice):
        return Path(choice)
    files, matches = images_in(Path(choice)), []
    for endings in (ROI_ENDINGS, LATER_ROI_ENDINGS):
        known = {comparable(path.stem + ending) for ending in endings}
        matches = matches or [file for file in files if comparable(file.stem) in known]
    if len(matches) != 1:
        found = "both " + " and ".join(map(str, matches[:2])) if matches else "no such file"
        raise PhotographError(
            f"--roi-mask {choice}: needs one {path.stem}.* or {path.stem}_mask.* for {path}, has {found}"
        )
    return matches[0]
