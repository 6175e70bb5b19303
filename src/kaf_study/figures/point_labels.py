"""Texts beside points, each where it covers least of the other points, bars and texts."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

# Left, bottom, right, top, in pixels
Box = tuple[float, float, float, float]

ANGLES = np.radians([45, 135, -45, -135, 0, 180, 90, -90, 22, 158, -22, -158])
DISTANCES = (9, 14, 20, 28, 38, 50, 64)  # in points
FAR = 14  # from here on a line says whose label it is


def label_points(
    ax: Axes,
    points: NDArray[np.floating],
    errors: NDArray[np.floating],
    labels: Sequence[str],
    colors: Sequence[str],
) -> None:
    """Writes `labels` beside points (N, 2) with error bars (N, 2). Call it last: it takes the
    layout as it is."""
    figure = ax.figure
    figure.canvas.draw()  # positions in pixels are known after this
    scale = figure.dpi / 72
    centres = ax.transData.transform(points)
    reach = ax.transData.transform(points + errors) - centres
    taken = list(_boxes_of_points(centres, reach, scale))
    frame = ax.get_window_extent()

    for i in np.argsort(-centres[:, 1]):
        text = ax.annotate(
            labels[i], points[i], (0, 0), textcoords="offset points", color=colors[i],
            fontsize=10, fontweight="bold", va="bottom",
        )  # fmt: skip
        extent = text.get_window_extent()
        size = np.array([extent.width, extent.height])

        def cost(option, centre=centres[i], size=size):
            box = _box(centre, size, *option, scale)
            covered = sum(_overlap(box, other) for other in taken)
            return covered + 100 * _outside(box, frame) + 0.5 * option[0]

        options = [(distance, angle) for distance in DISTANCES for angle in ANGLES]
        best = min(options, key=cost)
        chosen = _box(centres[i], size, *best, scale)
        taken.append(chosen)
        text.set_position((np.array(chosen[:2]) - centres[i]) / scale)
        if best[0] > FAR:
            nearest = np.clip(centres[i], chosen[:2], chosen[2:])
            # In points, as the text is: a figure may be saved at another resolution.
            ax.annotate(
                "", points[i], tuple((nearest - centres[i]) / scale), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.5"},
            )  # fmt: skip


def _boxes_of_points(
    centres: NDArray[np.floating], reach: NDArray[np.floating], scale: float
) -> Iterator[Box]:
    """Of each point its marker and its two error bars."""
    marker, bar = 7 * scale, 2 * scale
    for (px, py), (rx, ry) in zip(centres, reach, strict=True):
        for dx, dy in ((marker, marker), (rx, bar), (bar, ry)):
            yield px - dx, py - dy, px + dx, py + dy


def _box(
    centre: NDArray[np.floating],
    size: NDArray[np.floating],
    distance: float,
    angle: float,
    scale: float,
) -> Box:
    """Of a text whose centre lies on an ellipse around the point."""
    width, height = size
    px = centre[0] + np.cos(angle) * (width / 2 + distance * scale)
    py = centre[1] + np.sin(angle) * (height / 2 + distance * scale)
    return px - width / 2, py - height / 2, px + width / 2, py + height / 2


def _outside(box, frame) -> float:
    """How many pixels of a box stand out of the axes' frame."""
    return (
        max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1)
        + max(0, frame.y0 - box[1]) + max(0, box[3] - frame.y1)
    )  # fmt: skip


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
