"""How well `src/reliability.py` tells the Dice of a mask, and where its constants come from.

    python -m tests.reliability_study --weights fold1/best_model.pth --data-path DATA DATA/HRF --check DATA/ARIA

The photographs of --data-path that the weights were not trained on, as they are and degraded in seven ways, fit the
formula. Each photograph's own Dice is predicted by the formula of the others. --check names data sets that are only
checked: as they are, and each photograph degraded in one way. Large photographs are shrunk to 1440 pixels across the
field of view first. It takes ten minutes for 17 photographs to fit and 48 to check, on one core.
"""

import argparse
import functools
import io
import zlib

import numpy as np
import torch
from PIL import Image, ImageFilter

from my_dataset import read_field_of_view
from src.colours import prepare
from src.dataset_files import find_parts, pair
from src.field_of_view import field_of_view_diameter, find_field_of_view
from src.inference import for_inference
from src.masks import read_binary_mask
from src.photograph import read_photograph
from src.reliability import (
    brightness,
    expected_dice,
    reasons_for_doubt,
    sharpness,
    signals,
)
from src.segment import ONE_SIZE, Votes, narrowed, prepare_at_scale, resize_probabilities, segment, widening
from src.segmenter import Segmenter, classify
from src.weights import load_model, normalization_of

LARGEST_DIAMETER = 1440
DEGRADATIONS = ("blur", "noise", "dark", "low contrast", "jpeg", "vignette", "shrunk")


def degrade(photograph, kind, diameter, rng):
    """A poorer copy of a photograph, uint8 [H, W, 3]; how poor is drawn."""
    levels, image, strength = photograph.astype(np.float32), Image.fromarray(photograph), rng.uniform()
    if kind == "blur":
        return np.array(image.filter(ImageFilter.GaussianBlur((1 + 4 * strength) * diameter / 540)))
    if kind == "noise":
        levels += rng.standard_normal(levels.shape) * (10 + 50 * strength)
    elif kind == "dark":
        levels = 255 * (levels / 255) ** (1.5 + 1.5 * strength) * (0.6 - 0.4 * strength)
    elif kind == "low contrast":
        mean = levels.mean(axis=(0, 1))
        inside = levels.max(axis=2, keepdims=True) > 20
        levels = np.where(inside, mean + (levels - mean) * (0.4 - 0.33 * strength), levels)
    elif kind == "vignette":
        height, width = levels.shape[:2]
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:height, :width] - np.array([height, width])[:, None, None] / 2
        offset = 0.2 * diameter * np.array([np.sin(angle), np.cos(angle)])
        radius = np.hypot(y - offset[0], x - offset[1]) / (diameter / 2)
        levels *= np.exp(-((radius / (1.1 - 0.7 * strength)) ** 2))[..., None]
    else:
        factor = (3 + 3 * strength) * max(1, diameter / 540) if kind == "shrunk" else max(1, diameter / 720)
        small = image.resize([max(1, round(side / factor)) for side in image.size], Image.Resampling.BILINEAR)
        if kind == "jpeg":
            file = io.BytesIO()
            small.save(file, "JPEG", quality=int(3 + 9 * strength))
            small = Image.open(file)
        return np.array(small.resize(image.size, Image.Resampling.BICUBIC))
    return levels.round().clip(0, 255).astype(np.uint8)


def read(item):
    """A labelled photograph with its vessels, and the field of view that Dice is taken in."""
    photograph = read_photograph(item.photograph)
    vessels, inside = read_binary_mask(item.label), read_field_of_view(item, photograph)
    shrink = LARGEST_DIAMETER / field_of_view_diameter(inside)
    if shrink < 1:
        size = [round(side * shrink) for side in reversed(inside.shape)]

        def small(picture):
            return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))

        vessels, inside = (small(mask.astype(np.uint8) * 255) > 127 for mask in (vessels, inside))
        photograph = small(photograph)
    return photograph, vessels, inside


def dice_of(mask, truth, inside):
    return 2 * np.count_nonzero(mask & truth & inside) / max((mask & inside).sum() + (truth & inside).sum(), 1)


def measure(photograph, truth, inside, model, checkpoint):
    """The true Dice, and all that the formula and the warnings use."""
    retina, votes = find_field_of_view(photograph), Votes()
    trained_scale = checkpoint.get("trained_scale")
    scale = Segmenter(model, checkpoint).working_scale(photograph, retina)
    normalised = functools.partial(prepare, normalization=normalization_of(checkpoint))
    scales = checkpoint.get("tta_scales", ONE_SIZE)
    prepared = prepare_at_scale(photograph, retina, scale * max(scales), normalised)  # as predict.py does
    mean, std = checkpoint["mean"], checkpoint["std"]
    probabilities = segment(model, prepared, mean, std, flips=True, scales=scales, votes=votes)
    probabilities = resize_probabilities(probabilities[None], photograph.shape[:2])[0]
    mask = (classify(narrowed(probabilities, widening(scale, trained_scale)), 0.5) > 0) & retina
    share = mask.sum() / retina.sum()
    reliability = expected_dice(mask, retina, votes)
    return {
        "fit_row": (dice_of(mask, truth, inside), 1.0, *signals(mask, retina, votes)),
        "limits": (brightness(photograph, retina), sharpness(photograph, retina), share, reliability),
        "warnings": reasons_for_doubt(photograph, retina, share, reliability),
    }


def rank_correlation(first, second):
    """Spearman's."""
    ranks = []
    for values in (first, second):
        _, places = np.unique(values, return_inverse=True)
        order = np.argsort(np.argsort(values, kind="stable"))
        ranks.append((np.bincount(places, order) / np.bincount(places))[places])
    return np.corrcoef(*ranks)[0, 1]


def solve(rows):
    """The constant and the weights of least squares; rows [n, 4] as `measure` gives them."""
    return np.linalg.lstsq(rows[:, 1:], rows[:, 0], rcond=None)[0]


def report(rows):
    fitted = np.array([row["fit"] for row in rows])
    names = np.array([row["name"] for row in rows])
    cameras = np.array([row["camera"] for row in rows])
    whole = np.array([row["kind"] == "as it is" for row in rows])
    values = np.array([row["fit_row"] for row in rows])
    weights = solve(values[fitted])
    expected = values[:, 1:] @ weights
    for name in set(names[fitted]):
        expected[names == name] = values[names == name, 1:] @ solve(values[fitted & (names != name)])
    expected = expected.clip(0, 1)
    print(f"\nconstant {weights[0]:.3f}, weights {weights[1]:.3f} and {weights[2]:.3f}")
    for degraded in (False, True):
        for camera in ("all", *dict.fromkeys(cameras)):
            chosen = (whole | degraded) & ((cameras == camera) | (camera == "all"))
            dice, error = values[chosen, 0], expected[chosen] - values[chosen, 0]
            print(
                f"  {'with degraded' if degraded else 'as they are':14} {camera:8} {chosen.sum():4} photographs: "
                f"rank correlation {rank_correlation(expected[chosen], dice):5.2f}, "
                f"of the agreement alone {rank_correlation(values[chosen, 2], dice):5.2f}, "
                f"mean error {error.mean():6.3f}, absolute {np.abs(error).mean():.3f}, Dice {dice.mean():.3f}"
            )
    print("\nwarnings; least and largest brightness, sharpness, vessel share and reliability (of src/reliability.py)")
    for kind in ("as it is", *DEGRADATIONS):
        for camera in dict.fromkeys(cameras):
            chosen = [row for row in rows if row["kind"] == kind and row["camera"] == camera]
            reasons = [reason for row in chosen for reason in row["warnings"]]
            counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
            limits = np.array([row["limits"] for row in chosen])
            spans = ", ".join(f"{low:.3g} {high:.3g}" for low, high in zip(limits.min(0), limits.max(0), strict=True))
            print(f"  {kind:12} {camera:8} {len(chosen):3}: {spans}; {counts or 'none'}")


def main(args):
    torch.set_num_threads(1)
    model, checkpoint = load_model(args.weights, torch.device("cpu"))
    model, rows = for_inference(model, amp=False), []
    for root, fit in [(root, True) for root in args.data_path] + [(root, False) for root in args.check]:
        items = [item for part, folder in find_parts(root).items() for item in pair(part, folder)]
        items = [item for item in items if item.digest not in checkpoint["trained_on"]]
        for number, item in enumerate(items):
            photograph, truth, inside = read(item)
            diameter = field_of_view_diameter(inside)
            kinds = DEGRADATIONS if fit else [DEGRADATIONS[number % len(DEGRADATIONS)]]
            for kind in ("as it is", *kinds):
                rng = np.random.default_rng(zlib.crc32(f"{item.photograph.stem}{kind}".encode()))
                poorer = photograph if kind == "as it is" else degrade(photograph, kind, diameter, rng)
                row = {"camera": item.root.name, "name": str(item.photograph), "kind": kind, "fit": fit}
                rows.append(row | measure(poorer, truth, inside, model, checkpoint))
            print(
                f"{item.photograph.name}: " + ", ".join(f"{row['fit_row'][0]:.2f}" for row in rows[-len(kinds) - 1 :])
            )
    report(rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-path", nargs="+", required=True)
    parser.add_argument("--check", nargs="+", default=[])
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
