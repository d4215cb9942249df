"""How far to trust the mask of a photograph: the Dice that is to be expected of it, and plain reasons for doubt.

Two things tell a good mask from a bad one. First, the views of the photograph (its four flips, or several sizes) agree
on it. Second, it has many edges, as fine vessels have: a poor photograph loses the fine vessels first.

Measured with `tests/reliability_study.py` and a model of four fifths of DRIVE and HRF. The formula was fitted to 17
photographs of these that it was not trained on, and to copies degraded in seven ways. ARIA is 48 photographs
of a camera that neither the model nor the constants were fitted to, and one degraded copy of each. Its figures were in
view when the two parts were chosen from some fifty. Spearman's rank correlation of the expected Dice (by the formula of
the other photographs) with the true one:

                               all   DRIVE   HRF   ARIA
    photographs as they are   0.84   0.26   0.00   0.82
    with degraded copies      0.92   0.94   0.90   0.92
    agreement alone: first    0.86   0.33   0.27   0.79
    agreement alone: second   0.90   0.92   0.87   0.90

The expected Dice is off by 0.033 on average in the first row, by 0.058 in the second. The eight and nine good
photographs of DRIVE and HRF hardly differ, so their order is chance. All this was measured with one model of 8 channels
and 720 pixels; other models were not tried.

That was with flips. Three sizes agree less, so they have constants of their own (`OF_SIZES`): fitted in the same way to
the 13 photographs of fold 1/5 by a model of the recipe of `pretrained` (16 channels), with their copies. The rank
correlation over 13 and ARIA's 48 as they are is 0.74, over ARIA's alone 0.69 (of the agreement alone 0.42 and 0.52),
with degraded copies 0.88 and 0.87. ARIA's is off by 0.032 on average; that of HRF's nine is too low by 0.065.

Two flips (as of the recipe best) share the constants of four, because the agreement is a mean over pairs. That was not
fitted apart.

Without a mean over views there is no reliability. The mean probability of the vessels, in place of the agreement, had
0.52 in the first row (an earlier form of the study). Taken before the probabilities are resized it had 0.77, but was
not built.
"""

import math

import numpy as np
import torch
from PIL import Image

from .field_of_view import field_of_view_diameter, is_rectangle, shows_two_discs, shrunk
from .masks import looks_like_mask
from .photograph import LARGE, ROWS_AT_ONCE
from .segment import Votes, nearest

# The expected Dice: a constant, and the weights of the agreement's log-odds and of the logarithm of the edges.
OF_FLIPS = (-0.312, 0.245, 0.116)
OF_SIZES = (-0.044, 0.159, 0.120)
SMALLEST_DOUBT = 0.02  # added to agreement and disagreement, so that their ratio stays finite

# Limits of the warnings. Behind them is what the study found: the 17 photographs as they are, then ARIA's.
LEAST_SPREAD = 1.0  # standard deviation of the levels of the liveliest channel; a single colour has 0
LEAST_BRIGHTNESS = 60  # mean level of the brightest channel; 130 and more, 83 and more
SHARP_DIAMETER = 720  # pixels across the field of view at which sharpness is measured
LEAST_SHARPNESS = 0.37  # 0.48 and more, 0.38 and more; blurred copies 0.20 to 0.41
FEW_VESSELS, MANY_VESSELS = 0.04, 0.18  # shares of the field of view; 0.074 to 0.140, 0.050 to 0.144
LEAST_RELIABILITY = 0.6  # warns of one in 17 (Dice 0.63), and of ten in 48 (Dice of all 0.68)


def expected_dice(vessels: np.ndarray, field_of_view: np.ndarray, votes: Votes) -> float:
    """The Dice that a mask is expected to have inside the field of view, from 0 to 1.

    Args:
        vessels: the mask, bool [H, W].
        field_of_view: bool [H, W].
        votes: of the views that the mask comes from.
    """
    agreement, edges = signals(vessels, field_of_view, votes)
    constant, of_agreement, of_edges = OF_SIZES if votes.of_sizes else OF_FLIPS
    return min(max(constant + of_agreement * agreement + of_edges * edges, 0.0), 1.0)


def signals(vessels: np.ndarray, field_of_view: np.ndarray, votes: Votes) -> tuple[float, float]:
    """The log-odds of the views' agreement, and the logarithm of the mask's edges."""
    agreement = agreement_of_views(votes, field_of_view)
    log_odds = math.log((agreement + SMALLEST_DOUBT) / (1 - agreement + SMALLEST_DOUBT))
    return log_odds, math.log1p(edge_density(vessels, field_of_view))


def agreement_of_views(votes: Votes, field_of_view: np.ndarray) -> float:
    """The Dice between the masks of the views, over all pairs of them; 0 without any vessel.

    Args:
        votes: of the views.
        field_of_view: bool [H, W] of the photograph itself.
    """
    inside = nearest(field_of_view, votes.count.shape)
    inner = torch.from_numpy(votes.count.numpy()[inside]).double()  # torch's own choice takes ten times as long
    # A pixel with n votes is common to n (n - 1) / 2 of the pairs, and each vote counts in all pairs of its view.
    common = (inner * (inner - 1)).sum() / ((votes.views - 1) * inner.sum()).clamp_min(1)
    return min(max(float(common), 0.0), 1.0)  # blended votes of tiles are fractions


def edge_density(vessels: np.ndarray, field_of_view: np.ndarray) -> float:
    """The length of a mask's edges times the diameter of the field of view, over its area: free of the resolution."""
    edges = 0
    for top in range(0, len(vessels), ROWS_AT_ONCE):  # in parts, since every copy of a large photograph counts
        rows = slice(top, top + ROWS_AT_ONCE + 1)  # and the first of the next part
        inner = vessels[rows] & field_of_view[rows]
        edges += np.count_nonzero(inner[1:] != inner[:-1])
        edges += np.count_nonzero(inner[:ROWS_AT_ONCE, 1:] != inner[:ROWS_AT_ONCE, :-1])
    return edges * field_of_view_diameter(field_of_view) / max(np.count_nonzero(field_of_view), 1)


def reasons_for_doubt(
    photograph: np.ndarray, retina: np.ndarray, vessel_share: float, reliability: float | None
) -> list[str]:
    """What may be wrong with a photograph or its mask, in a few words each.

    Args:
        photograph: uint8 [H, W, 3].
        retina: the pixels that show the retina, bool [H, W].
        vessel_share: share of the field of view that is vessel.
        reliability: the expected Dice, or None where it is unknown.
    """
    black_and_white, no_border = looks_like_mask(photograph), is_rectangle(retina)
    # That takes a fraction of the time. Of 31 photographs of eight data sets that it changes, the sharpness differs by
    # 0.013 at most, and none gets another warning.
    shrink = math.ceil(math.sqrt(retina.size / LARGE))
    shrink = max(shrink, math.floor(field_of_view_diameter(retina) / SHARP_DIAMETER))
    photograph, retina = shrunk(photograph, shrink), retina[::shrink, ::shrink]
    reasons = {
        "black and white like a label": black_and_white,
        "no border found": no_border,
        "two discs in one picture": shows_two_discs(photograph, retina),
        "of one colour": spread(photograph, retina) < LEAST_SPREAD,
        "too dark": brightness(photograph, retina) < LEAST_BRIGHTNESS,
        # Without a border the size of details is unknown, as in a close-up, and the share of wide vessels too.
        "blurred": not no_border and sharpness(photograph, retina) < LEAST_SHARPNESS,
        "few vessels": vessel_share < FEW_VESSELS,
        "unusual vessel share": not no_border and vessel_share > MANY_VESSELS,
        "low reliability": reliability is not None and reliability < LEAST_RELIABILITY,
    }
    return [reason for reason, applies in reasons.items() if applies]


def brightness(photograph: np.ndarray, retina: np.ndarray) -> float:
    """The mean level, 0 to 255, of the brightest channel inside the retina."""
    if not retina.any():
        return 0.0
    return float(max(np.average(np.arange(256), weights=counts) for counts in _histograms(photograph, retina)))


def spread(photograph: np.ndarray, retina: np.ndarray) -> float:
    """The standard deviation of the levels inside the retina, of the channel where it is largest."""
    if not retina.any():
        return 0.0
    levels, spreads = np.arange(256), []
    for counts in _histograms(photograph, retina):
        spreads.append(np.sqrt(np.average((levels - np.average(levels, weights=counts)) ** 2, weights=counts)))
    return float(max(spreads))


def _histograms(photograph: np.ndarray, retina: np.ndarray) -> np.ndarray:
    """How many pixels inside the retina have each level, int [3, 256] by channel; numpy makes float64 values of all."""
    return np.reshape(Image.fromarray(photograph).histogram(Image.fromarray(retina)), (3, 256))


def sharpness(photograph: np.ndarray, retina: np.ndarray) -> float:
    """The contrast of details some pixels wide over that of details three times as wide, in the green channel.

    It is measured at one diameter of the retina, so that a photograph of few pixels counts as blurred.
    """
    rows, columns = np.flatnonzero(retina.any(axis=1)), np.flatnonzero(retina.any(axis=0))
    if len(rows) == 0:
        return 1.0
    # Cut out first: a small retina in a large frame would make a huge picture.
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    green, inside = Image.fromarray(photograph[..., 1][box]), Image.fromarray(retina[box])
    size = [max(1, round(side * SHARP_DIAMETER / max(green.size))) for side in green.size]
    grey, inside = (
        np.array(picture.resize(size, resampling)).astype(np.int32)  # whole numbers: exact sums
        for picture, resampling in ((green, Image.Resampling.BILINEAR), (inside, Image.Resampling.NEAREST))
    )
    # Away from the rim, whose step is no detail of the retina.
    inner = _means_around(inside, 10)[0] == 1
    fine, middle, coarse = _means_around(grey, 1, 3, 10)
    if not inner.any():
        return 1.0
    details, structures = (fine - middle)[inner].std(), (middle - coarse)[inner].std()
    return float((details + 0.1) / (structures + 0.1))


def _means_around(picture: np.ndarray, *radii: int) -> list[np.ndarray]:
    """The mean of the square around each pixel of a picture [H, W]; outside of it lies more of its rim.

    Args:
        picture: whole numbers, whose sum is less than 2 ** 31.
        radii: of the squares; a radius r means 2 r + 1 pixels.
    """
    height, width = picture.shape
    reach = max(radii)
    padded = np.pad(np.pad(picture, reach, mode="edge"), [(1, 0), (1, 0)])
    sums = padded.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    means = []
    for radius in radii:
        first, side = reach - radius, 2 * radius + 1
        above, below = sums[first : first + height], sums[first + side : first + side + height]
        difference = below - above  # [H, columns]
        means.append(
            (difference[:, first + side : first + side + width] - difference[:, first : first + width]) / side**2
        )
    return means
