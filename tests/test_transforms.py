import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import transforms as T


def pair(height=60, width=50, kind="pil"):
    """A photograph whose red channel is 200 exactly where the label is 1, and a label with 0, 1 and 255."""
    label = np.zeros((height, width), np.uint8)
    label[height // 3 : height // 2, 5:-9] = 1
    label[:4] = 255
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 200 * (label == 1)
    if kind == "pil":
        return Image.fromarray(image), Image.fromarray(label)
    return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(label))


def to_arrays(image, target):
    if isinstance(image, Image.Image):
        return np.array(image), np.array(target)
    image = image if image.dtype == torch.uint8 else (image * 255).round()
    return image.permute(1, 2, 0).numpy(), target.numpy()


@pytest.mark.parametrize("kind", ["pil", "tv_tensors"])
@pytest.mark.parametrize(
    "transform",
    [
        T.RandomResize(20, 90),
        T.RandomHorizontalFlip(0.5),
        T.RandomVerticalFlip(0.5),
        T.RandomCrop(70),
        T.CenterCrop(55),
        T.RandomAffineCrop(70, 40, 60, 1),
    ],
)
def test_no_new_label_values_and_image_stays_on_its_label(transform, kind):
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = to_arrays(*transform(*pair(kind=kind)))
        assert image.shape[:2] == target.shape
        assert set(np.unique(target)) <= {0, 1, 255}
        # Resampling blurs the image's edges by at most a pixel or so; a flip or crop of one of the two alone would not.
        overlap = ((image[..., 0] > 100) == (target == 1)).mean()
        assert overlap > 0.97


@pytest.mark.parametrize("size", [23, 41, 77])
def test_labels_are_sampled_at_pixel_centres(size):
    label = to_arrays(*pair())[1]
    height = int(size * 60 / 50)
    rows = ((np.arange(height) + 0.5) * 60 / height).astype(int)
    columns = ((np.arange(size) + 0.5) * 50 / size).astype(int)
    expected = label[rows][:, columns]
    assert np.array_equal(to_arrays(*T.RandomResize(size)(*pair(kind="tv_tensors")))[1], expected)
    # Where a centre falls exactly between two rows, Pillow takes the other one: a single row here.
    differing = (to_arrays(*T.RandomResize(size)(*pair()))[1] != expected).any(axis=1)
    assert differing.sum() <= 1


def test_resize_draws_whole_numbers_from_both_ends_for_the_shorter_side():
    torch.manual_seed(0)
    sizes = {T.RandomResize(20, 23)(*pair())[0].size for _ in range(80)}
    assert {width for width, _ in sizes} == {20, 21, 22, 23}
    assert all(height == int(60 / 50 * width) for width, height in sizes)


@pytest.mark.parametrize("flip", [T.RandomHorizontalFlip, T.RandomVerticalFlip])
def test_flip_probabilities(flip):
    image, target = pair()
    original = np.array(target)
    axis = 1 if flip is T.RandomHorizontalFlip else 0
    assert np.array_equal(np.array(flip(0.0)(image, target)[1]), original)
    assert np.array_equal(np.array(flip(1.0)(image, target)[1]), np.flip(original, axis))


def test_crop_pads_right_and_bottom_with_zero_and_255():
    image, target = pair(height=10, width=8)
    image, target = to_arrays(*T.RandomCrop(12)(Image.eval(image, lambda value: 7), target))
    assert image.shape == (12, 12, 3) and target.shape == (12, 12)
    assert (image[:10, :8] == 7).all() and not image[10:].any() and not image[:, 8:].any()
    assert (target[10:] == 255).all() and (target[:, 8:] == 255).all()
    assert np.array_equal(target[:10, :8], np.array(pair(height=10, width=8)[1]))


def test_crop_reaches_every_position():
    torch.manual_seed(0)
    image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6))
    corners = {np.array(T.RandomCrop(4)(image, image)[0])[0, 0] for _ in range(200)}
    assert corners == {0, 1, 2, 6, 7, 8, 12, 13, 14}


def draw(monkeypatch, *numbers):
    """Let RandomAffineCrop draw these: zoom, angle (in turns), mirror, x, y."""
    monkeypatch.setattr(T.torch, "rand", lambda *size: torch.tensor(numbers))


def test_affine_crop_by_hand(monkeypatch):
    """Without zoom and turn it is a crop; half a turn and a mirror are flips; a quarter turn transposes."""
    image, label = pair(height=40, width=40)
    pixels, values = np.array(image) / 255, np.array(label)
    whole = T.RandomAffineCrop(40, 40, 40, 1)
    for turn, mirror, expected in (
        (0, 0.7, lambda picture: picture),
        (0.5, 0.7, lambda picture: picture[::-1, ::-1]),
        (0, 0.2, lambda picture: picture[:, ::-1]),
        (0.25, 0.7, lambda picture: np.rot90(picture)),
    ):
        draw(monkeypatch, 0, turn, mirror, 0.5, 0.5)
        cropped, target = whole(image, label)
        assert np.allclose(cropped.permute(1, 2, 0).numpy(), expected(pixels), atol=1e-4)
        assert np.array_equal(target.numpy(), expected(values))
    draw(monkeypatch, 0, 0, 0.7, 0.5, 0.0)
    cropped, target = T.RandomAffineCrop(20, 40, 40, 1)(image, label)
    assert np.allclose(cropped.permute(1, 2, 0).numpy(), pixels[:20, 10:30], atol=1e-4)
    assert np.array_equal(target.numpy(), values[:20, 10:30])
    draw(monkeypatch, 1, 0, 0.7, 0.5, 0.5)  # the whole picture at twice its size
    doubled = T.RandomAffineCrop(80, 40, 80, 1)(image, label)[1].numpy()
    assert np.array_equal(doubled, values.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("size", [20, 21, 40])
@pytest.mark.parametrize("base_size", [None, 40])
def test_affine_crops_that_are_not_resampled(size, base_size):
    """They hold the pixels of the picture, turned by a multiple of 90 degrees."""
    values = np.arange(40 * 50).reshape(40, 50)
    image = torch.from_numpy(np.stack([values // 256, values % 256, 0 * values]).astype(np.uint8))
    label = tv_tensors.Mask(torch.from_numpy(values % 2).to(torch.uint8))
    crop, places = T.RandomAffineCrop(size, 0.5, 2.0, base_size, unresampled=1), set()
    for _ in range(30):
        cropped, target = crop(tv_tensors.Image(image), label)
        levels = cropped.double() * 255
        assert torch.allclose(levels, levels.round(), atol=0.05)
        found = (256 * levels[0] + levels[1]).round().long().numpy()
        assert np.array_equal(target.numpy(), found % 2)
        assert {abs(found[0, 1] - found[0, 0]), abs(found[1, 0] - found[0, 0])} == {1, 50}  # neighbours in the picture
        places.add(found[0, 0])
    assert len(places) > 4


@pytest.mark.parametrize(
    ("base_size", "share", "least", "most"), [(None, 0.5, 10, 30), (None, 0.0, 0, 2), (80, 1.0, 0, 2)]
)
def test_share_of_crops_that_are_not_resampled(base_size, share, least, most):
    """In pictures of another size than `base_size` there are none: they would have the wrong size."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    label = Image.new("L", (40, 40))
    crop = T.RandomAffineCrop(20, 0.8, 1.15, base_size, unresampled=share)
    levels = [crop(image, label)[0] * 255 for _ in range(40)]
    assert least <= sum(torch.allclose(each, each.round(), atol=0.05) for each in levels) <= most
    scaled = [crop(image, label, scale=1.1)[0] * 255 for _ in range(10)]
    assert not any(torch.allclose(each, each.round(), atol=0.05) for each in scaled)


def test_beyond_the_frame_an_affine_crop_is_black_and_ignored(monkeypatch):
    draw(monkeypatch, 0, 0.125, 0.7, 0.5, 0.5)
    image, label = Image.new("RGB", (40, 40), "white"), Image.new("L", (40, 40), 1)
    image, label = T.RandomAffineCrop(40, 40, 40, 1)(image, label)
    corners = [(row, column) for row in (0, -1) for column in (0, -1)]
    assert all(label[corner] == 255 and (image[:, corner[0], corner[1]] == 0).all() for corner in corners)
    assert label[20, 20] == 1 and set(label.unique().tolist()) == {1, 255}


def test_rotation_preset():
    preset = T.get_transform(True, (0.5,) * 3, (0.5,) * 3, crop_size=64, augmentation="rotation")
    torch.manual_seed(0)
    first, second = (preset(*pair(584, 565)) for _ in range(2))
    assert first[0].shape == (3, 64, 64) and first[1].shape == (64, 64) and first[1].dtype == torch.int64
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    assert torch.equal(preset(*pair(584, 565))[0], first[0])


@pytest.mark.parametrize(
    ("scale", "detail", "taken"),
    [(0.6, 1.6, "working"), (1.0, 1.6, "working"), (1.01, 1.6, "detail"), (1.6, 1.6, "detail"), (0.6, 0.5, "detail")],
)
def test_crops_of_two_sizes(scale, detail, taken, monkeypatch):
    """Of the size that is large enough for the crop; a stripe is as wide as the scale says, whatever the size."""
    preset = T.SegmentationPresetAnyCamera(None, 64, mean=(0.5,) * 3, std=(0.1,) * 3)
    crop, _ = preset.transforms
    crop.bend = 0
    preset.transforms[1] = lambda image, target: (image, target)
    monkeypatch.setattr(crop, "draw_scale", lambda: scale)
    draw(monkeypatch, 0.3, 0, 0.7, 0.5, 0.5)
    sizes = []
    for size, grey in ((1.0, 50), (detail, 200)):
        label = np.zeros([round(200 * size)] * 2, np.uint8)
        label[round(90 * size) : round(110 * size)] = 1
        sizes.append((size, Image.new("RGB", label.shape, (grey,) * 3), Image.fromarray(label)))
    image, target = preset.of_two_sizes(*sizes)
    assert image.shape == (3, 64, 64) and target.shape == (64, 64)
    assert image.mean() == pytest.approx({"working": 50, "detail": 200}[taken] / 255)
    assert (target[:, 32] == 1).sum() == pytest.approx(20 * scale, abs=1.5)


def test_scales_are_drawn_from_the_whole_range():
    crop = T.SegmentationPresetAnyCamera(None, 64, mean=(0.5,) * 3, std=(0.1,) * 3).transforms[0]
    torch.manual_seed(0)
    drawn = np.log([crop.draw_scale() for _ in range(2000)])
    assert np.exp(drawn.min()) == pytest.approx(0.6, rel=0.01) and np.exp(drawn.max()) == pytest.approx(1.6, rel=0.01)
    assert drawn.mean() == pytest.approx((np.log(0.6) + np.log(1.6)) / 2, abs=0.02)


def test_center_crop():
    image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6))
    cropped, _ = T.CenterCrop(2)(image, image)
    assert np.array_equal(np.array(cropped), [[14, 15], [20, 21]])
    _, padded = T.CenterCrop(8)(image, image)
    assert (np.array(padded) == 255).sum() == 64 - 36


@pytest.mark.parametrize("kind", ["pil", "tv_tensors"])
def test_evaluation_preset_by_hand(kind):
    image, target = pair(kind=kind)
    mean, std = (0.709, 0.381, 0.224), (0.127, 0.079, 0.043)
    tensor, label = T.get_transform(train=False, mean=mean, std=std)(image, target)
    pixels, values = to_arrays(image, target)
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    assert type(tensor) is torch.Tensor and type(label) is torch.Tensor
    assert tensor.dtype == torch.float32 and label.dtype == torch.int64
    assert np.allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert np.array_equal(label.numpy(), values)


def test_training_preset_is_the_tutorials():
    preset = T.get_transform(train=True, mean=(0.5,) * 3, std=(0.5,) * 3)
    steps = preset.transforms
    assert [type(step) for step in steps] == [
        T.RandomResize,
        T.RandomHorizontalFlip,
        T.RandomVerticalFlip,
        T.RandomCrop,
        T.ToTensor,
        T.Normalize,
    ]
    assert (steps[0].min_size, steps[0].max_size) == (282, 678)
    assert (steps[1].p, steps[2].p, steps[3].size) == (0.5, 0.5, 480)
    image, label = preset(*pair(584, 565))
    assert image.shape == (3, 480, 480) and label.shape == (480, 480)
    assert set(label.unique().tolist()) <= {0, 1, 255}


def test_any_camera_is_a_crop_of_the_photograph_and_its_label():
    """Whatever is done to light, colours and shape, the label stays on what it labels."""
    rng = np.random.default_rng(0)
    photograph = rng.integers(90, 110, (300, 300, 3)).astype(np.uint8)
    label = np.zeros((300, 300), np.uint8)
    for line in range(20, 300, 40):
        label[line : line + 8] = 1
    photograph[label == 1] //= 2
    preset = T.SegmentationPresetAnyCamera(None, 128, mean=(0.36,) * 3, std=(0.08,) * 3)
    seen, different = [], []
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = preset(Image.fromarray(photograph), Image.fromarray(label))
        assert image.shape == (3, 128, 128) and image.dtype == torch.float32 and image.isfinite().all()
        assert target.shape == (128, 128) and set(target.unique().tolist()) <= {0, 1, 255}
        seen.append((image[:, target == 0].mean() - image[:, target == 1].mean()).item())
        different.append(image[:, target == 0].mean().item())
        torch.manual_seed(seed)
        again, _ = preset(Image.fromarray(photograph), Image.fromarray(label))
        assert torch.equal(image, again)
    assert min(seen) > 1  # standard deviations: vessels stay darker
    assert np.std(different) > 0.1 and np.std(seen) > 0.1  # the light and the contrast vary


def test_another_camera_has_another_gamma_and_some_jpeg_traces(monkeypatch):
    bends, qualities = [], []
    bent, compressed = T._bent, T._compressed
    monkeypatch.setattr(T, "_bent", lambda image, bend: bends.append(bend) or bent(image, bend))
    monkeypatch.setattr(
        T, "_compressed", lambda image, quality: qualities.append(quality) or compressed(image, quality)
    )
    camera = T.OtherCamera((0.5,) * 3, (0.1,) * 3)
    torch.manual_seed(0)
    for _ in range(60):
        camera(torch.rand(3, 32, 32), torch.zeros(32, 32))
    bends = torch.stack(bends)
    assert bends.shape == (60, 3, 1, 1) and bends.abs().max() <= T.LARGEST_BEND and 0.04 < bends.std() < 0.07
    assert 9 <= len(qualities) <= 27 and 20 <= min(qualities) < 40 and 70 < max(qualities) < 90


def test_jpeg_traces():
    """Blocks of eight pixels, coarser at a lower quality; what is beyond the levels of a file is cut off."""
    torch.manual_seed(0)
    image = (0.5 + 0.1 * torch.randn(3, 64, 64)).clamp(0, 1)
    fine, coarse = T._compressed(image, 95), T._compressed(image, 20)
    assert fine.shape == image.shape and fine.dtype == torch.float32
    assert (fine - image).square().mean() < (coarse - image).square().mean() < image.var()
    step = (coarse[:, :, 1:] - coarse[:, :, :-1]).abs().mean(dim=(0, 1))  # [63]
    inner = torch.arange(1, 64) % 8 != 0
    assert step[~inner].mean() > 1.1 * step[inner].mean()
    bright = T._compressed(torch.full((3, 16, 16), 1.2), 90)
    torch.testing.assert_close(bright, torch.ones_like(bright), atol=0.01, rtol=0)


@pytest.mark.parametrize("bend", [-T.LARGEST_BEND, T.LARGEST_BEND])
def test_another_gamma_keeps_the_order_of_levels(bend):
    levels = torch.linspace(-6, 6, 200)
    bent = T._bent(levels, torch.tensor(bend))
    assert bent.diff().min() > 0 and (bent - levels).abs().max() > 1
    torch.testing.assert_close(T._bent(torch.tensor([-1.0, 1.0]), torch.tensor(bend)), torch.tensor([-1.0, 1.0]))


def test_arrays_become_tensors_as_pictures_do():
    image, label = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8), np.eye(6, 5, dtype=np.uint8)
    pictures = T.ToTensor()(Image.fromarray(image), Image.fromarray(label))
    for found, expected in zip(T.ToTensor()(image, label), pictures, strict=True):
        assert torch.equal(found, expected)
