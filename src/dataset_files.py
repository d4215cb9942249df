"""The files of a labelled data set: each photograph with its label, its ROI mask and its second observer's label."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import DatasetError
from .photograph import images_in, require_file

LABEL_FOLDERS = ("1st_manual", "labels", "masks_manual", "manual1")
LABEL_ENDINGS = ("", "_manual1", "_mask", "_label", "_vessel", "_vessels", "_1stHO", "_gt")
LATER_LABEL_ENDINGS = ("_manual_orig", ".ah")  # of DR HAGIS and STARE; where there is none of the others
ROI_FOLDERS = ("mask", "masks")
ROI_ENDINGS, LATER_ROI_ENDINGS = ("_mask", ""), ("_mask_orig",)
SECOND_FOLDERS = ("2nd_manual",)
SECOND_ENDINGS, LATER_SECOND_ENDINGS = ("_manual2", "_2ndHO", ""), (".vk",)
HELD_OUT_SHARE = 5  # without a test part, one of so many photographs is held out
FIRST_FEW = 3  # faults that a message lists
# At the end of a name: 01L, 7_left, A-OD, or in DRIVE's layout 01L_training.
EYE = re.compile(r"(?<=[\d_. -])(l|r|left|right|od|os)$", re.IGNORECASE)
PART = re.compile(r"_(training|test)$", re.IGNORECASE)


@dataclass(frozen=True)
class LabelledPhotograph:
    """The files of one photograph; what a data set does not have is None."""

    photograph: Path
    label: Path
    roi_mask: Path | None
    second_observer: Path | None
    part: str  # "training", "test", or "all" of a data set that is not parted
    root: Path  # the folder of the data set
    fault: str | None = None  # of the second observer's file, which is left out

    @property
    def number(self) -> str:
        """The part of the name before the first underscore, by which DRIVE pairs its files."""
        return self.photograph.stem.split("_")[0]

    @property
    def files(self) -> list[Path]:
        """All that there are."""
        return [file for file in (self.photograph, self.label, self.roi_mask, self.second_observer) if file is not None]

    @property
    def digest(self) -> str:
        """What tells the photograph from any other, wherever it lies: the start of the SHA-256 of its file.

        Raises:
            DatasetError: the file cannot be read.
        """
        return _digest_of_file(self.photograph)

    @property
    def label_digest(self) -> str:
        """The same of its label and, where it has one, its ROI mask.

        Raises:
            DatasetError: a file cannot be read.
        """
        return "".join(_digest_of_file(file) for file in (self.label, self.roi_mask) if file is not None)


def _digest_of_file(path: Path) -> str:
    require_file(path)
    return _read_digest(path, path.stat().st_mtime_ns)


@cache
def _read_digest(path: Path, modified: int) -> str:  # a file that was modified is read again
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); copy the file anew from its source") from error


def find_parts(root: str | Path) -> dict[str, Path]:
    """The folders of a data set that hold `images`: "training" and "test" (either may be missing), or "all" alone.

    Raises:
        DatasetError: `root`, or the folder `DRIVE` in it, is no data set.
    """
    try:
        return _find_parts(Path(root))
    except OSError as error:
        raise DatasetError(
            f"--data-path {root}: cannot be read ({error.strerror}); change its permissions, or give another folder"
        ) from error


def _find_parts(root: Path) -> dict[str, Path]:
    for folder in (root / "DRIVE", root):
        parts = {name: folder / name for name in ("training", "test") if (folder / name / "images").is_dir()}
        if parts:
            return parts
    if (root / "images").is_dir():
        return {"all": root}
    names = _names_in(root)
    advice = "Give the folder that contains DRIVE, or a folder with images and labels"
    if names is not None and root.absolute().name == "images":
        advice = f"Give its folder, {root.absolute().parent}"
    for name in names or ():
        meant = "training" if name.lower() == "train" else name.lower()
        folder = root / name if meant == "images" else root / name / "images"
        if name != meant and meant in ("training", "test", "images") and folder.is_dir():
            advice = f"Rename {root / name} to {meant}"
    raise DatasetError(
        f"--data-path {root}: no DRIVE data set; looked for {root / 'DRIVE' / 'training' / 'images'} and "
        f"{root / 'training' / 'images'}, or {root / 'images'} with {root / 'labels'}; {_found(names)}. {advice}"
    )


def _names_in(folder: Path) -> list[str] | None:
    """The names of what is in a folder, sorted; None where there is no such folder."""
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None


def _found(names: Sequence[str] | None) -> str:
    if names is None:
        return "there is no such folder"
    return "found there: " + (", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing")


def find_photographs(folder: Path) -> list[Path]:
    """The photographs in `folder/images`, of any format and sorted by name.

    Raises:
        DatasetError: there are none.
    """
    photographs = images_in(folder / "images")
    if not photographs:
        advice = "unpack the data set again"
        if below := images_in(folder / "images", recursive=True):
            advice = f"those in folders of it, as {below[0]}, are not taken; move them"
        raise DatasetError(f"{folder / 'images'}: no photographs there (tif, png, jpg, ...); {advice}")
    return photographs


def has_labels(folder: Path) -> bool:
    """Whether a part of a data set holds labels; the test part of the official DRIVE has come without for years."""
    return any(images_in(folder / name) for name in LABEL_FOLDERS)


def pair(part: str, folder: Path) -> list[LabelledPhotograph]:
    """Each photograph of a part, in its folder, with its companions.

    A photograph `21_training.tif` has the label `21_manual1.*` (as in DRIVE). Where there is none, it has the one of
    its own stem, with one of LABEL_ENDINGS behind it, else of LATER_LABEL_ENDINGS. Labels lie in LABEL_FOLDERS. ROI
    masks and the labels of a second observer are found the same way and may be missing. Capitals and small letters are
    the same.

    A fault of a second observer's file is kept with the photograph.

    Raises:
        DatasetError: a label is missing, or a label or ROI mask is ambiguous or belongs to two photographs.
    """
    photographs = find_photographs(folder)
    labels = _Companions(folder, LABEL_FOLDERS, LABEL_ENDINGS, "_manual1", LATER_LABEL_ENDINGS)
    second_observers = _Companions(folder, SECOND_FOLDERS, SECOND_ENDINGS, "_manual2", LATER_SECOND_ENDINGS)
    roi_masks = _Companions(folder, ROI_FOLDERS, ROI_ENDINGS, f"_{folder.name}_mask", LATER_ROI_ENDINGS)
    pairs = [
        LabelledPhotograph(
            photograph,
            labels.find(photograph, "label", required=True),
            roi_masks.find(photograph, "field-of-view mask"),
            second_observers.find(photograph, "second observer's label"),
            part,
            folder if part == "all" else folder.parent,
            second_observers.faults.get(photograph),
        )
        for photograph in photographs
    ]
    for companions in (labels, roi_masks):
        companions.require_sound()
    return pairs


def match_masks(photographs: Sequence[Path], folder: str | Path) -> list[Path]:
    """The file in a folder that holds each photograph's predicted vessels, by the rule for labels.

    Raises:
        DatasetError: one is missing, or ambiguous, or belongs to two photographs.
    """
    if not Path(folder).is_dir():
        raise DatasetError(f"--masks {folder}: no such folder; give one with a mask of each photograph")
    masks = _Companions(Path(folder), (".",), LABEL_ENDINGS, "_manual1")
    found = [masks.find(photograph, "mask", required=True) for photograph in photographs]
    masks.require_sound()
    return found


def comparable(name: str) -> str:
    """A name without what does not count: capitals, and how its accents are composed, which differs on a Mac."""
    return unicodedata.normalize("NFC", name).lower()


class _Companions:
    """The files of some folders, as companions of photographs."""

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        endings: Sequence[str],
        drive_ending: str,
        later_endings: Sequence[str] = (),
    ) -> None:
        self.folders = [folder / name for name in names]
        self.endings, self.drive_ending, self.later_endings = endings, drive_ending, later_endings
        self.by_stem: dict[str, list[Path]] = {}
        for file in (file for place in self.folders for file in images_in(place)):
            self.by_stem.setdefault(comparable(file.stem), []).append(file)
        self.taken: dict[Path, Path] = {}  # companion -> photograph
        self.faults: dict[Path, str] = {}  # by photograph, as far as `find` has looked

    def find(self, photograph: Path, kind: str, required: bool = False) -> Path | None:
        drive_name = photograph.stem.split("_")[0] + self.drive_ending
        files = (
            self.by_stem.get(comparable(drive_name))
            or self._of_stem(photograph, self.endings)
            or self._of_stem(photograph, self.later_endings)
        )
        if not files:
            if required:
                self.faults[photograph] = f"{photograph}: its {kind} {self._expected(photograph)} is missing"
            return None
        if len(files) > 1:
            self.faults[photograph] = f"{photograph}: its {kind} is ambiguous: {files[0]} or {files[1]}"
        elif (other := self.taken.setdefault(files[0], photograph)) != photograph:
            self.faults[photograph] = f"{photograph}: has the same {kind} as {other}, {files[0]}"
        return files[0]

    def _of_stem(self, photograph: Path, endings: Sequence[str]) -> list[Path]:
        # A photograph is not its own companion, where photographs and masks lie in one folder.
        return [
            file
            for ending in endings
            for file in self.by_stem.get(comparable(photograph.stem + ending), [])
            if file != photograph
        ]

    def _expected(self, photograph: Path) -> Path:
        """The companion that it should have, in the folder that is there."""
        place = next((folder for folder in self.folders if folder.is_dir()), self.folders[0])
        number, _, rest = photograph.stem.partition("_")
        of_drive = number.isdigit() and rest in ("training", "test")
        return place / (f"{number}{self.drive_ending}.gif" if of_drive else f"{photograph.stem}.*")

    def require_sound(self) -> None:
        """Raise the faults so far, the first few in words.

        Raises:
            DatasetError: there are any.
        """
        if not self.faults:
            return
        first = list(self.faults.values())[:FIRST_FEW]
        if not any(folder.is_dir() for folder in self.folders):
            place, names = self.folders[0].parent, ", ".join(folder.name for folder in self.folders)
            raise DatasetError(
                f"{first[0]}. {place} has none of the folders {names}; {_found(_names_in(place))}. Rename the one with "
                "the labels to labels, or add it"
            )
        more = f" (and {len(self.faults) - FIRST_FEW} more)" if len(self.faults) > FIRST_FEW else ""
        endings = ", ".join(f"STEM{ending}.*" for ending in (*self.endings, *self.later_endings))
        raise DatasetError(
            f"{'; '.join(first)}{more}. A photograph NUMBER_... has the file "
            f"NUMBER{self.drive_ending}.*, else one of its own stem, {endings}, in "
            f"{' or '.join(str(folder) for folder in self.folders)}; add or rename files, or take photographs out"
        )


def training_photographs(root: str | Path) -> list[LabelledPhotograph]:
    """The photographs of a data set's training part, or all of one that has no parts.

    Raises:
        DatasetError: there are none, or as `pair`.
    """
    return pair(*_training_part(root))


def _training_part(root: str | Path) -> tuple[str, Path]:
    """The name of a data set's training part, or "all", and its folder.

    Raises:
        DatasetError: there is a test part alone.
    """
    parts = find_parts(root)
    for part in ("training", "all"):
        if part in parts:
            return part, parts[part]
    folder, train = (parts["test"].parent / name for name in ("training", "train"))
    advice = f"rename {train} to training" if train.is_dir() else f"put them into {folder / 'images'}"
    raise DatasetError(f"--data-path {root}: has no training photographs; {advice}")


def photographs_to_score(root: str | Path) -> list[LabelledPhotograph]:
    """The labelled test photographs of a data set; where these have no labels, all others.

    Raises:
        DatasetError: there are none, or as `pair`.
    """
    parts = find_parts(root)
    test = parts.get("test")
    return pair("test", test) if test and (len(parts) == 1 or has_labels(test)) else training_photographs(root)


@dataclass(frozen=True)
class Split:
    """Which photographs are trained on and which are held out to validate on.

    Attributes:
        val_split: the last photographs of each data set to hold out of its training part; 0: none, validate on the test
            part (of a data set that has no parts, as None); None: as 0 where the test part has labels, else one in
            HELD_OUT_SHARE, and both eyes of a person.
        fold: (K, N): hold out the K-th of N parts of the training photographs, K from 1; both eyes of a person are in
            one part.
        train_on_all: train on every labelled photograph, those of a test part too, and hold out none.
    """

    val_split: int | None = 0
    fold: tuple[int, int] | None = None
    train_on_all: bool = False

    def divide(
        self, roots: str | Path | Sequence[str | Path], test_needed: bool = True
    ) -> tuple[list[LabelledPhotograph], list[LabelledPhotograph]]:
        """The photographs of one or more data sets to train on, and those to validate on.

        Args:
            roots: the folder of each data set.
            test_needed: whether a test part to validate on must have labels; without, it then gives no photographs.

        Raises:
            DatasetError: there are none, or files are missing, or the split leaves nothing.
        """
        training, validated = [], []
        for root in [roots] if isinstance(roots, str | Path) else roots:
            for photographs, more in zip((training, validated), self._divide_one(root, test_needed), strict=True):
                photographs += more
        require_different(training, validated)
        return training, validated

    def _divide_one(
        self, root: str | Path, test_needed: bool
    ) -> tuple[list[LabelledPhotograph], list[LabelledPhotograph]]:
        photographs = training_photographs(root)
        if self.train_on_all:
            test = find_parts(root).get("test")
            return photographs + (pair("test", test) if test and has_labels(test) else []), []
        if self.fold:
            fold = set(_fold(photographs, *self.fold))
            return [item for item in photographs if item not in fold], [item for item in photographs if item in fold]
        held_out = self.held_out(root)
        if held_out:
            return photographs[:-held_out], photographs[-held_out:]
        test = photographs[0].root / "test"
        return photographs, pair("test", test) if test_needed or has_labels(test) else []

    def held_out(self, root: str | Path) -> int:
        """How many of the last training photographs of a data set are validated on; 0: the test photographs are.

        Raises:
            DatasetError: that leaves none to train on, or none to validate on.
        """
        parts, (_, folder) = find_parts(root), _training_part(root)
        photographs = find_photographs(folder)
        count = len(photographs)
        if self.val_split:
            if self.val_split < count:
                return self.val_split
            raise DatasetError(
                f"--val-split {self.val_split}: {count} training photographs in {folder / 'images'} leave room for 1 "
                f"to {count - 1}"
            )
        if "training" in parts and (self.val_split == 0 or has_labels(parts.get("test", folder.parent / "test"))):
            return 0
        if count == 1:
            raise DatasetError(
                f"--data-path {root}: a single training photograph, and no labels of test photographs; "
                "nothing is left to validate on"
            )
        held_out = min(max(round(count / HELD_OUT_SHARE), 1), count - 1)
        persons = [_person(photograph) for photograph in photographs]
        of_persons = held_out
        while of_persons < count and persons[-of_persons - 1] == persons[-held_out]:
            of_persons += 1
        return of_persons if of_persons < count else held_out


def require_different(training: Sequence[LabelledPhotograph], others: Sequence[LabelledPhotograph] = ()) -> None:
    """Raise where a file is named twice, or where a photograph of the training is among the others.

    Raises:
        DatasetError: there is such a photograph.
    """
    files: set[str] = set()
    for item in (*training, *others):
        if (file := os.path.realpath(item.photograph)) in files:
            raise DatasetError(f"--data-path: {item.photograph} is named twice; name each data set once")
        files.add(file)
    trained = {item.digest: item.photograph for item in training} if others else {}
    for item in others:
        if item.digest in trained:
            raise DatasetError(
                f"{item.photograph}: is the same photograph as {trained[item.digest]}, which is trained on; take one "
                "of them out"
            )


def _person(photograph: Path) -> str:
    """Whom a photograph of a folder shows, as far as its name tells: 01L and 01R are the eyes of one."""
    return EYE.sub("", PART.sub("", photograph.stem)).rstrip("_. -").lower()


def _fold(photographs: Sequence[LabelledPhotograph], number: int, folds: int) -> Iterator[LabelledPhotograph]:
    """The photographs of one fold. It depends on their names alone, and not on what their order may mean."""
    persons: dict[str, list[LabelledPhotograph]] = {}
    for item in photographs:
        persons.setdefault(_person(item.photograph), []).append(item)
    if folds > len(persons):
        raise DatasetError(
            f"--fold {number}/{folds}: {photographs[0].photograph.parent} holds {len(photographs)} photographs of "
            f"{len(persons)} person{'s' if len(persons) > 1 else ''} (by their names), too few for {folds} folds"
        )
    # By the name of the first, so that folds of one eye of each are those of earlier versions.
    shuffled = sorted(
        persons.values(), key=lambda items: hashlib.sha256(os.fsencode(items[0].photograph.name)).digest()
    )
    for items in shuffled[number - 1 :: folds]:
        yield from items


def describe(files: Sequence[LabelledPhotograph]) -> str:
    """Which photographs these are, in words: "test", or with their names "held-out training (35, 36)", or "none"."""
    if not files:
        return "none"
    names = root_names(files)
    parts = {name: _describe_one([item for item in files if item.root == root]) for root, name in names.items()}
    if len(set(parts.values())) == 1:
        return next(iter(parts.values()))
    return "; ".join(f"{name}: {part}" for name, part in parts.items())


def _describe_one(items: Sequence[LabelledPhotograph]) -> str:
    if items[0].part == "test":
        return "test"
    names = [item.number for item in items]
    beside = [path.stem.split("_")[0] for path in images_in(items[0].photograph.parent)]  # those trained on too
    if any(beside.count(name) > 1 or not name.isdigit() for name in names):
        names = [item.photograph.stem for item in items]
    return f"held-out training ({', '.join(names)})"


def root_names(files: Iterable[LabelledPhotograph]) -> dict[Path, str]:
    """A name for the folder of each data set: its own, or the whole path where two have the same."""
    roots = list(dict.fromkeys(item.root for item in files))
    own = [root.resolve().name for root in roots]
    return {root: name if own.count(name) == 1 else str(root) for root, name in zip(roots, own, strict=True)}
