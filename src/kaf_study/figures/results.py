"""Figures of attacks' results: accuracy against robustness, survival, radius, images."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from kaf_study import InputError
from kaf_study.activations import kind_of
from kaf_study.figures.point_labels import label_points
from kaf_study.figures.style import (
    MARKERS,
    axes_or_new,
    color_of,
    labelled,
    marker_of,
)
from kaf_study.model_folder import common_training, model_order, with_training
from kaf_study.records import Evaluation

# --------------------------------------------------------------------------- accuracy, robustness


def accuracy_robustness_scatter(
    results: pd.DataFrame,
    labels: str = "true",
    ax: Axes | None = None,
    *,
    protocol: str | None = None,
) -> Axes:
    """Clean accuracy (x) against accuracy under attack (y), percent, one point for each model.

    Error bars are one binomial standard error. With true labels an image that is robust is also
    correct, so a point above the diagonal is impossible: it is ringed, and warned of.

    Args:
        results: of `kaf_study.records.read_results`.
        labels: "true", or "predicted" to draw what is not a robust accuracy.
        protocol: name of the result files (pgd-50-10-true), where there are several.
    """
    rows = with_training(_one_protocol(results, labels, protocol)).reset_index(drop=True)
    points, errors = _points(rows, labels)
    ax = axes_or_new(ax, (7.5, 5.5))
    colors = [color_of(activation) for activation in rows["activation"]]
    for (x, y), (dx, dy), color, activation in zip(
        points, errors, colors, rows["activation"], strict=True
    ):
        ax.errorbar(x, y, xerr=dx, yerr=dy, color=color, elinewidth=1, capsize=2.5, alpha=0.55)
        marker, size = marker_of(activation)
        ax.plot(x, y, marker, color=color, ms=size, mec="white", mew=0.6, zorder=3)
    ax.set_xlim(_limits(points[:, 0], errors[:, 0]))
    ax.set_ylim(_limits(points[:, 1], errors[:, 1]))
    if labels == "true":
        _mark_impossible(ax, points, list(rows["label"]))
    _title(ax, common_training(t for t in rows["training"] if t is not None), rows["protocol"][0])
    ax.set_xlabel("clean accuracy (%)")
    ax.set_ylabel(
        "robust accuracy (%)"
        if labels == "true"
        else "accuracy under attack, predicted labels (%)\n(not a robust accuracy)"
    )
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    shows_impossible = labels == "true" and ax.get_ylim()[1] > ax.get_xlim()[0]
    _marker_legend(ax, {kind_of(a) for a in rows["activation"]}, shows_impossible)
    label_points(ax, points, errors, list(rows["label"]), colors)
    return ax


def _one_protocol(results: pd.DataFrame, labels: str, protocol: str | None) -> pd.DataFrame:
    """The rows of one label protocol and one result-file name."""
    rows = results[results["labels"] == labels]
    rows = rows.assign(stem=[Path(path).stem for path in rows["path"]])
    names = sorted(set(rows["stem"]))
    if protocol is not None:
        rows = rows[rows["stem"] == protocol]
    elif len(names) > 1:
        raise InputError(
            f"the results hold several protocols ({', '.join(names)}); choose one with --protocol"
        )
    if rows.empty:
        raise InputError(
            f"no results with {labels} labels"
            + (f" named {protocol!r} (there are: {', '.join(names) or 'none'})" if protocol else "")
            + "; make them with robustness_eval.py"
        )
    return rows


def _points(rows: pd.DataFrame, labels: str) -> tuple[NDArray, NDArray]:
    """Clean accuracy and accuracy under attack, and one standard error of each: (N, 2), percent."""
    under_attack = {
        "true": ("robust_accuracy", "robust_standard_error"),
        "predicted": (
            "accuracy_under_attack_predicted_labels",
            "standard_error_predicted_labels",
        ),
    }
    value, error = under_attack[labels]
    return (
        100 * rows[["clean_accuracy", value]].to_numpy(float),
        100 * rows[["clean_standard_error", error]].to_numpy(float),
    )


def _title(ax: Axes, title: str, protocol: str) -> None:
    ax.set_title(title, fontsize=12, pad=24)
    ax.text(
        0.5, 1.015, protocol, transform=ax.transAxes, ha="center", va="bottom", fontsize=9
    )  # fmt: skip


def _marker_legend(ax: Axes, kinds: Collection[str], shows_impossible: bool) -> None:
    handles: list[Artist] = [
        Line2D([], [], ls="", marker=marker, ms=size - 2, color="0.35", mec="white", label=kind)
        for kind, (marker, size) in MARKERS.items()
        if kind in kinds
    ]
    handles.append(
        Line2D([], [], color="0.35", marker="|", ms=6, lw=1, label="one standard error (binomial)")
    )
    if shows_impossible:
        handles.append(
            plt.Rectangle((0, 0), 1, 1, color="0.92", label="impossible: robust above clean")
        )
    ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )


def _limits(values: NDArray, errors: NDArray) -> tuple[float, float]:
    """Of an axis, percent, with room for the labels."""
    low, high = (values - errors).min(), (values + errors).max()
    margin = max(0.18 * (high - low), 1.0)
    return max(low - margin, -1), min(high + margin, 101)


def _mark_impossible(ax: Axes, points: NDArray, labels: Sequence[str]) -> None:
    """Shades where robust accuracy would exceed clean accuracy; rings the points there."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ends = np.array([left, right])
    if top > left:
        ax.fill_between(ends, ends, max(top, right), color="0.92", zorder=0)
        ax.plot(ends, ends, color="0.6", lw=1, zorder=0)
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
    for (x, y), label in zip(points, labels, strict=True):
        if y <= x + 1e-9:
            continue
        ax.plot(x, y, "o", ms=20, mfc="none", mec="red", mew=1.5)
        ax.annotate(
            "impossible:\nrobust above clean", (x, y), (0, -14), textcoords="offset points",
            ha="center", va="top", color="red", fontsize=9,
        )  # fmt: skip
        warnings.warn(
            f"{label}: robust accuracy {y:.1f} % above clean accuracy {x:.1f} %, impossible with "
            "true labels; its result file is wrong",
            stacklevel=3,
        )


# --------------------------------------------------------------------------- one model


def survival_curves(result: Evaluation) -> Figure:
    """Robust accuracy while an attack of steps and restarts with true labels goes on.

    Left: after each iteration of the first restart; right: after each restart.
    """
    images, attack = result.images, result.summary["attack"]
    n, correct = len(images), result.is_clean.sum()
    fell_in = images["restart"].astype("float").where(result.is_clean).to_numpy()
    fell_at = images["iteration"].astype("float").to_numpy()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    iterations = np.arange(attack["steps"] + 1)
    first = [correct - ((fell_in == 1) & (fell_at <= k)).sum() for k in iterations]
    axes[0].step(iterations, 100 * np.array(first) / n, where="post", color="0.2")
    axes[0].set_xlabel("iteration of the first restart (0: its random start)")
    numbers = np.arange(attack["restarts"] + 1)
    after = [correct - (fell_in <= r).sum() for r in numbers]
    axes[1].plot(numbers, 100 * np.array(after) / n, "o-", color="0.2")
    axes[1].set_xlabel("restarts done (0: clean)")
    axes[0].set_ylabel(f"still standing, % of {n} images")
    for ax in axes:
        ax.axhline(100 * result.is_clean.mean(), color="0.6", ls=":", label="clean")
        ax.set_ylim(0, None)
        ax.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    return figure


def robustness_curve(curves: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Robust accuracy against radius.

    Args:
        curves: {label: `CheckReport.curve` of kaf_study.sanity_checks}, labels as in `by_layer`.
    """
    ax = axes_or_new(ax, (6, 4))
    series = labelled(curves)
    for one in series:
        accuracy = np.array(one.data["accuracy"])
        error = np.sqrt(accuracy * (1 - accuracy) / one.data["n"])
        ax.errorbar(
            one.data["eps"], 100 * accuracy, 100 * error, marker="o", capsize=3,
            color=one.color, label=one.label,
        )  # fmt: skip
    radii = sorted({radius for one in series for radius in one.data["eps"]})
    ax.set_xscale("symlog", base=2, linthresh=1)
    ax.set_xticks(radii, [str(radius) for radius in radii])
    ax.set_ylim(0, None)
    ax.set_xlabel("L-inf radius eps, in 255ths")
    n = sorted({one.data["n"] for one in series})
    ax.set_ylabel(f"robust accuracy, % of {', '.join(map(str, n))} images")
    ax.set_title("PGD-20-1, step eps/4; bars: one standard error", fontsize=10)
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


MINIMAL = ("deepfool", "deepfool-linf")  # attacks that end at the nearest point they find


def smallest_perturbations(
    results: pd.DataFrame, ax: Axes | None = None, *, protocol: str | None = None
) -> Axes:
    """The share of images that stand against the L-inf norm of the perturbation found for each.

    Its median is that of the images that are right when clean; one that was not found is beyond the
    radius of the attack.

    Args:
        results: of `kaf_study.records.read_results`; those of `MINIMAL` are drawn. Let no ball cut
            them (--eps 255).
        protocol: name of the result files, where there are several.
    """
    results = results[results["attack"].isin(MINIMAL)]
    if results.empty:
        raise InputError(
            f"no results of {' or '.join(MINIMAL)}; make them with "
            "robustness_eval.py MODEL --attack deepfool-linf --eps 255"
        )
    rows = with_training(_one_protocol(results, "true", protocol))
    rows = rows.sort_values("training", key=lambda models: models.map(model_order))
    ax = axes_or_new(ax, (8, 4.8))
    found = []
    for path in rows["path"]:
        result = Evaluation.read(Path(path))
        distance = 255 * result.images["linf"].where(~result.is_robust, np.inf)
        found.append(distance.where(result.is_clean, 0).sort_values().to_numpy(float))
    most = max(np.quantile(one[np.isfinite(one)], 0.99) for one in found)
    for one, label, activation in zip(found, rows["label"], rows["activation"], strict=True):
        median = np.median(one[one > 0])
        text = f"{label}: {median:.1f}" if np.isfinite(median) else f"{label}: beyond the radius"
        standing = 100 * (1 - np.arange(len(one) + 1) / len(one))
        ax.step([0, *one], standing, where="post", color=color_of(activation), label=text)
    ax.set_xlim(0, most)
    ax.set_ylim(0, None)
    ax.set_xlabel("L-inf norm of the perturbation, in 255ths")
    ax.set_ylabel(f"still standing, % of {len(found[0]):,} images")
    ax.legend(title="median of those right when clean", frameon=False, fontsize=9)
    training = common_training(t for t in rows["training"] if t is not None)
    _title(ax, training, rows["protocol"].iloc[0])
    ax.grid(alpha=0.3)
    return ax


# --------------------------------------------------------------------------- images


def adversarial_examples(
    x: NDArray,
    x_adv: NDArray,
    y: NDArray,
    clean_logits: NDArray,
    adv_logits: NDArray,
    class_names: Sequence[str],
    indices: Sequence[int] | NDArray[np.integer],
) -> Figure:
    """One row for each of K attacked images: clean, perturbation (scaled to be seen), attacked.

    Args:
        x, x_adv: (K, H, W, C) in [0, 1]. y: true labels (K,).
        clean_logits, adv_logits: (K, classes); under each image stand the class and its softmax.
        indices: numbers of the images in the test set (K,).
    """
    count = len(x)
    figure, axes = plt.subplots(
        count, 3, figsize=(6, 2.15 * count + 0.7), squeeze=False, layout="constrained"
    )
    scale = max(float(np.abs(x_adv - x).max()), 1e-9)
    for row in range(count):
        perturbation = 0.5 + (x_adv[row] - x[row]) / (2 * scale)
        for ax, image in zip(axes[row], (x[row], perturbation, x_adv[row]), strict=True):
            ax.imshow(np.clip(image, 0, 1))
            ax.set_xticks([])
            ax.set_yticks([])
        axes[row, 0].set_ylabel(f"test image {indices[row]}\n{class_names[y[row]]}", fontsize=9)
        for ax, logits in ((axes[row, 0], clean_logits[row]), (axes[row, 2], adv_logits[row])):
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            ax.set_xlabel(f"{class_names[p.argmax()]}, {p.max():.0%}", fontsize=9)
    titles = ("clean", f"perturbation\ngrey: 0, white: +{255 * scale:.3g}/255", "attacked")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    return figure


def image_rows(rows: Mapping[str, NDArray], titles: Sequence[str] = ()) -> Figure:
    """Images side by side: {label: images (K, H, W, C) in [0, 1]}, one row each; titles (K,)."""
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.15 * count + 1, 1.25 * len(rows) + 0.3),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_frame_on(False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label, fontsize=9)
        for ax, image in zip(row, images, strict=False):
            ax.imshow(np.clip(image, 0, 1))
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize=9)
    return figure
