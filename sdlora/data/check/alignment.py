"""Lays one small grey picture over another, moved and scaled so that they fit, and tells how well they do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_SCALES, _SHIFTS = (0.8, 1.25), (-0.25, 0.25)
_LARGEST_STEP = 0.1
_LEAST_OVERLAP = 0.65

_Floats = npt.NDArray[np.float64]
_Greys = npt.NDArray[np.uint8]


def correlation_when_aligned(first: _Greys, second: _Greys, rounds: int) -> _Floats:
    """Return for each pair of square pictures [n,side,side] the correlation when one is placed to fit the other.

    Brightness and contrast do not matter. Widths and heights are scaled apart, by a quarter at most, so that a
    crop of another shape fits too. Each round is a Gauss-Newton step (Lucas & Kanade 1981) for the scales,
    the shifts, and what contrast and brightness differ by.
    """
    moved = np.concatenate([first, second]).astype(np.float64)  # either may be the crop
    fixed = np.concatenate([second, first]).astype(np.float64)
    placing = np.tile([[1.0, 0.0], [1.0, 0.0]], (len(moved), 1, 1))
    best = np.zeros(len(moved))
    for round_number in range(rounds + 1):
        placed = _place(moved, placing)
        correlation, gain = _correlate(placed, fixed)
        enough = placed.inside.mean(axis=(1, 2)) >= _LEAST_OVERLAP
        best = np.where(enough, np.maximum(best, correlation), best)
        if round_number < rounds:
            placing += _step(placed, fixed, gain)
            placing[:, :, 0] = placing[:, :, 0].clip(*_SCALES)
            placing[:, :, 1] = placing[:, :, 1].clip(*_SHIFTS)
    return np.maximum(best[: len(first)], best[len(first) :])


class _Placed(NamedTuple):
    """Pictures as they look when placed, [n,side,side] each."""

    values: _Floats
    across: _Floats
    """How much they rise from one pixel to the next rightwards."""
    down: _Floats
    inside: _Floats
    """1 where they reach to, 0 beyond their edges."""


def _place(pictures: _Floats, placing: _Floats) -> _Placed:
    """Return the pictures sampled where `placing` [n,2,2] says: for x and y a scale, and a shift from -1 to 1."""
    side = pictures.shape[1]
    sampled = (placing[:, :, :1] * _centres(side) + placing[:, :, 1:] + 1) / 2 * side - 0.5
    inside = (sampled >= -0.5) & (sampled <= side - 0.5)
    sampled = sampled.clip(0, side - 1.001)
    before = sampled.astype(np.int64)
    right, low = (sampled - before)[:, 0, None, :], (sampled - before)[:, 1, :, None]
    n, x, y = np.arange(len(pictures))[:, None, None], before[:, 0, None, :], before[:, 1, :, None]
    a, b = pictures[n, y, x], pictures[n, y, x + 1]
    c, d = pictures[n, y + 1, x], pictures[n, y + 1, x + 1]
    return _Placed(
        values=(a * (1 - right) + b * right) * (1 - low) + (c * (1 - right) + d * right) * low,
        across=(b - a) * (1 - low) + (d - c) * low,
        down=(c - a) * (1 - right) + (d - b) * right,
        inside=(inside[:, 1, :, None] & inside[:, 0, None, :]).astype(np.float64),
    )


def _correlate(placed: _Placed, fixed: _Floats) -> tuple[_Floats, _Floats]:
    """Return the correlation of each pair where both have pixels, and how much contrast the second has of the first."""
    own, other = _centred(placed.values, placed.inside), _centred(fixed, placed.inside)
    product = (own * other).sum(axis=(1, 2))
    squares, other_squares = (own**2).sum(axis=(1, 2)).clip(1e-9), (other**2).sum(axis=(1, 2)).clip(1e-9)
    return product / np.sqrt(squares * other_squares), product / squares


def _centred(values: _Floats, inside: _Floats) -> _Floats:
    """Return the values less their mean inside, and 0 outside."""
    mean = (values * inside).sum(axis=(1, 2)) / inside.sum(axis=(1, 2))
    return (values - mean[:, None, None]) * inside


def _step(placed: _Placed, fixed: _Floats, gain: _Floats) -> _Floats:
    """Return by how much to change the placing, [n,2,2]."""
    count, side = fixed.shape[:2]
    gain = gain.clip(0.3, 3.0)[:, None, None]
    across, down = gain * placed.across * side / 2, gain * placed.down * side / 2
    centres = _centres(side)
    unknowns = (across * centres, across, down * centres[:, None], down, placed.values, np.ones_like(across))
    matrix = (np.stack(unknowns, axis=-1) * placed.inside[..., None]).reshape(count, side * side, len(unknowns))
    rest = _centred(fixed, placed.inside) - gain * _centred(placed.values, placed.inside)
    squares = matrix.transpose(0, 2, 1) @ matrix
    # Without it a picture that never rises in one direction would have no solution there.
    damping = 1e-3 * np.trace(squares, axis1=1, axis2=2)[:, None, None] / len(unknowns)
    products = matrix.transpose(0, 2, 1) @ rest.reshape(count, side * side, 1)
    solution = np.linalg.solve(squares + damping * np.eye(len(unknowns)), products)
    steps: _Floats = solution[:, :4, 0].reshape(count, 2, 2).clip(-_LARGEST_STEP, _LARGEST_STEP)
    return steps


def _centres(side: int) -> _Floats:
    """Return where the centres of pixels lie between -1 and 1."""
    return (np.arange(side) + 0.5) / side * 2 - 1
