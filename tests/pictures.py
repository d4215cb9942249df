"""Pictures that several tests draw."""

import numpy as np


def disc(height, width, diameter, centre=None):
    y, x = np.indices((height, width)) + 0.5
    centre_y, centre_x = centre or (height / 2, width / 2)
    return (y - centre_y) ** 2 + (x - centre_x) ** 2 <= (diameter / 2) ** 2


def overlap(a, b):
    """Intersection over union."""
    return (a & b).sum() / (a | b).sum()


def framed(photograph, truth, colour):
    """The photograph with another border."""
    around = np.random.default_rng(0).normal(colour, 2, photograph.shape).clip(0, 255).astype(np.uint8)
    return np.where(truth[..., None], photograph, around)
