"""How well `Segmenter.working_scale` does by close-ups: squares that are cut out of labelled photographs.

    python -m tests.close_up_study --weights pretrained/unet_fundus.pth --data-path ARIA

Of each photograph that the weights were not trained on, squares of three shares of the field of view's diameter are
cut out, at places that are drawn. Where the program finds a border in one, it is left out. The table has the mean Dice
of the others at the scale of a whole field of view, at the one that is chosen, and at that of the whole photograph,
which a close-up does not tell; by the mean over flips. The last column is the chosen scale with the views of the
weights, as predict.py does it. It takes half an hour for 48 photographs, on one core.
"""

import argparse
import zlib

import numpy as np
import torch

from my_dataset import read_field_of_view
from src import Segmenter
from src.dataset_files import photographs_to_score
from src.field_of_view import field_of_view_diameter, find_field_of_view
from src.masks import read_binary_mask
from src.photograph import read_photograph
from src.segment import match_scale
from src.weights import load_model

SHARES = (0.3, 0.45, 0.65)
COLUMNS = ("whole", "chosen", "known", "predict.py")


def cut_out(inside, share, rng):
    """Rows and columns of a square inside a disc, bool [H, W]; its side is a share of the disc's diameter."""
    side = round(field_of_view_diameter(inside) * share)
    room = field_of_view_diameter(inside) / 2 - side / np.sqrt(2)  # for the square's centre around the disc's
    angle, radius = rng.uniform(0, 2 * np.pi), room * np.sqrt(rng.uniform())
    centre = [np.flatnonzero(inside.any(axis=axis)).mean() for axis in (1, 0)]
    starts = [
        int(np.clip(round(middle + radius * step - side / 2), 0, max(size - side, 0)))
        for middle, step, size in zip(centre, (np.sin(angle), np.cos(angle)), inside.shape, strict=True)
    ]
    return tuple(slice(start, start + side) for start in starts)


def dice_of(mask, truth):
    return 2 * np.count_nonzero(mask & truth) / max(mask.sum() + truth.sum(), 1)


def dices(photograph, truth, known, segmenter):
    """The Dice of a close-up, in the order of COLUMNS; `known` is the scale of the photograph it is from."""
    retina = find_field_of_view(photograph)
    checkpoint = segmenter.checkpoint
    whole = match_scale(field_of_view_diameter(retina), checkpoint["fov_diameter"], checkpoint.get("trained_scale"))
    chosen = segmenter.working_scale(photograph, retina)
    masks = [segmenter(photograph, scale=scale, flips=True).vessels for scale in (whole, chosen, known)]
    return [dice_of(mask, truth) for mask in (*masks, segmenter(photograph).vessels)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-path", required=True, help="a data set with labels")
    args = parser.parse_args()
    segmenter = Segmenter(*load_model(args.weights, torch.device("cpu")))
    trained_on = segmenter.checkpoint.get("trained_on", ())
    found = {share: [] for share in SHARES}
    for item in photographs_to_score(args.data_path):
        if item.digest in trained_on:
            continue
        photograph, truth = read_photograph(item.photograph), read_binary_mask(item.label)
        inside = read_field_of_view(item, photograph)
        known = segmenter.working_scale(photograph, inside)
        for share in SHARES:
            part = cut_out(inside, share, np.random.default_rng(zlib.crc32(f"{item.photograph.name} {share}".encode())))
            if find_field_of_view(photograph[part]).all():
                found[share].append(dices(photograph[part], truth[part], known, segmenter))
    print(f"{'share':>5}  squares  " + "".join(f"{name:>12}" for name in COLUMNS) + "  chosen - whole, standard error")
    for share, rows in found.items():
        if len(rows) < 2:
            continue
        rows = np.array(rows)
        gain = rows[:, 1] - rows[:, 0]
        print(
            f"{share:5}  {len(rows):7}  "
            + "".join(f"{value:12.3f}" for value in rows.mean(axis=0))
            + f"  {gain.mean():+.3f}, {gain.std(ddof=1) / np.sqrt(len(gain)):.3f}"
        )


if __name__ == "__main__":
    main()
