"""Test that the colours of figures are distinguishable with each simulated colour-vision deficiency."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from kv_transition.plotting.theme import NEUTRAL, PALETTE, SHAPES
from kv_transition.studies.grid.plots import FAILURE_COLORS, number_color

# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# CIE 1976 differences: about 2 is visible side by side; separate marks of a figure need several times as much
APART = 12


def linear(colour: str) -> np.ndarray:
    """Return the linear RGB values of #RRGGBB."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21, by WCAG 2."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return the CIELAB values of linear sRGB under D65."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    ratio = to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [(*PALETTE, NEUTRAL), tuple(FAILURE_COLORS.values())], ids=["policies", "failures"])
def test_any_two_colours_can_be_told_apart(vision, colours):
    seen = {colour: lab(VISION[vision] @ linear(colour)) for colour in colours}
    near = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(seen, 2)}
    assert min(near.values()) >= APART, min(near, key=near.get)


def test_the_simulation_sees_what_is_confused():
    """Check the simulation: red and green of equal lightness differ with usual vision, and hardly with deuteranopia."""
    red, green = linear("#C56A00"), linear("#7F8A00")
    apart = [np.linalg.norm(lab(VISION[v] @ red) - lab(VISION[v] @ green)) for v in ("usual", "deuteranopia")]
    assert apart[0] > 3 * apart[1]


def test_colours_stand_out_from_white():
    """Check contrast: WCAG 2 requires 3 for marks; paler colours are also distinguished by a shape."""
    found = [contrast(colour, "#FFFFFF") for colour in PALETTE]
    assert min(found) > 2
    assert sum(value < 3 for value in found) <= len(SHAPES)
    assert len(set(SHAPES)) == len(SHAPES) == len(PALETTE) - 1


def test_numbers_on_bars_can_be_read():
    """WCAG 2 asks for a contrast of 4.5 of text."""
    for colour in FAILURE_COLORS.values():
        assert contrast(colour, number_color(colour)) >= 4.5, colour
