import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from src.dataset_files import Split, describe, find_parts, has_labels, match_masks, pair, photographs_to_score
from src.errors import DatasetError
from tests.conftest import on_posix

ENDINGS = ["", "_manual1", "_mask", "_label", "_vessel", "_vessels", "_1stHO", "_gt", "_manual_orig", ".ah"]


def touch(*paths):
    """Files of which only the names count."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode())


def plain(root, count):
    for number in range(1, count + 1):
        touch(root / "images" / f"eye_{number:02}.jpg", root / "labels" / f"eye_{number:02}.png")
    return root


def stems(items):
    return [item.photograph.stem for item in items]


@pytest.mark.parametrize("folder", ["1st_manual", "labels", "masks_manual", "manual1"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_labels_by_stem(tmp_path, folder, ending):
    touch(tmp_path / "images" / "left eye.JPG", tmp_path / folder / f"left eye{ending}.Tiff")
    (item,) = pair("all", tmp_path)
    assert item.label == tmp_path / folder / f"left eye{ending}.Tiff"
    assert item.roi_mask is None and item.second_observer is None


@pytest.mark.parametrize("suffix", ["tif", "tiff", "png", "jpg", "jpeg", "bmp", "ppm", "gif", "TIF", "Png"])
def test_formats(tmp_path, suffix):
    touch(tmp_path / "images" / f"a.{suffix}", tmp_path / "labels" / f"A_GT.{suffix}")
    (item,) = pair("all", tmp_path)
    assert item.photograph.name == f"a.{suffix}" and item.label.name == f"A_GT.{suffix}"


def test_the_rule_of_drive_comes_first(tmp_path):
    training = tmp_path / "training"
    touch(training / "images" / "21_training.tif")
    touch(training / "1st_manual" / "21_manual1.gif", training / "1st_manual" / "21_training.gif")
    touch(training / "mask" / "21_training_mask.gif", training / "2nd_manual" / "21_manual2.gif")
    (item,) = pair("training", training)
    assert item.label.name == "21_manual1.gif"
    assert item.roi_mask.name == "21_training_mask.gif" and item.second_observer.name == "21_manual2.gif"
    assert item.root == tmp_path and item.number == "21"


def test_masks_of_the_plain_layout(tmp_path):
    touch(tmp_path / "images" / "01_dr.jpg", tmp_path / "labels" / "01_dr.png", tmp_path / "masks" / "01_dr.png")
    touch(tmp_path / "images" / "01_h.jpg", tmp_path / "labels" / "01_h.png", tmp_path / "masks" / "01_h_mask.png")
    assert [item.roi_mask.name for item in pair("all", tmp_path)] == ["01_dr.png", "01_h_mask.png"]


def test_data_sets_whose_files_keep_their_names(tmp_path):
    """STARE, with both observers, and DR HAGIS."""
    touch(tmp_path / "images" / "im0001.ppm", tmp_path / "labels" / "im0001.ah.ppm")
    touch(tmp_path / "2nd_manual" / "im0001.vk.ppm")
    touch(
        tmp_path / "images" / "1.jpg", tmp_path / "labels" / "1_manual_orig.png", tmp_path / "mask" / "1_mask_orig.png"
    )
    of_hagis, of_stare = pair("all", tmp_path)
    assert of_hagis.label.name == "1_manual_orig.png" and of_hagis.roi_mask.name == "1_mask_orig.png"
    assert of_stare.label.name == "im0001.ah.ppm" and of_stare.second_observer.name == "im0001.vk.ppm"
    # Where there are others besides, these count, and among predicted masks they are labels.
    touch(tmp_path / "labels" / "im0001.png", tmp_path / "labels" / "1.png", tmp_path / "mask" / "1_mask.png")
    touch(tmp_path / "2nd_manual" / "im0001.png")
    of_hagis, of_stare = pair("all", tmp_path)
    assert of_hagis.label.name == "1.png" and of_hagis.roi_mask.name == "1_mask.png"
    assert of_stare.label.name == of_stare.second_observer.name == "im0001.png" and of_stare.fault is None
    assert match_masks([of_stare.photograph], tmp_path / "labels") == [tmp_path / "labels" / "im0001.png"]
    (tmp_path / "labels" / "im0001.png").unlink()
    with pytest.raises(DatasetError, match="is missing"):
        match_masks([of_stare.photograph], tmp_path / "labels")


@pytest.mark.parametrize(
    "photograph, label",
    [
        ("21_training", "21_manual1.gif"),
        ("01_test", "01_manual1.gif"),
        ("Image_01L", "Image_01L.*"),
        ("01_h", "01_h.*"),
    ],
)
def test_a_missing_label_has_a_name_of_its_own(tmp_path, photograph, label):
    """Two photographs that begin alike cannot both have the one by DRIVE's rule."""
    touch(tmp_path / "images" / f"{photograph}.jpg", tmp_path / "labels" / "other.png")
    with pytest.raises(DatasetError) as raised:
        pair("all", tmp_path)
    assert f"{photograph}.jpg: its label {tmp_path / 'labels' / label} is missing" in str(raised.value)


def test_missing_labels_are_listed(tmp_path):
    plain(tmp_path, 6)
    for number in range(1, 6):
        (tmp_path / "labels" / f"eye_{number:02}.png").unlink()
    with pytest.raises(DatasetError) as raised:
        pair("all", tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert all(f"eye_{number:02}.jpg: its label" in message for number in (1, 2, 3)) and "eye_04" not in message
    assert "(and 2 more)" in message and "STEM_1stHO.*" in message and str(tmp_path / "labels") in message


def test_ambiguous_labels(tmp_path):
    plain(tmp_path, 2)
    touch(tmp_path / "labels" / "eye_02_gt.png")
    with pytest.raises(DatasetError, match=r"eye_02\.jpg: its label is ambiguous: .*eye_02\.png or .*eye_02_gt\.png"):
        pair("all", tmp_path)


def test_a_label_of_two_photographs(tmp_path):
    training = tmp_path / "training"
    touch(training / "images" / "21_training.tif", training / "images" / "21_second.tif")
    touch(training / "1st_manual" / "21_manual1.gif")
    with pytest.raises(DatasetError, match=r"21_training\.tif: has the same label as .*21_second\.tif, .*21_manual1"):
        pair("training", training)


def test_parts(tmp_path):
    with pytest.raises(DatasetError, match="looked for .*training.images .*Give the folder"):
        find_parts(tmp_path)
    assert find_parts(plain(tmp_path / "plain", 1)) == {"all": tmp_path / "plain"}
    for part in ("training", "test"):
        plain(tmp_path / "DRIVE" / part, 2)
    expected = {part: tmp_path / "DRIVE" / part for part in ("training", "test")}
    assert find_parts(tmp_path) == find_parts(tmp_path / "DRIVE") == expected
    shutil.rmtree(tmp_path / "DRIVE" / "training")
    assert list(find_parts(tmp_path)) == ["test"]
    assert len(photographs_to_score(tmp_path)) == 2
    with pytest.raises(DatasetError, match="has no training photographs; put them into .*training.images"):
        Split().divide(tmp_path)
    plain(tmp_path / "DRIVE" / "train", 2)
    with pytest.raises(DatasetError, match="has no training photographs; rename .*train to training"):
        Split().divide(tmp_path)


@pytest.mark.parametrize(
    "made, given, advice",
    [
        ("train/images", ".", "found there: train. Rename .*train to training"),
        pytest.param("Images", ".", "found there: Images. Rename .*Images to images", marks=on_posix),
        ("images", "images", "found there: a.jpg. Give its folder, .*"),
        ("train", ".", "found there: train. Give the folder that contains DRIVE"),
        ("images", "nothing/images", "there is no such folder. Give the folder that contains DRIVE"),
        ("images", "nothing", "there is no such folder. Give the folder that contains DRIVE"),
    ],
)
def test_a_folder_of_another_name_is_named(tmp_path, made, given, advice):
    touch(tmp_path / made / "a.jpg")
    with pytest.raises(DatasetError, match=f"no DRIVE data set; .*; {advice}"):
        Split().divide(tmp_path / given)


def test_a_folder_of_labels_of_another_name_is_named(tmp_path):
    plain(tmp_path, 2)
    (tmp_path / "labels").rename(tmp_path / "masks")
    with pytest.raises(DatasetError, match="found there: images, masks. Rename the one with the labels to labels, or"):
        Split().divide(tmp_path)


@pytest.mark.parametrize("count, held_out", [(2, 1), (3, 1), (5, 1), (8, 2), (20, 4), (45, 9)])
def test_without_a_test_part_the_last_fifth_is_held_out(tmp_path, count, held_out):
    plain(tmp_path, count)
    for split in (Split(), Split(None)):
        training, validated = split.divide(tmp_path)
        assert stems(training + validated) == [f"eye_{number:02}" for number in range(1, count + 1)]
        assert len(validated) == held_out
    assert len(photographs_to_score(tmp_path)) == count


def test_a_single_photograph_leaves_nothing_to_validate_on(tmp_path):
    with pytest.raises(DatasetError, match="a single training photograph"):
        Split(None).divide(plain(tmp_path, 1))


def test_test_labels_decide(tmp_path):
    plain(tmp_path / "training", 10), plain(tmp_path / "test", 3)
    assert [len(part) for part in Split(None).divide(tmp_path)] == [10, 3]
    assert [len(part) for part in Split(4).divide(tmp_path)] == [6, 4]
    assert len(photographs_to_score(tmp_path)) == 3
    shutil.rmtree(tmp_path / "test" / "labels")
    assert not has_labels(tmp_path / "test")
    assert [len(part) for part in Split(None).divide(tmp_path)] == [8, 2]
    assert stems(photographs_to_score(tmp_path)) == [f"eye_{number:02}" for number in range(1, 11)]
    with pytest.raises(DatasetError, match="its label"):
        Split(0).divide(tmp_path)  # asked to validate on the test part


def test_folds_cover_everything_once(tmp_path):
    roots = [plain(tmp_path / "a", 7), plain(tmp_path / "b", 12)]
    everything = sorted(str(item.photograph) for root in roots for item in pair("all", root))
    held_out = []
    for number in range(1, 6):
        training, validated = Split(fold=(number, 5)).divide(roots)
        assert sorted(str(item.photograph) for item in training + validated) == everything
        assert {item.root for item in validated} == set(roots)
        assert [sum(item.root == root for item in validated) for root in roots] in ([1, 2], [2, 2], [1, 3], [2, 3])
        held_out += validated
        assert Split(fold=(number, 5)).divide(roots) == (training, validated)
    assert sorted(str(item.photograph) for item in held_out) == everything
    # Names that carry a meaning (left, right, left, ...) must not decide the fold.
    assert stems(Split(fold=(1, 2)).divide(roots[1])[1]) != [f"eye_{number:02}" for number in range(1, 13, 2)]
    with pytest.raises(DatasetError, match="--fold 1/8: .* holds 7 photographs"):
        Split(fold=(1, 8)).divide(roots[0])


def test_descriptions(tmp_path):
    plain(tmp_path / "HRF", 5), plain(tmp_path / "DRIVE" / "training", 3), plain(tmp_path / "DRIVE" / "test", 1)
    training, validated = Split(None).divide([tmp_path, tmp_path / "HRF"])
    assert describe(validated) == "DRIVE: test; HRF: held-out training (eye_05)"
    assert describe(Split(2).divide(tmp_path)[1]) == "held-out training (eye_02, eye_03)"
    assert describe(Split(None).divide(tmp_path)[1]) == "test"
    names = [f"{number}_{kind}" for number in range(1, 4) for kind in ("a", "b")]
    for name in names:
        touch(tmp_path / "pairs" / "images" / f"{name}.png", tmp_path / "pairs" / "labels" / f"{name}.png")
    assert describe(Split(1).divide(tmp_path / "pairs")[1]) == "held-out training (3_b)"  # 3_a is trained on


def test_masks_of_other_programs(tmp_path):
    photographs = [Path("left.jpg"), Path("right.jpg")]
    touch(tmp_path / "left_vessels.png", tmp_path / "left_overlay.png", tmp_path / "right.gif")
    assert [path.name for path in match_masks(photographs, tmp_path)] == ["left_vessels.png", "right.gif"]
    (tmp_path / "right.gif").unlink()
    with pytest.raises(DatasetError, match=r"right\.jpg: its mask"):
        match_masks(photographs, tmp_path)


def test_digests_follow_the_photograph(tmp_path):
    plain(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "images" / "eye_01.jpg").rename(tmp_path / "b" / "images" / "renamed.jpg")
    (tmp_path / "b" / "labels" / "eye_01.png").rename(tmp_path / "b" / "labels" / "renamed.png")
    digests = [{item.digest for item in pair("all", tmp_path / name)} for name in "ab"]
    assert digests[0] == digests[1] and len(digests[0]) == 2


def test_real_data_sets(real_drive):
    for name, count, masked in (("HRF", 45, True), ("ARIA", 48, False)):
        if not (real_drive / name).is_dir():
            pytest.skip(f"{name} is not at hand")
        items = pair("all", real_drive / name)
        assert len(items) == count and all((item.roi_mask is not None) == masked for item in items)
        with Image.open(items[0].photograph) as photograph, Image.open(items[0].label) as label:
            assert photograph.size == label.size


def test_a_test_part_alone_has_nothing_to_train_on(tmp_path):
    plain(tmp_path / "test", 2)
    for split in (Split(), Split(None), Split(1), Split(fold=(1, 2))):
        with pytest.raises(DatasetError, match=r"has no training photographs; put them into .*training.images"):
            split.divide(tmp_path)
    with pytest.raises(DatasetError, match="has no training photographs"):
        Split(None).held_out(tmp_path)


def test_photographs_in_folders_of_images(tmp_path):
    touch(tmp_path / "images" / "left" / "01.png")
    with pytest.raises(
        DatasetError, match=r"no photographs there .*those in folders of it, as .*01\.png, are not taken"
    ):
        pair("all", tmp_path)


def test_accents_may_be_composed_in_two_ways(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Müller_É") for form in ("NFC", "NFD"))
    assert composed != decomposed
    touch(tmp_path / "images" / f"{decomposed}.png", tmp_path / "labels" / f"{composed}.png")
    touch(tmp_path / "masks" / f"{composed}_mask.png")
    (item,) = pair("all", tmp_path)
    assert item.label.stem == composed and item.roi_mask.stem == f"{composed}_mask"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Image_{}L", "Image_{}R"),
        ("{}_left", "{}_right"),
        ("p{}-OD", "p{}-OS"),
        ("{} l", "{} R"),
        ("{}L_training", "{}R_training"),
        ("{}_left_test", "{}_right_test"),
    ],
)
def test_both_eyes_of_a_person_are_held_out_together(tmp_path, left, right):
    names = [name.format(f"{number:02}") for number in range(1, 8) for name in (left, right)]
    touch(*(tmp_path / folder / f"{name}.png" for folder in ("images", "labels") for name in names))
    held_out = []
    for number in range(1, 4):
        validated = stems(Split(fold=(number, 3)).divide(tmp_path)[1])
        assert 4 <= len(validated) <= 6
        for number in range(1, 8):
            assert (left.format(f"{number:02}") in validated) == (right.format(f"{number:02}") in validated)
        held_out += validated
    assert sorted(held_out) == sorted(names)
    assert len(Split(None).divide(tmp_path)[1]) == 4  # a fifth of 14 are 3
    assert len(Split(3).divide(tmp_path)[1]) == 3  # as asked
    with pytest.raises(DatasetError, match="--fold 1/8: .* holds 14 photographs of 7 persons"):
        Split(fold=(1, 8)).divide(tmp_path)


@pytest.mark.parametrize("names, held_out", [("01 02 03 04 05 06 07L 07R 07_l 07_r", 4), ("01 01L 01R 01_l", 1)])
def test_all_photographs_of_a_person_are_held_out_together(tmp_path, names, held_out):
    touch(*(tmp_path / folder / f"{name}.png" for folder in ("images", "labels") for name in names.split()))
    assert stems(Split(None).divide(tmp_path)[1]) == names.split()[-held_out:]


def test_names_that_only_look_like_those_of_eyes(tmp_path):
    names = ["01_dr", "01_g", "left", "right", "signal", "signor"]
    touch(*(tmp_path / folder / f"{name}.png" for folder in ("images", "labels") for name in names))
    parts = [stems(Split(fold=(number, 6)).divide(tmp_path)[1]) for number in range(1, 7)]
    assert sorted(parts) == [[name] for name in names]
