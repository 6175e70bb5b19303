"""Every plot of the study, each drawn from result files or a model.

    python -m kaf_study.figures scatter models/* --out imgs/scatter.png
    python -m kaf_study.figures curves models/* --out imgs/curves.png
    python -m kaf_study.figures shapes models/NAME --out imgs/kaf_shapes.png   # or several

Accuracies are fractions in files and code, percent in figures. One colour per activation, the same
everywhere; where colours alone might not be told apart, marker, line style or a label says it too.
"""

import re
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from kaf_study import CommandParser, InputError
from kaf_study.activations import ACTIVATION_COLORS, ACTIVATION_LABELS
from kaf_study.model_folder import (
    model_labels,
    trained_models,
    with_training,
)
from kaf_study.records import make_writable, read_results, write_atomically

OTHER_COLOR = "#666666"  # a model whose activation is not known


# --------------------------------------------------------------------------- names and results


def activation_of(label):
    """The activation that a label names before its first comma ("KAF_ELU, seed 1"), or None."""
    name = label.split(",")[0].strip().lower().replace("-", "")
    return name if name in ACTIVATION_COLORS else None


def color_of(label):
    return ACTIVATION_COLORS.get(activation_of(label), OTHER_COLOR)


def _is_kaf(label):
    return (activation_of(label) or "").startswith("kaf")


def _one_protocol(results, labels, protocol):
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


# --------------------------------------------------------------------------- accuracy, robustness


def accuracy_robustness_scatter(results, labels="true", ax=None, *, protocol=None):
    """Clean accuracy (x) against accuracy under attack (y), percent, one point for each model.

    Error bars are one binomial standard error. With true labels an image that is robust is also
    correct, so a point above the diagonal is impossible: it is ringed, and warned of.

    Args:
        results: of `kaf_study.records.read_results`.
        labels: "true", or "predicted" to draw what is not a robust accuracy.
        protocol: name of the result files (pgd-50-10-true), where there are several.

    Returns:
        The Axes.
    """
    rows = with_training(_one_protocol(results, labels, protocol)).reset_index(drop=True)
    if labels == "true":
        value, error = "robust_accuracy", "robust_standard_error"
    else:
        value, error = "accuracy_under_attack_predicted_labels", "standard_error_predicted_labels"
    x, x_error = 100 * rows["clean_accuracy"], 100 * rows["clean_standard_error"]
    y, y_error = 100 * rows[value].astype(float), 100 * rows[error].astype(float)
    if ax is None:
        _, ax = plt.subplots(figsize=(7.5, 5.5), layout="constrained")

    for i, row in rows.iterrows():
        color = ACTIVATION_COLORS.get(row["activation"], OTHER_COLOR)
        ax.errorbar(
            x[i],
            y[i],
            xerr=x_error[i],
            yerr=y_error[i],
            color=color,
            elinewidth=1,
            capsize=2.5,
            alpha=0.55,
        )
        marker, size = _marker(row["activation"])
        ax.plot(x[i], y[i], marker, color=color, ms=size, mec="white", mew=0.6, zorder=3)
    _limits(ax, x, x_error, y, y_error)
    impossible = (y > x + 1e-9) & (labels == "true")
    if labels == "true":
        _mark_impossible(ax, x[impossible], y[impossible], rows["label"][impossible])
    trainings = [training for training in rows["training"] if training is not None]
    ax.set_title(_what(trainings), fontsize=12, pad=24)
    ax.text(
        0.5,
        1.015,
        rows["protocol"][0],
        transform=ax.transAxes,
        ha="center",
        va="bottom",
        fontsize=9,
    )
    ax.set_xlabel("clean accuracy (%)")
    ax.set_ylabel(
        "robust accuracy (%)"
        if labels == "true"
        else "accuracy under attack, predicted labels (%)\n(not a robust accuracy)"
    )
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    shows_impossible = labels == "true" and ax.get_ylim()[1] > ax.get_xlim()[0]
    _marker_legend(ax, rows["activation"], shows_impossible)
    colors = [ACTIVATION_COLORS.get(a, OTHER_COLOR) for a in rows["activation"]]
    _label_points(ax, x, y, x_error, y_error, rows["label"], colors)  # last: it needs the layout
    return ax


MARKERS = {  # kind of activation -> marker, size
    "fixed activation": ("d", 10),
    "KAF, random start": ("P", 11),
    "KAF, ridge start": ("X", 10),
    "k-WTA": ("o", 8),
    "other": ("s", 7),
}


def _kind(activation):
    if activation in ("kaf", "kaf_free"):
        return "KAF, random start"
    if activation in ("kaf_relu", "kaf_elu", "kaf_swish"):
        return "KAF, ridge start"
    if activation == "kwta":
        return "k-WTA"
    return "fixed activation" if activation in ACTIVATION_COLORS else "other"


def _marker(activation):
    return MARKERS[_kind(activation)]


def _marker_legend(ax, activations, shows_impossible):
    kinds = {_kind(activation) for activation in activations}
    handles = [
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


def _what(models):
    """What the models have in common, in words: "ResNet20 on CIFAR-10 (15 epochs of ...)"."""

    def shared(values):
        values = set(values)
        return values.pop() if len(values) == 1 else None

    architecture = shared(model.settings.get("architecture") for model in models)
    names = {"light_cnn": "light CNN", "vgg": "VGG", None: "accuracy and robustness"}
    words = [names.get(architecture) or re.sub(r"^resnet", "ResNet", architecture)]
    if dataset := shared(model.dataset_label for model in models):
        words.append(f"on {dataset}")
    if epochs := shared(model.settings.get("epochs") for model in models):
        kinds = {True: "ordinary ", False: "fast adversarial ", None: ""}
        kind = kinds[shared(model.settings.get("epsilon") == 0 for model in models)]
        words.append(f"({epochs} epochs of {kind}training)")
    return " ".join(words)


def _limits(ax, x, x_error, y, y_error):
    for values, error, set_limits in ((x, x_error, ax.set_xlim), (y, y_error, ax.set_ylim)):
        low, high = (values - error).min(), (values + error).max()
        margin = max(0.18 * (high - low), 1.0)
        set_limits(max(low - margin, -1), min(high + margin, 101))


def _mark_impossible(ax, x, y, labels):
    """Shades where robust accuracy would exceed clean accuracy; rings the points there."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ends = np.array([left, right])
    if top > left:
        ax.fill_between(ends, ends, max(top, right), color="0.92", zorder=0)
        ax.plot(ends, ends, color="0.6", lw=1, zorder=0)
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
    for px, py, label in zip(x, y, labels, strict=True):
        ax.plot(px, py, "o", ms=20, mfc="none", mec="red", mew=1.5)
        ax.annotate(
            "impossible:\nrobust above clean", (px, py), (0, -14), textcoords="offset points",
            ha="center", va="top", color="red", fontsize=9,
        )  # fmt: skip
        warnings.warn(
            f"{label}: robust accuracy {py:.1f} % above clean accuracy {px:.1f} %, impossible with "
            "true labels; its result file is wrong",
            stacklevel=3,
        )


def _label_points(ax, x, y, x_error, y_error, labels, colors):
    """A text beside each point, where it covers least of the others, their bars and labels."""
    figure = ax.figure
    figure.canvas.draw()  # positions in pixels are known after this
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    place = ax.transData.transform
    centres = place(np.column_stack([x, y]))
    reach = place(np.column_stack([x + x_error, y + y_error])) - centres
    boxes = []  # left, bottom, right, top of all that should stay visible
    for (px, py), (rx, ry) in zip(centres, reach, strict=True):
        marker, bar = 7 * scale, 2 * scale
        boxes.append((px - marker, py - marker, px + marker, py + marker))
        boxes.append((px - rx, py - bar, px + rx, py + bar))
        boxes.append((px - bar, py - ry, px + bar, py + ry))
    frame = ax.get_window_extent(renderer)

    for i in np.argsort(-centres[:, 1]):
        text = ax.annotate(
            labels[i], (x[i], y[i]), (0, 0), textcoords="offset points", color=colors[i],
            fontsize=10, fontweight="bold", va="bottom",
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height

        def box(distance, angle, i=i, width=width, height=height):
            # the label's centre lies on an ellipse around the point
            dx = np.cos(angle) * (width / 2 + distance * scale)
            dy = np.sin(angle) * (height / 2 + distance * scale)
            px, py = centres[i] + (dx, dy)
            return px - width / 2, py - height / 2, px + width / 2, py + height / 2

        def cost(distance, angle, box=box):
            this = box(distance, angle)
            outside = (
                max(0, frame.x0 - this[0]) + max(0, this[2] - frame.x1)
                + max(0, frame.y0 - this[1]) + max(0, this[3] - frame.y1)
            )  # fmt: skip
            return sum(_overlap(this, b) for b in boxes) + 100 * outside + 0.5 * distance

        angles = np.radians([45, 135, -45, -135, 0, 180, 90, -90, 22, 158, -22, -158])
        options = [(distance, angle) for distance in (9, 14, 20, 28, 38) for angle in angles]
        best = min(options, key=lambda option: cost(*option))
        chosen = box(*best)
        boxes.append(chosen)
        text.set_position((np.array(chosen[:2]) - centres[i]) / scale)
        if best[0] > 14:  # far away: say whose label it is
            ax.annotate(
                "",
                (x[i], y[i]),
                tuple(_nearest(chosen, centres[i]) - centres[i]),
                textcoords="offset pixels",
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.5"},
            )


def _overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _nearest(box, point):
    return np.clip(point, box[:2], box[2:])


# --------------------------------------------------------------------------- training


CURVES = {
    "loss": "training loss",
    "probe_clean": "clean accuracy (%)",
    "probe_fgsm": "FGSM accuracy (%)",
    "probe_pgd": "PGD-10 accuracy (%)",
}


def training_curves(histories, *, title=None, loss="training loss (perturbed batches)"):
    """Loss, and clean, FGSM and PGD accuracy on the probe images, by epoch.

    Args:
        histories: {label: history}, a label being an activation's name, perhaps with more after a
            comma ("swish, seed 1"), a history what history.csv holds (a DataFrame or its path).
        loss: label of its axis.

    Returns:
        The Figure.
    """
    if not histories:
        raise InputError("no finished model folders were given: there are no curves to draw")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    drawn = []  # activations so far
    for label, history in histories.items():
        if not isinstance(history, pd.DataFrame):
            history = pd.read_csv(history)
        marker = "os^v*"[drawn.count(activation_of(label)) % 5]
        drawn.append(activation_of(label))
        name = ACTIVATION_LABELS.get(label, label)
        for ax, column in zip(axes.flat, CURVES, strict=True):
            ax.plot(
                history["epoch"] + 1,
                history[column] * (1 if column == "loss" else 100),
                color=color_of(label),
                ls="-" if _is_kaf(label) else "--",
                marker=marker,
                ms=4,
                lw=1.6,
                label=name,
            )
    accuracies = axes.flat[1:]
    top = max(ax.get_ylim()[1] for ax in accuracies)
    for ax, what in zip(axes.flat, (CURVES | {"loss": loss}).values(), strict=True):
        ax.set_ylabel(what)
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in accuracies:  # one scale: FGSM far above PGD is catastrophic overfitting
        ax.set_ylim(0, min(top, 101))
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False
    )
    figure.suptitle(title or "Fast adversarial training, probed on validation images", fontsize=12)
    return figure


# --------------------------------------------------------------------------- shapes of the KAFs


def kaf_layers(model):
    """All Kaf layers of a model, first to last."""
    from activationsf import Kaf

    return [layer for layer in model._flatten_layers() if isinstance(layer, Kaf)]


def kaf_activation(layer):
    """The name under which the study's tables have a Kaf layer."""
    if layer.moving:
        return "kaf_free"
    ridge = getattr(layer.ridge, "__name__", None)
    name = {"silu": "kaf_swish"}.get(ridge, f"kaf_{ridge}")
    return name if name in ACTIVATION_COLORS else "kaf"


def kaf_values(layer, x):
    """The layer's functions at the points x (N,): (N, C)."""
    channels = layer.alpha.shape[-1]
    return np.asarray(layer(np.repeat(np.float32(x)[:, None], channels, axis=1)))


def kaf_shapes(model, *, initial=None, channels=6, limit=4.0, title=None):
    """The functions of a model's Kaf layers, one panel for each layer, over where they started.

    Args:
        model: trained model with Kaf layers.
        initial: the same model before training, for the starts of the same channels. Without it
            the ridge start is drawn, which the layers know, and no random one.
        channels: how many of each layer's are drawn, evenly spaced by number.
        limit: of x, in units of the pre-activation. The dictionary's range is shaded.

    Returns:
        The Figure.
    """
    layers = kaf_layers(model)
    if not layers:
        raise InputError(f"{model.name!r} has no Kaf layers, so there are no shapes to draw")
    starts = kaf_layers(initial) if initial is not None else [None] * len(layers)
    if len(starts) != len(layers):
        raise InputError(
            f"the initial model has {len(starts)} Kaf layers, the trained one {len(layers)}"
        )
    columns = min(5, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns + 0.6, 1.9 * rows + 1.1), sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    start_name = None
    for number, (ax, layer, start) in enumerate(
        zip(axes.flat, layers, starts, strict=False), start=1
    ):
        start_name = _draw_kafs(ax, layer, start, channels, limit)
        ax.set_title(f"{number}: {_size(layer)}", fontsize=9, pad=3)
    for ax in list(axes.flat)[len(layers) :]:
        ax.set_axis_off()
    for column in range(columns):  # the lowest panel of each column shows the numbers
        lowest = max(r for r in range(rows) if r * columns + column < len(layers))
        axes[lowest, column].tick_params(labelbottom=True)
        axes[lowest, column].set_xlabel("pre-activation x", fontsize=9)
    activation = kaf_activation(layers[0])
    _kaf_legend(figure, ACTIVATION_COLORS[activation], start_name)
    figure.suptitle(
        (title or f"{ACTIVATION_LABELS[activation]} in {model.name}")
        + f": up to {channels} channels of each layer",
        fontsize=11,
    )
    return figure


def _draw_kafs(ax, layer, start, channels, limit):
    """Some channels of one Kaf layer over where they started; returns what the start is called."""
    x = np.linspace(-limit, limit, 201)
    chosen = _evenly(layer.alpha.shape[-1], channels)
    if layer.moving:  # where the trained points of these channels lie
        points = np.asarray(layer.dictionary)[:, chosen]
        shaded = points.min(), points.max()
    else:
        shaded = -layer.boundary, layer.boundary
    ax.axvspan(*shaded, color="0.93", zorder=0)
    ax.axhline(0, color="0.75", lw=0.6, zorder=1)
    trained = kaf_values(layer, x)[:, chosen]
    ax.plot(x, trained, color=ACTIVATION_COLORS[kaf_activation(layer)], lw=1, alpha=0.75)
    start_name = None
    begun = np.empty((len(x), 0))
    if layer.ridge is not None:
        begun = kaf_values(_fresh(layer), x)[:, :1]
        ridge = getattr(layer.ridge, "__name__", "")
        name = ACTIVATION_LABELS.get({"silu": "swish"}.get(ridge, ridge), ridge)
        start_name = f"start: ridge fit of {name}"
    elif start is not None:
        begun = kaf_values(start, x)[:, chosen]
        start_name = "random start of the same channels"
    ax.plot(x, begun, color="black", lw=1, ls=(0, (4, 2)), alpha=0.8 if layer.ridge else 0.35)
    ax.tick_params(labelsize=8)
    ax.set_xlim(-limit, limit)
    return start_name


def _kaf_legend(figure, color, start_name):
    handles = [Line2D([], [], color=color, label="after training")]
    if start_name:
        handles.append(Line2D([], [], color="black", lw=1, ls=(0, (4, 2)), label=start_name))
    handles.append(plt.Rectangle((0, 0), 1, 1, color="0.93", label="range of the dictionary"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.supylabel("activation g(x)", fontsize=10)


def kaf_shapes_side_by_side(models, *, panels=5, channels=6, limit=4.0, title=None):
    """One row for each model, one column for each of some layers: what became of which start.

    Args:
        models: {label: (model, the same model before training, or None)}, all with the same layers;
            a label being an activation's name, perhaps with more after a comma.
        panels: how many layers are drawn, evenly spaced, first and last included.
        channels, limit: as in `kaf_shapes`.

    Returns:
        The Figure.
    """
    rows = {
        label: (kaf_layers(model), kaf_layers(initial) if initial is not None else None)
        for label, (model, initial) in models.items()
    }
    counts = {len(layers) for layers, _ in rows.values()}
    if len(counts) != 1 or counts == {0}:
        raise InputError(
            f"the models must have the same number of Kaf layers; they have {sorted(counts)}"
        )
    columns = _evenly(counts.pop(), panels)
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(2.1 * len(columns) + 0.8, 1.6 * len(rows) + 1.1),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, (label, (layers, starts)) in zip(axes, rows.items(), strict=True):
        for ax, index in zip(row, columns, strict=True):
            _draw_kafs(ax, layers[index], starts and starts[index], channels, limit)
        row[0].set_ylabel(label, fontsize=9, fontweight="bold", color=color_of(label))
    for top, bottom, index in zip(axes[0], axes[-1], columns, strict=True):
        top.set_title(f"layer {index + 1}: {_size(layers[index])}", fontsize=9, pad=3)
        bottom.set_xlabel("pre-activation x", fontsize=9)
    _kaf_legend(figure, "0.4", "start (random: of the same channels)")
    figure.suptitle(
        f"{title or 'KAFs after training'}: up to {channels} channels of each layer", fontsize=11
    )
    return figure


def _evenly(count, wanted):
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _fresh(layer):
    fresh = type(layer).from_config(layer.get_config())
    fresh.build((None, layer.alpha.shape[-1]))
    return fresh


def _size(layer):
    """Layer's output in words: 32x32, 16 channels."""
    *positions, channels = layer.output.shape[1:]
    return f"{'×'.join(map(str, positions))}{', ' if positions else ''}{channels} ch."


def initial_network(model):
    """The network of a TrainedModel as it was before training: same settings, same seed."""
    import keras

    from kaf_study.train import TrainConfig, build_network

    keras.utils.set_random_seed(model.settings["seed"])
    return build_network(TrainConfig(**model.settings))


# --------------------------------------------------------------------------- adversarial examples


def adversarial_examples(x, x_adv, y, clean_logits, adv_logits, class_names, indices):
    """One row for each of K attacked images: clean, perturbation (scaled to be seen), attacked.

    Args:
        x, x_adv: (K, H, W, C) in [0, 1]. y: true labels (K,).
        clean_logits, adv_logits: (K, classes); under each image stand the class and its softmax.
        indices: numbers of the images in the test set (K,).

    Returns:
        The Figure.
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


# --------------------------------------------------------------------------- for the notebooks


def image_rows(rows, titles=None):
    """Images side by side: {label: images (K, H, W, C) in [0, 1]}, one row each; titles (K,)."""
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows),
        count,
        figsize=(1.15 * count + 1, 1.25 * len(rows) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_frame_on(False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label, fontsize=9)
        for ax, image in zip(row, images, strict=False):
            ax.imshow(np.clip(image, 0, 1))
    for ax, title in zip(axes[0], titles if titles is not None else [], strict=False):
        ax.set_title(title, fontsize=9)
    return figure


def kaf_starts(targets=("elu", "swish"), channels=6, seed=0):
    """What a Kaf is before training: random coefficients, and the ridge fit of each target.

    A ridge start is drawn with its D terms alpha_i kappa(x, d_i) and the function it fits.
    """
    import keras

    from activationsf import Kaf

    x = np.linspace(-5, 5, 400, dtype="float32")
    figure, axes = plt.subplots(
        1, 1 + len(targets), figsize=(4 * (1 + len(targets)), 3.4), layout="constrained"
    )
    keras.utils.set_random_seed(seed)
    layer = Kaf()
    g = keras.ops.convert_to_numpy(layer(np.repeat(x[:, None], channels, axis=1)))
    axes[0].plot(x, g, color=ACTIVATION_COLORS["kaf"], lw=1)
    axes[0].set_title(f"random start: {channels} channels", fontsize=10)
    for ax, target in zip(axes[1:], targets, strict=True):
        layer = Kaf(ridge=target)
        g = keras.ops.convert_to_numpy(layer(x[:, None]))[:, 0]
        alpha = keras.ops.convert_to_numpy(layer.alpha)[:, 0]
        dictionary = np.linspace(-layer.boundary, layer.boundary, layer.D)
        gamma = 1 / (6 * (dictionary[1] - dictionary[0]) ** 2)
        terms = alpha * np.exp(-gamma * (x[:, None] - dictionary) ** 2)
        ax.plot(x, terms, color="0.75", lw=0.7)
        ax.plot([], [], color="0.75", lw=0.7, label="terms of the sum")
        fitted = keras.ops.convert_to_numpy(keras.activations.get(target)(x))
        ax.plot(x, fitted, color=ACTIVATION_COLORS.get(target), ls="--", label=target)
        ax.plot(x, g, color=ACTIVATION_COLORS.get(f"kaf_{target}", "C1"), label=f"KAF_{target}")
        low, high = min(g.min(), fitted.min()), max(g.max(), fitted.max())
        ax.set_ylim(low - 0.5, high + 0.5)
        ax.set_title(f"ridge start: {target}; terms up to {np.abs(terms).max():.0f}", fontsize=10)
        ax.legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.axvspan(-3, 3, color="0.93", zorder=0)
        ax.set_xlabel("pre-activation x (dictionary range shaded)")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("g(x)")
    return figure


def survival_curves(images, steps, restarts):
    """Robust accuracy while an attack with true labels goes on, from one result's rows per image.

    Left: after each iteration of the first restart; right: after each restart.

    Args:
        images: `Evaluation.images`, of a single attack. steps, restarts: of that attack.
    """
    clean = images["label"] == images["clean_prediction"]
    n = len(images)
    fell_in = images["restart"].astype("float").where(clean).to_numpy()
    fell_at = images["iteration"].astype("float").to_numpy()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    iterations = np.arange(steps + 1)
    first = [clean.sum() - ((fell_in == 1) & (fell_at <= k)).sum() for k in iterations]
    axes[0].step(iterations, 100 * np.array(first) / n, where="post", color="0.2")
    axes[0].set_xlabel("iteration of the first restart (0: its random start)")
    numbers = np.arange(restarts + 1)
    after = [clean.sum() - (fell_in <= r).sum() for r in numbers]
    axes[1].plot(numbers, 100 * np.array(after) / n, "o-", color="0.2")
    axes[1].set_xlabel("restarts done (0: clean)")
    axes[0].set_ylabel(f"still standing, % of {n} images")
    for ax in axes:
        ax.axhline(100 * clean.mean(), color="0.6", ls=":", label="clean")
        ax.set_ylim(0, None)
        ax.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    return figure


# --------------------------------------------------------------------------- tables in texts


def put_table_into(path, table, name="table"):
    """Rewrites what stands between <!-- name --> and <!-- /name --> in a text file."""
    path = Path(path)
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error})") from None
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (start and end) or opening in after:
        raise InputError(f"{str(path)!r} must hold {opening} and, after it, {closing}, once each")
    write_atomically(path, f"{before}{start}\n{table}\n{end}{after}".encode())


# ---------------------------------------------------------------- notebook figures: insights


def layer_activation(layer):
    """The name under which the study's tables have an activation layer, or its own."""
    if layer.__class__.__name__ == "Kwta":
        return "kwta"
    if hasattr(layer, "alpha"):
        return kaf_activation(layer)
    return {"silu": "swish"}.get(layer.activation.__name__, layer.activation.__name__)


def activation_histograms(
    model, clean, attacked, *, limit=6.0, panels=6, channels=4, functions=True, title=None
):
    """Pre-activations of some layers, clean against attacked, with the activation over them.

    Args:
        clean, attacked: of `kaf_study.insights.histograms` with this `limit`, (L, bins + 2).
        panels: how many layers are drawn, evenly spaced, first and last included.
        channels: how many functions of each KAF layer are drawn.
        functions: False leaves the activation out (it does not act on channel means).

    Returns:
        The Figure.
    """
    from kaf_study.insights import activation_layers

    layers = activation_layers(model)
    chosen = _evenly(len(layers), panels)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.2 * rows + 0.9), sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    edges = np.linspace(-limit, limit, clean.shape[1] - 1)
    density = 1 / (edges[1] - edges[0])
    z = np.linspace(-limit, limit, 241)
    name = layer_activation(layers[0])
    color = ACTIVATION_COLORS.get(name, OTHER_COLOR)
    for place, (ax, index) in enumerate(zip(axes.flat, chosen, strict=False)):
        layer = layers[index]
        ax.stairs(density * clean[index, 1:-1], edges, fill=True, color="0.8")
        ax.stairs(density * attacked[index, 1:-1], edges, color=color, lw=1.4)
        ax.set_title(f"layer {index + 1}: {_size(layer)}", fontsize=9, pad=3)
        ax.tick_params(labelsize=8)
        ax.set_xlim(-limit, limit)
        ax.set_ylim(0, None)
        if functions and name != "kwta":
            values = kaf_values(layer, z) if _is_kaf(name) else np.asarray(layer(z[:, None]))
            second = ax.twinx()
            shown = _evenly(values.shape[1], channels)
            second.plot(z, values[:, shown], color="black", lw=0.9, ls=(0, (3, 1.5)), alpha=0.75)
            second.tick_params(labelsize=8)
            if place % columns == columns - 1 or index == chosen[-1]:
                second.set_ylabel("g(z)", fontsize=9)
        if _is_kaf(name) and not layer.moving and functions:
            for end in (-layer.boundary, layer.boundary):
                ax.axvline(end, color="0.45", lw=0.9, ls=":")
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_axis_off()
    handles = [
        plt.Rectangle((0, 0), 1, 1, color="0.8", label="clean images"),
        Line2D([], [], color=color, lw=1.4, label="attacked images"),
    ]
    if functions and name != "kwta":
        many = f" (up to {channels} channels)" if _is_kaf(name) else ""
        handles.append(
            Line2D([], [], color="black", lw=0.9, ls=(0, (3, 1.5)), label=f"activation g{many}")
        )
    if _is_kaf(name) and functions:
        handles.append(Line2D([], [], color="0.45", lw=0.9, ls=":", label="ends of the dictionary"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    for ax in axes[-1]:
        ax.set_xlabel("pre-activation z" if functions else "channel mean of z", fontsize=9)
    figure.supylabel("density", fontsize=10)
    figure.suptitle(title or f"{ACTIVATION_LABELS.get(name, name)} in {model.name}", fontsize=11)
    return figure


LINE_STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))


def by_layer(curves, *, ylabel, ax=None, log=False, reference=None, title=None, legend=True):
    """One line for each network over its layers, with a band where there is an interval.

    Args:
        curves: {label: Series, or DataFrame with value, low and high, indexed by layer}; a label
            being an activation's name, perhaps with more after a comma ("kaf, depth 56"), which
            gives the colour; lines of one activation differ in style. Values that are not finite
            are crosses above all lines, in a row for each network that has any.
        reference: a y where a thin line is drawn, for ratios: their axis need not begin at 0.

    Returns:
        The Axes.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    drawn, not_finite = [], []
    for label, curve in curves.items():
        kind = drawn.count(activation_of(label)) % len(LINE_STYLES)
        drawn.append(activation_of(label))
        first, *rest = label.split(",")
        name = ",".join([ACTIVATION_LABELS.get(first, first), *rest])
        value = curve["value"] if isinstance(curve, pd.DataFrame) else curve
        finite = value.where(np.isfinite(value))
        line = {"color": color_of(label), "ls": LINE_STYLES[kind], "lw": 1.4, "label": name}
        # A marker on every point would hide the dashes.
        every = (kind, max(1, len(value) // 8)) if kind else None
        marker = _marker(activation_of(label))[0]
        ax.plot(value.index, finite, marker=marker, markevery=every, ms=4, **line)
        if isinstance(curve, pd.DataFrame):
            band = {"color": color_of(label), "alpha": 0.18, "lw": 0}
            ax.fill_between(curve.index, curve["low"], curve["high"], **band)
        if not np.isfinite(value).all():
            which = ",".join(rest).strip() or name
            not_finite.append((value.index[~np.isfinite(value)], color_of(label), which))
    if log:
        ax.set_yscale("log")
    elif reference is None:  # from 0 to above everything drawn, also in panels that share this axis
        panels = ax.get_shared_y_axes().get_siblings(ax)
        ax.set_ylim(0, 1.05 * max(panel.dataLim.y1 for panel in panels))
    if reference is not None:
        ax.axhline(reference, color="0.5", lw=0.8)
    if not_finite:  # room for their rows
        (low, high), share = ax.get_ylim(), 0.08 * len(not_finite) + 0.02
        stretch = share / (1 - share)
        ax.set_ylim(low, high * (high / low) ** stretch if log else high + stretch * (high - low))
    for row, (layers, color, which) in enumerate(not_finite):
        across = ax.get_xaxis_transform()
        height = np.full(len(layers), 0.96 - 0.08 * row)
        ax.plot(layers, height, "x", color=color, ms=5, transform=across, ls="none")
        ax.annotate(
            f"{which}: not finite", (layers[-1], height[0]), (8, 0), xycoords=across,
            textcoords="offset points", color=color, fontsize=8, va="center",
        )  # fmt: skip
    ax.set_xlabel("layer, from the input")
    ax.set_ylabel(ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    if legend:
        ax.legend(fontsize=8, frameon=False, handlelength=3.5)
    if title:
        ax.set_title(title, fontsize=10)
    return ax


def shared_legend(figure, ncols=4):
    """One legend below a figure for all its panels, which show the same networks."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(ncols, len(names)), frameon=False,
        fontsize=9, handlelength=3.5,
    )  # fmt: skip


def training_steps(histories, *, window=10, title=None):
    """Loss and gradient norm of short trainings, step by step.

    Args:
        histories: {label: table of `kaf_study.insights.train_steps`}, labels as in `by_layer`.
        window: steps over which the loss is averaged.

    Returns:
        The Figure.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    losses, norms = {}, {}
    for label, history in histories.items():
        history = history.set_index("step")
        mean = history["loss"].rolling(window, min_periods=1).mean()
        losses[label] = mean.where(np.isfinite(history["loss"]))  # pandas skips what is not finite
        norms[label] = history["gradient_norm"]
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
        "chance: ln 10", (0, np.log(10)), (4, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", fontsize=8, color="0.35",
    )  # fmt: skip
    shared_legend(figure, ncols=3)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def movement_and_robustness(points, *, xlabel, ylabel="robust accuracy (%)", ax=None):
    """One point for each network: a movement (x) with its interval, and a robust accuracy (y).

    Args:
        points: DataFrame indexed by label; x, low, high (of x), and y, error (fractions).

    Returns:
        The Axes.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    for label, row in points.iterrows():
        name, color = activation_of(label), color_of(label)
        marker, size = _marker(name)
        ax.errorbar(
            row["x"],
            100 * row["y"],
            xerr=[[row["x"] - row["low"]], [row["high"] - row["x"]]],
            yerr=100 * row["error"],
            color=color,
            elinewidth=1,
            capsize=2.5,
            marker=marker,
            ms=size,
            mec="white",
            ls="none",
            label=ACTIVATION_LABELS.get(label, label),
        )
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


# --------------------------------------------------------------------------- the command


def parse(argv=None):
    parser = CommandParser(
        prog="python -m kaf_study.figures",
        description="Figures from model folders and their result files.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("scatter", "clean against robust accuracy"),
        ("curves", "loss and probe accuracies by epoch"),
        ("shapes", "the functions of a model's KAF layers, or of several models side by side"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("folders", nargs="+", metavar="MODEL_FOLDER", help="or models/")
        command.add_argument("--out", required=True, metavar="FILE.png")
        if name == "scatter":
            command.add_argument("--labels", choices=("true", "predicted"), default="true")
            command.add_argument("--protocol", help="name of the result files: pgd-50-10-true")
        if name == "shapes":
            command.add_argument("--channels", type=int, default=6, help="drawn per layer (6)")
    return parser.parse_args(argv)


def main(argv=None):
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    matplotlib.use("Agg")
    try:
        run(arguments)
    except InputError as error:
        print(f"kaf_study.figures: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments):
    models = trained_models(*arguments.folders)  # also says if something is not a folder
    if arguments.command == "scatter":
        results = read_results(*arguments.folders)
        ax = accuracy_robustness_scatter(results, arguments.labels, protocol=arguments.protocol)
        figure = ax.figure
    elif arguments.command == "curves":
        labels = model_labels(models)
        images = {str(model.record["results"].get("probe_n")) for model in models}
        title = f"{_what(models)},\nprobed on {', '.join(sorted(images))} validation images"
        # Of ordinary training Keras reports the loss with the regularisation.
        kinds = {model.settings.get("epsilon") == 0 for model in models}
        loss = {(False,): "perturbed batches", (True,): "with l2"}.get(tuple(kinds), "each its own")
        figure = training_curves(
            {labels[model.folder]: model.history for model in models},
            title=title,
            loss=f"training loss ({loss})",
        )
    else:
        figure = _shapes_of_folders(models, arguments.channels)
    save(figure, arguments.out)
    print(arguments.out)


def _shapes_of_folders(models, channels):
    models = [model for model in models if model.activation.startswith("kaf")]
    if not models:
        raise InputError("no finished model with KAFs is there, so there are no shapes to draw")
    if channels < 1:
        raise InputError(f"--channels must be at least 1, got {channels}")
    from kaf_study.saved_models import open_model

    labels = model_labels(models)
    with ExitStack() as stack:
        drawn = {
            labels[model.folder]: (
                stack.enter_context(open_model(str(model.folder))).model,
                initial_network(model),
            )
            for model in models
        }
        if len(drawn) > 1:
            return kaf_shapes_side_by_side(drawn, channels=channels, title=_what(models))
        ((label, (model, initial)),) = drawn.items()
        title = f"{label}, {_what(models)}"
        return kaf_shapes(model, initial=initial, channels=channels, title=title)


def save(figure, path):
    """Writes a figure and closes it; .png, .pdf or .svg by the name's ending."""
    path = Path(path)
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


if __name__ == "__main__":
    sys.exit(main())
