"""Figures of trainings: by epoch, from a run's history, and step by step."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kaf_study import InputError
from kaf_study.activations import is_kaf
from kaf_study.figures.insights import by_layer
from kaf_study.figures.style import Line, labelled, shared_legend
from kaf_study.records import read_history

CURVES = {
    "loss": "training loss",
    "probe_clean": "clean accuracy (%)",
    "probe_fgsm": "FGSM accuracy (%)",
    "probe_pgd": "PGD-10 accuracy (%)",
}


def training_curves(
    histories: Mapping[str, Any],
    *,
    title: str | None = None,
    loss: str = "training loss (perturbed batches)",
) -> Figure:
    """Loss, and clean, FGSM and PGD accuracy on the probe images, by epoch.

    Args:
        histories: {label: history}, labels as in `by_layer`, a history what history.csv holds (a
            DataFrame or its path).
        loss: label of its axis.
    """
    if not histories:
        raise InputError("no finished model folders were given: there are no curves to draw")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    drawn: Counter[str | None] = Counter()  # lines of each activation so far
    for one in labelled(histories):
        history = one.data if isinstance(one.data, pd.DataFrame) else read_history(Path(one.data))
        line: dict[str, Any] = {
            "color": one.color,
            "ls": "-" if is_kaf(one.activation) else "--",
            "marker": "os^v*"[drawn[one.activation] % 5],
            "label": one.label,
        }
        drawn[one.activation] += 1
        for ax, column in zip(axes.flat, CURVES, strict=True):
            percent = 1 if column == "loss" else 100
            ax.plot(history["epoch"] + 1, percent * history[column], ms=4, lw=1.6, **line)
    accuracies = axes.flat[1:]
    top = max(ax.get_ylim()[1] for ax in accuracies)
    for ax, what in zip(axes.flat, (CURVES | {"loss": loss}).values(), strict=True):
        ax.set_ylabel(what)
        ax.grid(alpha=0.25)
        ax.locator_params(axis="x", integer=True)
    for ax in accuracies:  # one scale: FGSM far above PGD is catastrophic overfitting
        ax.set_ylim(0, min(top, 101))
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fitting = 100 // (7 + max(map(len, names)))  # of the figure's 100 letters, 7 for each line
    columns = max(1, min(len(names), 4, fitting))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title or "Fast adversarial training, probed on validation images", fontsize=12)
    return figure


def training_steps(
    histories: Mapping[str, Any], *, window: int = 10, title: str | None = None
) -> Figure:
    """Loss and gradient norm of short trainings, step by step.

    Args:
        histories: {label: table of `kaf_study.insights.train_steps`}, labels as in `by_layer`.
        window: steps over which the loss is averaged.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    losses, norms = {}, {}
    for label, one in zip(histories, labelled(histories), strict=True):
        history = one.data.set_index("step")
        mean = history["loss"].rolling(window, min_periods=1).mean()
        finite = mean.where(np.isfinite(history["loss"]))  # pandas skips what is not finite
        losses[label] = Line(finite, one.activation)
        norms[label] = Line(history["gradient_norm"], one.activation)
    ylabel = f"cross-entropy (mean of {window} steps, nats)"
    by_layer(losses, ylabel=ylabel, ax=left, legend=False)
    left.autoscale(axis="y")
    by_layer(norms, ylabel="norm of the gradient in all weights", ax=right, log=True, legend=False)
    for ax in (left, right):
        ax.set_xlabel("step")
        for line in ax.lines:
            line.set_markevery(max(1, len(line.get_xdata()) // 10))
    left.axhline(np.log(10), color="0.5", lw=0.8)
    left.annotate(
        "chance: ln 10", (1, np.log(10)), (-4, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", fontsize=8, color="0.35", ha="right",
    )  # fmt: skip
    shared_legend(figure, ncols=3)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure
