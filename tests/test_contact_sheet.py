import itertools

import numpy as np
import pytest
from PIL import Image

from train_utils.scoring import contact_sheet as sheets
from train_utils.scoring.contact_sheet import (
    FALSE_ALARM,
    HIT,
    MISS,
    PANEL,
    SheetRow,
    contact_sheet,
    error_map,
    sheet_row,
)

pytestmark = pytest.mark.usefixtures("full_contact_sheets")

RED, BLUE = (200, 0, 0), (0, 0, 200)

# Linear RGB as people with no, and with the three kinds of, colour blindness see it: G. M. Machado et al., "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG 15(6), 2009, severity 1.
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
RGB_TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]


def lab(colour, vision):
    """CIE L*a*b* of an sRGB colour as someone sees it; distances of 2 can be told apart side by side."""
    value = np.array(colour) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = RGB_TO_XYZ @ np.clip(vision @ linear, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_everybody_can_tell_the_colours_apart(vision):
    colours = [HIT, FALSE_ALARM, MISS, sheets.BACKGROUND_COLOUR]
    seen = [lab(colour, np.array(VISION[vision])) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 40


def test_error_map():
    truth = np.array([[1, 0, 1, 0, 1]], bool)
    prediction = np.array([[1, 1, 0, 0, 0]], bool)
    inside = np.array([[1, 1, 1, 1, 0]], bool)
    expected = [HIT, FALSE_ALARM, MISS, sheets.BACKGROUND_COLOUR, sheets.OUTSIDE_COLOUR]
    assert error_map(truth, prediction, inside).tolist() == [[list(colour) for colour in expected]]


def test_panels_in_order():
    height, width = 20, 30
    photograph = np.full((height, width, 3), RED, np.uint8)
    truth, prediction, inside = np.zeros((3, height, width), bool)
    truth[:, :15] = True
    prediction[:10] = True
    inside[:] = True
    strip = sheet_row("a", 0.5, photograph, truth, prediction, inside).strip

    def at(panel, x, y):
        """The colour in the middle of a quarter of the panel; its picture is PANEL wide."""
        column = panel * (PANEL + sheets.GAP) + PANEL * (1 + 2 * x) / 4
        row = PANEL / 2 + (2 * y - 1) / 4 * PANEL * height / width
        return strip.getpixel((int(column), int(row)))

    assert strip.size == (4 * PANEL + 3 * sheets.GAP, PANEL)
    assert {at(0, x, y) for x in (0, 1) for y in (0, 1)} == {RED}
    assert [at(1, 0, 0), at(1, 1, 0)] == [(255, 255, 255), (0, 0, 0)]
    assert [at(2, 0, 0), at(2, 0, 1)] == [(255, 255, 255), (0, 0, 0)]
    assert [at(3, 0, 0), at(3, 1, 0), at(3, 0, 1), at(3, 1, 1)] == [HIT, FALSE_ALARM, MISS, (0, 0, 0)]


def test_photographs_of_drive_keep_their_size():
    photograph = np.random.default_rng(0).integers(0, 256, (584, 565, 3), np.uint8)
    mask = np.ones((584, 565), bool)
    strip = np.array(sheet_row("a", 1.0, photograph, mask, mask, mask).strip)
    left = (PANEL - 565) // 2
    assert (strip[:584, left : left + 565] == photograph).all()


def plain_row(name, dice, colour):
    return SheetRow(name, dice, Image.new("RGB", (4 * PANEL + 3 * sheets.GAP, PANEL), colour))


def test_sheet():
    rows = [plain_row("a very long name of a photograph_test", 0.1, RED), plain_row("b", 0.2, BLUE)]
    sheet = np.array(contact_sheet(rows, 2, "heading"))
    assert sheet.shape[1] == rows[0].strip.width + 2 * sheets.GAP + sheets.CAPTION
    column = sheet[:, sheets.GAP + sheets.CAPTION + PANEL // 2]
    red, blue = (np.flatnonzero((column == colour).all(1)) for colour in (RED, BLUE))
    assert len(red) == len(blue) == PANEL and red.max() < blue.min()
    caption = sheet[red.min() : red.max(), : sheets.CAPTION + sheets.GAP]
    assert (caption < 100).any()  # something is written
    assert (caption[:, -6:] == 255).all()  # and does not run into the panels
