"""What all figures share: one colour and marker per activation and kind, words, and saving."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from kaf_study import InputError
from kaf_study.activations import (
    ACTIVATION_COLORS,
    ACTIVATION_LABELS,
    FIXED,
    FROZEN_KAF,
    KAF_ON_BASE,
    KWTA,
    OTHER_COLOR,
    RANDOM_KAF,
    RIDGE_KAF,
    activation_of,
    kind_of,
)
from kaf_study.files import make_writable

MARKERS = {  # kind of activation -> marker, size
    FIXED: ("d", 10),
    RANDOM_KAF: ("P", 11),
    RIDGE_KAF: ("X", 10),
    KAF_ON_BASE: ("^", 9),
    FROZEN_KAF: ("v", 9),
    KWTA: ("o", 8),
    "other": ("s", 7),
}


class Line(NamedTuple):
    """Data whose label is not an activation's name, as a folder's is not, with the activation."""

    data: Any
    activation: str | None


class Labelled(NamedTuple):
    """What is drawn for one entry of a {label: data}."""

    label: str  # as shown: "KAF_ELU, depth 56"
    activation: str | None
    data: Any

    @property
    def color(self) -> str:
        return color_of(self.activation)


def labelled(series: Mapping[str, Any]) -> list[Labelled]:
    """The entries of a {label: data}, in order, with their activations.

    A label is an activation's name, perhaps with more after a comma ("kaf, depth 56"); data under
    any other label is wrapped: `Line(data, activation)`.
    """
    entries = []
    for label, data in series.items():
        first, *rest = label.split(",")
        shown = ",".join([ACTIVATION_LABELS.get(first, first), *rest])
        if isinstance(data, Line):
            entries.append(Labelled(shown, data.activation, data.data))
        else:
            entries.append(Labelled(shown, activation_of(label), data))
    return entries


def color_of(activation: str | None) -> str:
    return ACTIVATION_COLORS.get(activation or "", OTHER_COLOR)


def marker_of(activation: str | None) -> tuple[str, int]:
    """Marker and size of its kind."""
    return MARKERS[kind_of(activation)]


def shared_legend(figure: Figure, ncols: int = 4) -> None:
    """One legend below a figure for all its panels, which show the same networks."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(ncols, len(names)), frameon=False,
        fontsize=9, handlelength=3.5,
    )  # fmt: skip


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """`ax`, or that of a new figure of this size in inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def save(figure: Figure | SubFigure, path: str | Path) -> None:
    """Writes a figure and closes it; .png, .pdf or .svg by the name's ending."""
    path = Path(path)
    figure = cast(Figure, figure)  # as an Axes' figure, typed as perhaps a part of one
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise InputError(f"cannot write a figure as {path.name!r}; let its name end in .png")
    make_writable(path.parent)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r} ({error.strerror})") from None
    finally:
        plt.close(figure)
