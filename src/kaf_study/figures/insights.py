"""Figures of what goes on inside networks, layer by layer; measured by `kaf_study.insights`."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from kaf_study.activations import ACTIVATION_LABELS, STUDIED, is_kaf
from kaf_study.figures.kafs import activation_values, evenly, layer_activation, size_in_words
from kaf_study.figures.point_labels import label_points
from kaf_study.figures.style import Line, axes_or_new, color_of, labelled, marker_of

if TYPE_CHECKING:
    import keras

FUNCTION: dict[str, Any] = {"color": "black", "lw": 0.9, "ls": (0, (3, 1.5))}
END_OF_DICTIONARY: dict[str, Any] = {"color": "0.45", "lw": 0.9, "ls": ":"}
LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))


# --------------------------------------------------------------------------- pre-activations


def activation_histograms(
    model: "keras.Model",
    clean: NDArray,
    attacked: NDArray,
    *,
    limit: float = 6.0,
    panels: int = 6,
    channels: int = 4,
    functions: bool = True,
    title: str | None = None,
) -> Figure:
    """Pre-activations of some layers, clean against attacked, with the activation over them.

    Args:
        clean, attacked: of `kaf_study.insights.histograms` with this `limit`, (L, bins + 2).
        panels: how many layers are drawn, evenly spaced, first and last included.
        channels: how many functions of each KAF layer are drawn.
        functions: False leaves the activation out (it does not act on channel means).
    """
    from kaf_study.insights import activation_layers

    layers = activation_layers(model)
    chosen = evenly(len(layers), panels)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.2 * rows + 0.9), sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    name = layer_activation(layers[0])
    draws_function = functions and name != "kwta"  # which is no function of one value
    for place, (ax, index) in enumerate(zip(axes.flat, chosen, strict=False)):
        _draw_histograms(ax, clean[index], attacked[index], limit, color_of(name))
        ax.set_title(f"layer {index + 1}: {size_in_words(layers[index])}", fontsize=9, pad=3)
        if draws_function:
            second = _draw_function(ax, layers[index], limit, channels)
            if place % columns == columns - 1 or index == chosen[-1]:
                second.set_ylabel("g(z)", fontsize=9)
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_axis_off()
    handles = [
        plt.Rectangle((0, 0), 1, 1, color="0.8", label="clean images"),
        Line2D([], [], color=color_of(name), lw=1.4, label="attacked images"),
    ]
    if draws_function:
        many = f" (up to {channels} channels)" if is_kaf(name) else ""
        handles.append(Line2D([], [], label=f"activation g{many}", **FUNCTION))
        if is_kaf(name):
            handles.append(Line2D([], [], label="ends of the dictionary", **END_OF_DICTIONARY))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    for ax in axes[-1]:
        ax.set_xlabel("pre-activation z" if functions else "channel mean of z", fontsize=9)
    figure.supylabel("density", fontsize=10)
    figure.suptitle(title or f"{ACTIVATION_LABELS.get(name, name)} in {model.name}", fontsize=11)
    return figure


def _draw_histograms(ax: Axes, clean: NDArray, attacked: NDArray, limit: float, color: str) -> None:
    """Densities of one layer, (bins + 2,) each: those below -limit and above limit left out."""
    edges = np.linspace(-limit, limit, len(clean) - 1)
    density = 1 / (edges[1] - edges[0])
    ax.stairs(density * clean[1:-1], edges, fill=True, color="0.8")
    ax.stairs(density * attacked[1:-1], edges, color=color, lw=1.4)
    ax.tick_params(labelsize=8)
    ax.set_xlim(-limit, limit)
    ax.set_ylim(0, None)


def _draw_function(ax: Axes, layer, limit: float, channels: int) -> Axes:
    """The activation on a second axis, which is returned."""
    z = np.linspace(-limit, limit, 241)
    values = activation_values(layer, z)
    second = ax.twinx()
    second.plot(z, values[:, evenly(values.shape[1], channels)], alpha=0.75, **FUNCTION)
    second.tick_params(labelsize=8)
    if is_kaf(layer_activation(layer)) and not layer.moving:
        for end in (-layer.boundary, layer.boundary):
            ax.axvline(end, **END_OF_DICTIONARY)
    return second


# --------------------------------------------------------------------------- layer by layer


def by_layer(
    curves: Mapping[str, Any],
    *,
    ylabel: str,
    ax: Axes | None = None,
    log: bool = False,
    reference: float | None = None,
    title: str | None = None,
    legend: bool = True,
) -> Axes:
    """One line for each network over its layers, with a band where there is an interval.

    Args:
        curves: {label: Series, or DataFrame with value, low and high, indexed by layer}; a label
            is an activation's name, perhaps with more after a comma ("kaf, depth 56"), which gives
            the colour; under another label, Line(curve, activation). Lines of one activation
            differ in style. Values that are not finite are crosses above all lines, in a row for
            each network that has any.
        reference: a y where a thin line is drawn, for ratios: their axis need not begin at 0.
    """
    ax = axes_or_new(ax, (7.5, 4.2))
    drawn: Counter[str | None] = Counter()  # lines of each activation so far
    not_finite = []
    for one in labelled(curves):
        value = one.data["value"] if isinstance(one.data, pd.DataFrame) else one.data
        kind = drawn[one.activation] % len(LINE_STYLES)
        drawn[one.activation] += 1
        ax.plot(
            value.index, value.where(np.isfinite(value)), color=one.color, ls=LINE_STYLES[kind],
            lw=1.4, label=one.label, marker=marker_of(one.activation)[0], ms=4,
            # A marker on every point would hide the dashes.
            markevery=(kind, max(1, len(value) // 8)) if kind else None,
        )  # fmt: skip
        if isinstance(one.data, pd.DataFrame):
            band: dict[str, Any] = {"color": one.color, "alpha": 0.18, "lw": 0}
            ax.fill_between(one.data.index, one.data["low"], one.data["high"], **band)
        if not np.isfinite(value).all():
            which = one.label.partition(",")[2].strip() or one.label
            not_finite.append((value.index[~np.isfinite(value)], one.color, which))
    if log:
        ax.set_yscale("log")
        if ax.dataLim.y1 < 10 * ax.dataLim.y0:  # 8.02, not 8.02 x 10^0
            ax.yaxis.set_minor_formatter("{x:g}")
    elif reference is None:  # from 0 to above everything drawn, also in panels that share this axis
        panels = ax.get_shared_y_axes().get_siblings(ax)
        ax.set_ylim(0, 1.05 * max(panel.dataLim.y1 for panel in panels))
    if reference is not None:
        ax.axhline(reference, color="0.5", lw=0.8)
    if not_finite:
        _mark_not_finite(ax, not_finite, log)
    ax.set_xlabel("layer, from the input")
    ax.set_ylabel(ylabel)
    ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    if legend:
        ax.legend(fontsize=8, frameon=False, handlelength=3.5)
    if title:
        ax.set_title(title, fontsize=10)
    return ax


def _mark_not_finite(ax: Axes, rows: list[tuple], log: bool) -> None:
    """A row of crosses for each (layers, color, label), in room made above all lines."""
    (low, high), share = ax.get_ylim(), 0.08 * len(rows) + 0.02
    stretch = share / (1 - share)
    ax.set_ylim(low, high * (high / low) ** stretch if log else high + stretch * (high - low))
    across = ax.get_xaxis_transform()
    for row, (layers, color, which) in enumerate(rows):
        height = 0.96 - 0.08 * row
        ax.plot(
            layers, np.full(len(layers), height), "x", color=color, ms=5, transform=across,
            ls="none",
        )  # fmt: skip
        ax.annotate(
            f"{which}: not finite", (layers[-1], height), (8, 0), xycoords=across,
            textcoords="offset points", color=color, fontsize=7, va="center",
        )  # fmt: skip


def movement_and_robustness(
    points: pd.DataFrame,
    *,
    xlabel: str,
    ylabel: str = "robust accuracy (%)",
    ax: Axes | None = None,
) -> Axes:
    """One point for each network: a movement (x) with its interval, and a robust accuracy (y).

    Args:
        points: indexed by label, labels as in `by_layer`; x, low, high (of x), and y, error
            (fractions); where labels are not activations' names, also activation. Several points of
            one activation share one entry of the legend, which says how many they are.
    """
    ax = axes_or_new(ax, (5.5, 4.2))
    alike = Counter(points.get("activation", ()))
    named = set()
    for label, row in points.iterrows():
        data = Line(row, row["activation"]) if "activation" in row else row
        (one,) = labelled({str(label): data})
        shown, activation = one.label, one.activation or ""
        if alike[activation] > 1:
            shown = f"{ACTIVATION_LABELS[activation]} ({alike[activation]})"
            shown = "_" if shown in named else shown  # which Matplotlib leaves out
            named.add(shown)
        marker, size = marker_of(one.activation)
        ax.errorbar(
            row["x"], 100 * row["y"],
            xerr=[[row["x"] - row["low"]], [row["high"] - row["x"]]], yerr=100 * row["error"],
            color=one.color, elinewidth=1, capsize=2.5, marker=marker, ms=size, mec="white",
            ls="none", label=shown,
        )  # fmt: skip
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


# --------------------------------------------------------------------------- curvature


def curvature_and_robustness(networks: pd.DataFrame, title: str | None = None) -> Figure:
    """Left: curvature before and after training; right: after it, against robust accuracy.

    Args:
        networks: of `kaf_study.mechanism.curvature_table`; one line on the left for each.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained")
    place = {name: i for i, name in enumerate(a for a in STUDIED if a in set(networks.activation))}
    for activation, of_one in networks.groupby("activation", sort=False):
        color, (marker, size) = color_of(activation), marker_of(activation)
        rows = place[activation] + 0.22 * (np.arange(len(of_one)) - (len(of_one) - 1) / 2)
        for row, network in zip(rows, of_one.itertuples(), strict=True):
            ends = [network.before_training, network.after_training]
            left.plot(ends, [row, row], "-", color=color, lw=1.2, alpha=0.7)
            left.plot(ends[0], row, marker, color="white", mec=color, ms=size - 2, mew=1.4)
            left.plot(ends[1], row, marker, color=color, ms=size - 2, mec="white", mew=0.5)
    left.set_yticks(list(place.values()), [ACTIVATION_LABELS[name] for name in place])
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("curvature kappa; open: before training, filled: after")
    _plain_log_ticks(left)
    attacked = networks.dropna(subset=["robust"])
    points = np.column_stack([attacked["after_training"], 100 * attacked["robust"]])
    errors = np.column_stack([0 * points[:, 0], 100 * attacked["robust_standard_error"]])
    colors = [color_of(activation) for activation in attacked["activation"]]
    for (x, y), (_, dy), color, activation in zip(
        points, errors, colors, attacked["activation"], strict=True
    ):
        marker, size = marker_of(activation)
        right.errorbar(x, y, yerr=dy, color=color, elinewidth=1, capsize=2.5, alpha=0.55)
        right.plot(x, y, marker, color=color, ms=size - 1, mec="white", mew=0.6, zorder=3)
    right.set_xlabel("curvature kappa after training")
    right.set_ylabel(f"robust accuracy (%), {networks.attrs['attack'] or 'not attacked'}")
    right.margins(0.16)
    for ax in (left, right):
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    if title:
        figure.suptitle(title, fontsize=12)
    named = [ACTIVATION_LABELS[activation] for activation in attacked["activation"]]
    if len(points):
        label_points(right, points, errors, named, colors)
    return figure


def _plain_log_ticks(ax):
    """0.5, 0.7, 1, 1.5, 2 instead of powers of ten: the range is a factor of four or so."""
    low, high = ax.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if low <= t <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
