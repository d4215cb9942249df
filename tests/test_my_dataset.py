import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from my_dataset import DriveDataset, cat_list
from src import photograph as reading
from src.dataset_files import find_parts, has_labels
from src.errors import DatasetError

TRAINING = [f"{number}_training.tif" for number in range(21, 27)]


def names(dataset):
    return [path.name for path in dataset.img_list]


def save_label(drive, array, mode="L", name="21_manual1.gif"):
    Image.fromarray(array).convert(mode).save(drive / "DRIVE" / "training" / "1st_manual" / name, format="PNG")


def test_items(shared_drive):
    dataset = DriveDataset(shared_drive, train=True)
    assert names(dataset) == TRAINING
    folder = shared_drive / "DRIVE" / "training"
    for i, (image, label) in enumerate(dataset):
        key = 21 + i
        assert image.mode == "RGB" and image.size == label.size == (80, 72)
        assert np.array_equal(np.array(image), np.array(Image.open(folder / "images" / f"{key}_training.tif")))
        vessels = np.array(Image.open(folder / "1st_manual" / f"{key}_manual1.gif").convert("L")) == 255
        inside = np.array(Image.open(folder / "mask" / f"{key}_training_mask.gif").convert("L")) == 255
        label = np.array(label)
        assert set(np.unique(label)) == {0, 1, 255}
        assert np.array_equal(label == 255, ~inside)
        assert np.array_equal(label == 1, vessels & inside)
        assert dataset.manual[i] == folder / "1st_manual" / f"{key}_manual1.gif"
        assert dataset.roi_mask[i] == folder / "mask" / f"{key}_training_mask.gif"


def test_transforms_get_both(shared_drive):
    dataset = DriveDataset(shared_drive, train=False, transforms=lambda image, label: (image.mode, label.mode))
    assert dataset[0] == ("RGB", "L")


def test_order_does_not_depend_on_the_directory(drive, monkeypatch):
    listdir, scandir = os.listdir, os.scandir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __next__(self):
            if not self:
                raise StopIteration
            return self.pop(0)

        def close(self):
            pass

    monkeypatch.setattr(os, "listdir", lambda *args: sorted(listdir(*args), reverse=True))
    monkeypatch.setattr(
        os, "scandir", lambda *args: Reversed(sorted(scandir(*args), key=lambda entry: entry.name, reverse=True))
    )
    (drive / "DRIVE" / "training" / "images" / "._21_training.tif").write_bytes(b"left by a Mac")
    assert names(DriveDataset(drive, train=True)) == TRAINING


def test_data_path_may_be_the_drive_folder_itself(shared_drive):
    assert find_parts(shared_drive / "DRIVE") == find_parts(shared_drive)
    assert names(DriveDataset(shared_drive / "DRIVE", train=True)) == TRAINING


def test_wrong_folder_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "CHASE").mkdir()
    with pytest.raises(DatasetError, match=r"looked for .*DRIVE.training.images .*found there: CHASE\. Give"):
        DriveDataset(tmp_path, train=True)
    with pytest.raises(DatasetError, match="there is no such folder"):
        DriveDataset(tmp_path / "nowhere", train=True)


def test_val_split_holds_out_the_last(shared_drive):
    training = DriveDataset(shared_drive, train=True, val_split=2)
    held_out = DriveDataset(shared_drive, train=False, val_split=2)
    assert names(training) == TRAINING[:4] and names(held_out) == TRAINING[4:]
    for too_many in (6, 7):
        with pytest.raises(DatasetError, match=f"--val-split {too_many}: 6 training photographs .* 1 to 5"):
            DriveDataset(shared_drive, train=True, val_split=too_many)


def test_training_folder_alone(drive):
    assert has_labels(drive / "DRIVE" / "test")
    for label in (drive / "DRIVE" / "test" / "1st_manual").iterdir():
        label.unlink()
    assert not has_labels(drive / "DRIVE" / "test")
    assert len(DriveDataset(drive, train=True, val_split=1)) == 5
    assert names(DriveDataset(drive, train=True)) == TRAINING  # the tutorial's call, with the official download
    with pytest.raises(DatasetError, match=r"01_test\.tif: its label .*01_manual1\.gif is missing"):
        DriveDataset(drive, train=False)
    shutil.rmtree(drive / "DRIVE" / "test")
    assert names(DriveDataset(drive, train=True)) == TRAINING


def test_the_plain_layout_never_trains_on_what_it_holds_out(shared_drive, tmp_path):
    for folder, name in (("images", "images"), ("1st_manual", "labels")):
        shutil.copytree(shared_drive / "DRIVE" / "training" / folder, tmp_path / name)
    training, held_out = (DriveDataset(tmp_path, train) for train in (True, False))
    assert names(training) == TRAINING[:5] and names(held_out) == TRAINING[5:]


def test_photographs_are_decoded_once(shared_drive, monkeypatch):
    dataset = DriveDataset(shared_drive, train=True)
    monkeypatch.setattr(reading.Image, "open", lambda *args: pytest.fail("decoded again"))
    for _ in range(2):
        assert len([dataset[i] for i in range(len(dataset))]) == 6


@pytest.mark.parametrize("kind", ["0/255", "0/1", "RGB", "palette", "bilevel"])
def test_kinds_of_labels(drive, kind):
    expected = np.array(DriveDataset(drive, train=True)[0][1])
    vessels = np.uint8(255) * (np.random.default_rng(0).random(expected.shape) < 0.3)
    if kind == "0/1":
        save_label(drive, vessels // 255)
    else:
        save_label(drive, vessels, {"0/255": "L", "RGB": "RGB", "palette": "P", "bilevel": "1"}[kind])
    label = np.array(DriveDataset(drive, train=True)[0][1])
    assert np.array_equal(label, np.where(expected == 255, 255, vessels // 255))


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 128, 255), (38,)])
def test_other_values_in_a_label(drive, values):
    label = np.resize(np.array(values, np.uint8), (72, 80))
    save_label(drive, label)
    with pytest.raises(DatasetError, match=f"21_manual1.gif: .*holds the values {', '.join(map(str, values))};"):
        DriveDataset(drive, train=True)


def test_missing_companions(drive):
    (drive / "DRIVE" / "training" / "1st_manual" / "23_manual1.gif").unlink()
    with pytest.raises(DatasetError, match=r"23_training\.tif: its label .*23_manual1\.gif is missing"):
        DriveDataset(drive, train=True)


def test_label_of_another_size(drive):
    save_label(drive, np.zeros((71, 80), np.uint8))
    with pytest.raises(DatasetError, match=r"21_manual1\.gif: is 80 x 71 .*21_training\.tif is 80 x 72"):
        DriveDataset(drive, train=True)


def test_black_field_of_view(drive):
    Image.new("L", (80, 72)).save(drive / "DRIVE" / "training" / "mask" / "22_training_mask.gif")
    with pytest.raises(DatasetError, match=r"22_training_mask\.gif: is black everywhere"):
        DriveDataset(drive, train=True)


def test_no_photographs(drive):
    for photograph in (drive / "DRIVE" / "training" / "images").iterdir():
        photograph.unlink()
    with pytest.raises(DatasetError, match="no photographs"):
        DriveDataset(drive, train=True)


def test_file_that_is_no_image(drive):
    (drive / "DRIVE" / "training" / "images" / "24_training.tif").write_text("<html>log in to download</html>")
    with pytest.raises(DatasetError, match=r"24_training\.tif: not an image"):
        DriveDataset(drive, train=True)


@pytest.mark.parametrize("name", ["images/25_training.tif", "1st_manual/25_manual1.gif"])
@pytest.mark.filterwarnings("error")  # no line but ours
def test_truncated_files(drive, name):
    path = drive / "DRIVE" / "training" / name
    whole = path.read_bytes()
    for share in (0, 0.05, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DatasetError, match=f"{path.name}: (cannot be read|not an image)"):
            DriveDataset(drive, train=True)


def test_truncated_uncompressed_tiff(drive):
    buffer = io.BytesIO()
    Image.new("RGB", (80, 72)).save(buffer, format="TIFF")
    path = drive / "DRIVE" / "training" / "images" / "21_training.tif"
    path.write_bytes(buffer.getvalue()[:5000])
    with pytest.raises(DatasetError, match=r"21_training\.tif: cannot be read"):
        DriveDataset(drive, train=True)


def test_collate_pads_right_and_bottom():
    items = [
        (torch.ones(3, 2, 5), torch.ones(2, 5, dtype=torch.int64)),
        (torch.ones(3, 4, 3), torch.ones(4, 3, dtype=torch.int64)),
    ]
    images, labels = DriveDataset.collate_fn(items)
    assert images.shape == (2, 3, 4, 5) and labels.shape == (2, 4, 5)
    assert labels[0].tolist() == [[1] * 5] * 2 + [[255] * 5] * 2
    assert labels[1].tolist() == [[1, 1, 1, 255, 255]] * 4
    assert images[0].sum() == 30 and images[1].sum() == 36 and images[1, :, :, 3:].sum() == 0
    assert labels.dtype == torch.int64 and images.dtype == torch.float32


def test_cat_list_default_fill_is_zero():
    assert cat_list([torch.ones(1, 1), torch.ones(2, 2)]).tolist() == [[[1, 0], [0, 0]], [[1, 1], [1, 1]]]


def test_real_photographs(real_drive):
    for train in (True, False):
        for image, label in DriveDataset(real_drive, train):
            assert image.size == label.size == (565, 584)
            assert set(np.unique(label)) == {0, 1, 255}
