import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as F

from my_dataset import DRIVE_MEAN, DRIVE_STD
from src import create_model
from src import segment as segment_module
from src.colours import Normalization, prepare
from src.segment import (
    ONE_SIZE,
    Votes,
    logits_in_tiles,
    logits_of_size,
    match_scale,
    normalise,
    prepare_at_scale,
    probabilities_in_parts,
    resize_probabilities,
    segment,
    views,
    widening,
)
from train_utils.scoring.measure import _mean_over_views
from transforms import get_transform


class Pixelwise(nn.Module):
    """A model that looks at each pixel alone, and remembers the shapes that it was given."""

    def __init__(self, classes=2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 3, 1, 1, generator=generator))
        self.shapes = []
        self.eval()

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return {"out": nn.functional.conv2d(x, self.weight)}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = create_model(base_c=4).eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    return model


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    return np.array(Image.fromarray(noise(4, 5)).resize((width, height), Image.Resampling.BICUBIC))


def run(model, photograph, **options):
    return segment(model, photograph, DRIVE_MEAN, DRIVE_STD, **options)


def run_at_scale(model, photograph, scale, **options):
    small = prepare_at_scale(photograph, np.ones(photograph.shape[:2], bool), scale, None)
    return resize_probabilities(run(model, small, **options)[None], photograph.shape[:2])[0]


def test_normalise_is_the_evaluation_preset():
    photograph = noise(50, 37)
    label = Image.fromarray(np.zeros((50, 37), np.uint8))
    expected, _ = get_transform(False, DRIVE_MEAN, DRIVE_STD)(Image.fromarray(photograph), label)
    assert torch.equal(normalise(photograph, DRIVE_MEAN, DRIVE_STD), expected)


def test_plain_prediction_is_the_models(unet):
    photograph = noise(61, 90)
    logits = unet(normalise(photograph, DRIVE_MEAN, DRIVE_STD)[None])["out"][0].detach()
    vessels = run(unet, photograph)
    assert vessels.shape == (1, 61, 90) and vessels.dtype == torch.float64
    torch.testing.assert_close(vessels[0], logits.softmax(0)[1].double())
    assert torch.equal(vessels[0] > 0.5, logits.argmax(0) == 1)


def test_half_separates_as_argmax_does_to_the_last_bit():
    base = torch.linspace(-30, 30, 40 * 40).reshape(40, 40)
    above, below = (base.nextafter(torch.tensor(float(side))) for side in (99, -99))
    kind = torch.arange(40 * 40).reshape(40, 40) % 3

    class Close(Pixelwise):
        def forward(self, x):
            return {"out": torch.stack([base, base.where(kind == 0, above.where(kind == 1, below))])[None]}

    logits = Close()(torch.zeros(1, 3, 40, 40))["out"][0]
    expected = logits.argmax(0) == 1
    assert torch.equal(expected, kind == 1)
    assert torch.equal(run(Close(), noise(40, 40))[0] > 0.5, expected)


def test_more_classes():
    model = Pixelwise(classes=4)
    probabilities = run(model, noise(20, 30))
    logits = model(normalise(noise(20, 30), DRIVE_MEAN, DRIVE_STD)[None])["out"][0].detach()
    torch.testing.assert_close(probabilities, logits.double().softmax(0)[1:])


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (15, 40), (16, 16)])
def test_small_pictures(unet, size):
    probabilities = run(unet, noise(*size))
    assert probabilities.shape == (1, *size) and probabilities.isfinite().all()
    assert run_at_scale(unet, noise(*size), 0.3, flips=True, tile=64).shape == (1, *size)


def test_only_in_eval_mode():
    with pytest.raises(AssertionError):
        run(create_model(base_c=4).train(), noise(32, 32))


# ---- scale


def test_match_scale():
    assert match_scale(1080, 540) == 0.5
    assert match_scale(270, 540) == 2
    assert all(match_scale(diameter, 540) == 1 for diameter in (520, 536, 540, 541, 560))
    assert match_scale(600, 540) == 0.9
    assert match_scale(10, 540) == 4  # no further
    assert match_scale(0, 540) == 1  # no field of view


def test_photographs_of_far_more_pixels_are_seen_larger():
    for diameter in (270, 540, 700, 800):
        assert match_scale(diameter, 540, 1.0) == match_scale(diameter, 540)
    assert match_scale(540 * 1.5 * 4, 540, 1.0) == pytest.approx(2 / 6)  # of 1.5 times the pixels, enlarged twice
    scales = [match_scale(diameter, 540, 1.0) for diameter in (820, 1000, 2000, 4000)]
    assert scales == sorted(scales, reverse=True)  # and never by more than before
    assert match_scale(3240, 720, 720 / 3240) == 720 / 3240  # a model of such photographs
    assert match_scale(3240, 720, None) == 720 / 3240  # the tutorial's


@pytest.mark.parametrize("scale", [0.5, 0.37, 2.0])
def test_scale(scale):
    model, photograph = Pixelwise(), smooth(120, 150)
    probabilities = run_at_scale(model, photograph, scale)
    assert probabilities.shape == (1, 120, 150)
    assert model.shapes == [(1, 3, round(120 * scale), round(150 * scale))]
    torch.testing.assert_close(probabilities, run(model, photograph), atol=0.06, rtol=0)  # back in its place


def test_scale_resizes_the_photograph_as_training_does_and_the_probabilities_back(unet):
    photograph = noise(64, 96)
    small = F.resize(Image.fromarray(photograph), [32, 48], F.InterpolationMode.BILINEAR)
    logits = unet(normalise(np.array(small), DRIVE_MEAN, DRIVE_STD)[None])["out"].detach()
    expected = nn.functional.interpolate(logits.softmax(1)[:, 1:], (64, 96), mode="bilinear")[0]
    torch.testing.assert_close(run_at_scale(unet, photograph, 0.5), expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(600, 70), (256, 64), (31, 50), (513, 40)])
def test_large_photographs_get_their_probabilities_in_parts(monkeypatch, size):
    small = torch.rand(2, 31, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = resize_probabilities(small[None], size)[0]
    ((rows, part),) = probabilities_in_parts(small, size)
    assert rows == slice(0, size[0]) and torch.equal(part, whole)
    monkeypatch.setattr(segment_module, "LARGE", size[0] * size[1] - 1)
    parts = list(probabilities_in_parts(small, size))
    assert len(parts) == math.ceil(size[0] / 256)
    for rows, part in parts:
        torch.testing.assert_close(part, whole[:, rows], atol=1e-12, rtol=0)
    assert sum(part.shape[1] for _, part in parts) == size[0]
    ((_, enlarged),) = probabilities_in_parts(small, (30, size[1]))  # the model saw more pixels than there are
    assert torch.equal(enlarged, resize_probabilities(small[None], (30, size[1]))[0])


# ---- tiles, flips, batches


@pytest.mark.parametrize("length", [64, 95, 96, 97, 200, 513, 1000])
@pytest.mark.parametrize("tile", [64, 100, 512])
def test_tiles_cover_a_side_and_share_every_pixel(length, tile):
    spans = segment_module._overlapping_spans(length, tile)
    total = torch.zeros(length, dtype=torch.float64)
    for span, share in spans:
        assert span.start % 32 == 0 and span.stop - span.start == len(share) < tile + 32
        assert (share >= 0).all()
        total[span] += share
    torch.testing.assert_close(total, torch.ones_like(total))
    for (before, _), (after, share) in zip(spans, spans[1:], strict=False):
        assert before.stop - after.start >= tile // 4
        assert share[0] < 0.01  # what a tile says at its rim hardly counts
    if length <= tile:
        assert len(spans) == 1


@pytest.mark.parametrize("size", [(64, 64), (100, 333), (333, 70), (129, 127)])
@pytest.mark.parametrize("options", [{"tile": 64}, {"tile": 64, "batch_size": 7, "flips": True}, {"tile": 90}])
def test_tiles_are_put_together_in_their_places(size, options):
    model, photograph = Pixelwise(classes=3), noise(*size)
    torch.testing.assert_close(run(model, photograph, **options), run(model, photograph), atol=1e-6, rtol=0)


def test_tiles_hardly_change_the_prediction(unet):
    photograph = smooth(300, 340)
    whole = run(unet, photograph)
    difference = (run(unet, photograph, tile=160) - whole).abs()
    spread = whole.max() - whole.min()
    assert 0 < difference.max() < 0.25 * spread and difference.mean() < 0.02 * spread


def test_flips_are_averaged(unet):
    photograph = noise(48, 60)
    plain, left_right, top_bottom, both = (
        np.ascontiguousarray(photograph[::rows, ::columns]) for rows, columns in ((1, 1), (1, -1), (-1, 1), (-1, -1))
    )
    expected = (
        run(unet, plain)
        + run(unet, left_right).flip(-1)
        + run(unet, top_bottom).flip(-2)
        + run(unet, both).flip(-1, -2)
    ) / 4
    torch.testing.assert_close(run(unet, photograph, flips=True), expected)
    assert not torch.allclose(expected, run(unet, photograph))
    torch.testing.assert_close(run(unet, photograph, flips=True, batch_size=3), expected, atol=1e-6, rtol=0)
    two = (run(unet, plain) + run(unet, left_right).flip(-1)) / 2
    for options in ({}, {"batch_size": 2}):
        votes = Votes()
        found = run(unet, photograph, flips=True, scales=(1, 1), votes=votes, **options)
        torch.testing.assert_close(found, two, atol=1e-6, rtol=0)
        assert votes.views == 2 and not votes.of_sizes


def test_views():
    assert views([1.0]) == views([0.7]) == [(1.0, ()), (1.0, (-1,)), (1.0, (-2,)), (1.0, (-2, -1))]
    assert views([0.5, 1.0, 2.0]) == [(0.25, ()), (0.5, (-1,)), (1.0, (-2,))]
    assert [flip for _, flip in views([1.0] * 6)] == [(), (-1,), (-2,), (-2, -1), (), (-1,)]


@pytest.mark.parametrize("options", [{}, {"tile": 64}])
def test_sizes_are_averaged(unet, options):
    photograph = smooth(72, 90)
    image = normalise(photograph, DRIVE_MEAN, DRIVE_STD)[None]
    expected, votes, count = 0, Votes(), 0
    with torch.inference_mode():
        for share, flip in ((0.5, ()), (0.75, (-1,)), (1.0, (-2,))):
            small = image if share == 1 else F.resize(image, [int(72 * share), round(90 * share)])
            vessels = unet(small.flip(flip))["out"].double().softmax(dim=1)[:, 1:].flip(flip)
            vessels = F.resize(vessels, [72, 90])[0]
            expected, count = expected + vessels / 3, count + (vessels[0] > 0.5)
    found = run(unet, photograph, flips=True, scales=(0.7, 1.05, 1.4), votes=votes, **options)
    tolerance = 0.05 if options else 1e-5  # tiles see less around them
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert votes.views == 3 and (votes.count != count).float().mean() < (0.05 if options else 1e-3)
    assert torch.equal(run(unet, photograph, scales=(0.7, 1.4)), run(unet, photograph))  # without flips one view
    assert torch.equal(run(unet, photograph, flips=True, scales=(1.4,)), run(unet, photograph, flips=True))


def test_batches():
    model = Pixelwise()
    run(model, noise(64, 64))
    run(model, noise(64, 64), flips=True, batch_size=3)
    assert [shape[0] for shape in model.shapes] == [1, 3, 1]
    model.shapes.clear()
    run(model, noise(224, 224), tile=128, batch_size=2)  # 2 x 2 tiles of 128 pixels, at 0 and 96
    assert model.shapes == [(2, 3, 128, 128)] * 2


def test_large_photographs_are_cut_into_tiles_and_others_are_not():
    def tile(height, width, base_c, batch_size=1):
        return segment_module._tile_for_memory(create_model(base_c=base_c), height, width, 1, batch_size)

    assert tile(584, 565, 32) == 584 and tile(960, 999, 32) == 999
    assert tile(584, 565, 32, batch_size=64) == 584  # there is but one picture to put into the batch
    assert tile(2336, 3504, 8) < 3504
    for base_c, batch_size in ((32, 1), (64, 1), (32, 4)):
        side = tile(2336, 3504, base_c, batch_size)
        assert 200 < side < 1100 and side % 32 == 0
        assert side**2 * base_c * batch_size * 43 <= 2**30


def test_memory_decides_on_tiles(monkeypatch):
    model, photograph = Pixelwise(), noise(300, 300)
    monkeypatch.setattr(segment_module, "LARGEST_WHOLE", 300 * 300 * 2 * 43)
    run(model, photograph)
    assert model.shapes == [(1, 3, 300, 300)]
    monkeypatch.setattr(segment_module, "LARGEST_WHOLE", 300 * 300 * 2 * 43 - 1)
    monkeypatch.setattr(segment_module, "LARGEST_TILES", 160 * 160 * 2 * 43)
    tiled = run(model, photograph)
    assert model.shapes[1:] and all(max(shape) < 192 for shape in model.shapes[1:])
    torch.testing.assert_close(tiled, run(model, photograph, tile=300))
    monkeypatch.setattr(segment_module, "LARGEST_TILES", 1)
    model.shapes.clear()
    run(model, photograph)
    assert min(min(shape[2:]) for shape in model.shapes) >= 128


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_images_to_score_are_cut_where_photographs_are(monkeypatch, amp_dtype):
    model, photograph = Pixelwise(classes=3), noise(300, 300)
    images = torch.stack([normalise(photograph, DRIVE_MEAN, DRIVE_STD)] * 2)
    monkeypatch.setattr(segment_module, "LARGEST_WHOLE", 300 * 300 * 3 * 43)
    whole = logits_in_tiles(model, images, amp_dtype)
    assert model.shapes == [(2, 3, 300, 300)]
    with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
        assert torch.equal(whole, model(images)["out"])
    monkeypatch.setattr(segment_module, "LARGEST_WHOLE", 300 * 300 * 3 * 43 - 1)
    monkeypatch.setattr(segment_module, "LARGEST_TILES", 160 * 160 * 3 * 43)
    model.shapes.clear()
    tiled = logits_in_tiles(model, images, amp_dtype)
    assert len(model.shapes) == 2 * 3 * 3 and all(shape[0] == 1 and max(shape) < 192 for shape in model.shapes)
    assert tiled.dtype == torch.float32
    torch.testing.assert_close(tiled.softmax(dim=1), whole.float().softmax(dim=1), atol=1e-6, rtol=1e-4)
    expected = run(model, photograph, amp_dtype=amp_dtype)  # in the same tiles
    torch.testing.assert_close(tiled.softmax(dim=1)[0, 1:].double(), expected, atol=1e-6, rtol=1e-4)


class Echo(nn.Module):
    def forward(self, image):
        return {"out": image}


class OnMPS(torch.Tensor):
    """A tensor that says that it is on MPS, and has no float64 there."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_float64_where_a_device_has_none(monkeypatch):
    def to(tensor, *arguments):
        assert arguments == (OnMPS.device,) and tensor.dtype == torch.float32
        return tensor.as_subclass(OnMPS)

    logits = torch.randn(1, 2, 20, 24, generator=torch.Generator().manual_seed(0))
    expected = logits_of_size(logits, (40, 48))
    monkeypatch.setattr(torch.Tensor, "to", to)
    found = logits_of_size(logits.as_subclass(OnMPS), (40, 48))
    assert isinstance(found, OnMPS) and torch.equal(found.cpu(), expected.float())
    flipped = _mean_over_views(Echo(), logits, ONE_SIZE)
    found = _mean_over_views(Echo(), logits.as_subclass(OnMPS), ONE_SIZE)
    assert isinstance(found, OnMPS) and torch.equal(found.cpu(), flipped.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_on_a_gpu(unet, amp_dtype):
    photograph = smooth(300, 340)
    expected = run(unet, photograph, tile=160)
    on_gpu = create_model(base_c=4).cuda().eval()
    on_gpu.load_state_dict(unet.state_dict())
    found = run(on_gpu, photograph, tile=160, batch_size=2, amp_dtype=amp_dtype)
    assert found.device.type == "cpu" and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=0.02 if amp_dtype else 0.002, rtol=0)


def test_vessels_of_photographs_that_are_shrunk_more():
    """The log-odds of the threshold grow with the logarithm of the shrinking, never below those of the training."""
    assert widening(1.0, None) == widening(0.2, None) == 0  # weights of earlier versions, and the tutorial's
    assert widening(1.0, 1.0) == widening(0.96, 1.0) == widening(2.0, 1.0) == widening(0.3, 0.3) == 0
    assert widening(0.5, 1.0) == pytest.approx(1.1 * math.log(2))
    assert widening(0.15, 0.3) == pytest.approx(widening(0.5, 1.0))


@pytest.mark.parametrize("scale", [1.3, 0.6, 0.23, 0.1])
def test_a_photograph_is_prepared_at_the_working_scale(scale):
    """As if it had been prepared in its own size; a coarse pattern shows a shift of half a pixel."""
    rows, columns = np.mgrid[:601, :499]
    wave = 128 + 60 * np.sin(rows / 30) * np.cos(columns / 22)
    photograph = np.stack([wave, wave * 0.7, wave * 0.4], axis=-1).astype(np.uint8)
    inside = (rows - 300) ** 2 + (columns - 249) ** 2 < 240**2
    normalization = Normalization("local", DRIVE_MEAN, DRIVE_STD)
    expected = prepare_at_scale(prepare(photograph, inside, normalization), inside, scale, None)
    found = prepare_at_scale(photograph, inside, scale, lambda *both: prepare(*both, normalization))
    assert found.shape == expected.shape
    inner = prepare_at_scale(np.repeat(inside[..., None] * np.uint8(255), 3, axis=2), inside, scale, None) == 255
    difference = np.abs(found.astype(int) - expected)[inner]
    if scale > 1:
        assert difference.max() == 0
    assert np.percentile(difference, 99) <= 5 and difference.mean() < 1  # at the rim it is more
    shifted = np.abs(np.roll(found, 1, axis=0).astype(int) - expected)[inner].mean()
    assert difference.mean() < shifted / 4


@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (2, 2)])
def test_networks_that_share_the_threads_run_at_once(monkeypatch, threads, at_once):
    """Of these threads each pass has one."""
    both, most = threading.Barrier(2), []

    class Waiting(Pixelwise):
        def forward(self, x):
            try:
                both.wait(timeout=5 if at_once == 2 else 0.5)
                most.append(2)
            except threading.BrokenBarrierError:
                most.append(1)
            return super().forward(x)

    monkeypatch.setattr(segment_module, "_THREADS", threads)
    with ThreadPoolExecutor(2) as pool:
        passes = [pool.submit(segment, Waiting(), noise(20, 20), DRIVE_MEAN, DRIVE_STD) for _ in range(2)]
        assert torch.equal(passes[0].result(), passes[1].result())
    assert most == [at_once] * 2
