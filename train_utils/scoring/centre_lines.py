"""clDice: the agreement of the vessels' centre lines, and so of their connections.

Source: S. Shit et al., "clDice - a Novel Topology-Preserving Loss Function for Tubular Structure Segmentation",
CVPR 2021. The paper leaves the skeleton of a yes/no mask open (its soft skeleton is a stand-in that has a gradient).
Here it is the thinning of Z. Guo and R. W. Hall, "Parallel thinning with two-subiteration algorithms", Comm. ACM 32(3),
1989, which keeps every component and every hole; the better known rule of Zhang and Suen (1984) deletes squares of
2 x 2 pixels without a trace.
"""

import numpy as np

# Rows and columns of the eight neighbours in a picture padded by 1, clockwise from the one above.
NEIGHBOURS = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))


def _deletable() -> np.ndarray:
    """Whether to delete a pixel, by sub-iteration (0, 1) and neighbours (bit i: the i-th is set), bool [2, 256]."""
    set_bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    north, north_east, east, south_east, south, south_west, west, north_west = set_bits.astype(bool).T
    components = sum(
        (~side & (corner | next_side)).astype(int)
        for side, corner, next_side in (
            (north, north_east, east),
            (east, south_east, south),
            (south, south_west, west),
            (west, north_west, north),
        )
    )
    pairs = sum((a | b).astype(int) for a, b in ((north_west, north), (north_east, east), (south_east, south)))
    pairs += south_west | west
    shifted = sum((a | b).astype(int) for a, b in ((north, north_east), (east, south_east), (south, south_west)))
    shifted += west | north_west
    neighbours = np.minimum(pairs, shifted)
    simple = (components == 1) & (neighbours >= 2) & (neighbours <= 3)
    keep = np.stack([(north | north_east | ~south_east) & east, (south | south_west | ~north_west) & west])
    return simple & ~keep


DELETABLE = _deletable()


def skeletonize(mask: np.ndarray) -> np.ndarray:
    """Thin a mask, bool [H, W], to lines of one pixel; components and holes stay as many as they are."""
    padded = np.pad(mask, 1).astype(np.uint8)
    flat, stride = padded.ravel(), padded.shape[1]
    offsets = np.array([(row - 1) * stride + column - 1 for row, column in NEIGHBOURS])

    def codes(pixels: np.ndarray) -> np.ndarray:
        return np.bitwise_or.reduce([flat[pixels + offset] << bit for bit, offset in enumerate(offsets)])

    inner = np.flatnonzero(flat)
    border = inner[codes(inner) != 255]
    # Whether a pixel goes follows from its neighbours: a sub-iteration looks only at pixels whose neighbours changed
    # since it looked last. So the time grows with the area, not with the area times the width.
    pending = [border, border]
    while any(map(len, pending)):
        for step, deletable in enumerate(DELETABLE):
            candidates = np.unique(pending[step][flat[pending[step]] == 1])
            gone = candidates[deletable[codes(candidates)]]
            flat[gone] = 0
            touched = (gone[:, None] + offsets).ravel()
            touched = touched[flat[touched] == 1]
            pending[step], pending[1 - step] = touched, np.concatenate([pending[1 - step], touched])
    return padded[1:-1, 1:-1].astype(bool)


def cl_dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """The harmonic mean of two shares: of the predicted centre line inside the true vessels, and the reverse.

    Args:
        prediction, truth: vessels, bool [H, W].

    Returns:
        in [0, 1]; 0 if only one of the two has vessels, 1 if neither has (as for Dice).
    """
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() or truth.any() else 1.0
    predicted_line, true_line = skeletonize(prediction), skeletonize(truth)
    precision = np.mean(truth[predicted_line])
    sensitivity = np.mean(prediction[true_line])
    total = precision + sensitivity
    return float(2 * precision * sensitivity / total) if total else 0.0
