"""Figures of KAFs: the functions that were learned, over where they started."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_COLORS, ACTIVATION_LABELS, STUDIED
from kaf_study.figures.style import color_of, labelled, shared_legend
from kaf_study.model_folder import TrainedModel

if TYPE_CHECKING:  # loaded when a network is looked at
    import keras

START: dict[str, Any] = {"color": "black", "lw": 1, "ls": (0, (4, 2))}
IN_DICTIONARY = "0.93"  # grey behind the range of the dictionary


def layer_activation(layer: "keras.layers.Layer") -> str:
    """The name under which the study's tables have an activation layer, or its own."""
    if layer.__class__.__name__ == "Kwta":
        return "kwta"
    if not hasattr(layer, "alpha"):
        return _function_name(layer.activation)
    if layer.moving:
        return "kaf_free"
    if not layer.trainable:
        return "kaf_frozen"
    if getattr(layer, "base", None) is not None:
        return f"kaf_on_{_function_name(layer.base)}"
    name = f"kaf_{_function_name(layer.ridge)}"
    return name if name in STUDIED else "kaf"


def _function_name(function) -> str:
    """Of a Keras activation, as the study has it: swish, which Keras calls silu."""
    name = getattr(function, "__name__", str(function))
    return {"silu": "swish"}.get(name, name)


def activation_values(layer: "keras.layers.Layer", x: NDArray) -> NDArray:
    """The functions of an activation layer at the points x (N,): (N, C), C = 1 if it has one."""
    channels = layer.alpha.shape[-1] if hasattr(layer, "alpha") else 1
    return np.asarray(layer(np.repeat(np.asarray(x, np.float32)[:, None], channels, axis=1)))


def initial_network(model: TrainedModel) -> "keras.Model":
    """The network of a model folder as it was before training: same settings, same seed."""
    import keras

    from kaf_study.train import TrainConfig, build_network

    keras.utils.set_random_seed(model.settings["seed"])
    return build_network(TrainConfig(**model.settings))


# --------------------------------------------------------------------------- learned shapes


def kaf_shapes(
    model: "keras.Model",
    *,
    initial: "keras.Model | None" = None,
    channels: int = 6,
    limit: float = 4.0,
    title: str | None = None,
) -> Figure:
    """The functions of a model's Kaf layers, one panel for each layer, over where they started.

    Args:
        model: trained model with Kaf layers.
        initial: the same model before training, for the starts of the same channels. Without it
            the start is drawn where the layers know it (ridge fit, base), and no random one.
        channels: how many of each layer's are drawn, evenly spaced by number.
        limit: of x, in units of the pre-activation. The dictionary's range is shaded.
    """
    from activationsf import kaf_layers

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
    for number, (ax, layer, start) in enumerate(
        zip(axes.flat, layers, starts, strict=False), start=1
    ):
        start_name = _draw_kafs(ax, layer, start, channels, limit)
        ax.set_title(f"{number}: {size_in_words(layer)}", fontsize=9, pad=3)
    for ax in list(axes.flat)[len(layers) :]:
        ax.set_axis_off()
    for column in range(columns):  # the lowest panel of each column shows the numbers
        lowest = max(r for r in range(rows) if r * columns + column < len(layers))
        axes[lowest, column].tick_params(labelbottom=True)
        axes[lowest, column].set_xlabel("pre-activation x", fontsize=9)
    activation = layer_activation(layers[0])
    _legend(figure, color_of(activation), start_name)
    title = title or f"{ACTIVATION_LABELS.get(activation, activation)} in {model.name}"
    figure.suptitle(f"{title}: up to {channels} channels of each layer", fontsize=11)
    return figure


def kaf_shapes_side_by_side(
    models: Mapping[str, tuple],
    *,
    panels: int = 5,
    channels: int = 6,
    limit: float = 4.0,
    title: str | None = None,
) -> Figure:
    """One row for each model, one column for each of some layers: what became of which start.

    Args:
        models: {label: (model, the same model before training, or None)}, all with the same number
            of Kaf layers.
        panels: how many layers are drawn, evenly spaced, first and last included.
        channels, limit: as in `kaf_shapes`.
    """
    from activationsf import kaf_layers

    rows = {
        label: (kaf_layers(model), kaf_layers(initial) if initial is not None else None)
        for label, (model, initial) in models.items()
    }
    counts = {len(layers) for layers, _ in rows.values()}
    if len(counts) != 1 or counts == {0}:
        raise InputError(
            f"the models must have the same number of Kaf layers; they have {sorted(counts)}"
        )
    columns = evenly(counts.pop(), panels)
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(2.1 * len(columns) + 0.8, 1.6 * len(rows) + 1.1),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, (label, (layers, starts)) in zip(axes, rows.items(), strict=True):
        for ax, index in zip(row, columns, strict=True):
            _draw_kafs(ax, layers[index], starts and starts[index], channels, limit)
        color = color_of(layer_activation(layers[0]))
        row[0].set_ylabel(label, fontsize=9, fontweight="bold", color=color)
    for top, bottom, index in zip(axes[0], axes[-1], columns, strict=True):
        top.set_title(f"layer {index + 1}: {size_in_words(layers[index])}", fontsize=9, pad=3)
        bottom.set_xlabel("pre-activation x", fontsize=9)
    _legend(figure, "0.4", "start (random: of the same channels)")
    figure.suptitle(
        f"{title or 'KAFs after training'}: up to {channels} channels of each layer", fontsize=11
    )
    return figure


def _draw_kafs(ax: Axes, layer, start, channels: int, limit: float) -> str | None:
    """Some channels of one Kaf layer over where they started; returns what the start is called."""
    x = np.linspace(-limit, limit, 201)
    chosen = evenly(layer.alpha.shape[-1], channels)
    if layer.moving:  # where the trained points of these channels lie
        points = np.asarray(layer.dictionary)[:, chosen]
        shaded = points.min(), points.max()
    else:
        shaded = -layer.boundary, layer.boundary
    ax.axvspan(*shaded, color=IN_DICTIONARY, zorder=0)
    ax.axhline(0, color="0.75", lw=0.6, zorder=1)
    trained = activation_values(layer, x)[:, chosen]
    ax.plot(x, trained, color=color_of(layer_activation(layer)), lw=1, alpha=0.75)
    known = layer.ridge if layer.ridge is not None else getattr(layer, "base", None)
    if known is not None:  # all channels start alike
        name = _function_name(known)
        name = ACTIVATION_LABELS.get(name, name)
        start_name = f"start: ridge fit of {name}" if layer.ridge is not None else f"start: {name}"
        ax.plot(x, activation_values(_fresh(layer), x)[:, :1], alpha=0.8, **START)
    elif start is not None:
        start_name = "random start of the same channels"
        ax.plot(x, activation_values(start, x)[:, chosen], alpha=0.35, **START)
    else:
        start_name = None
    ax.tick_params(labelsize=8)
    ax.set_xlim(-limit, limit)
    return start_name


def _legend(figure: Figure, color: str, start_name: str | None) -> None:
    handles = [Line2D([], [], color=color, label="after training")]
    if start_name:
        handles.append(Line2D([], [], label=start_name, **START))
    box = plt.Rectangle((0, 0), 1, 1, color=IN_DICTIONARY, label="range of the dictionary")
    figure.legend(
        handles=[*handles, box], loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.supylabel("activation g(x)", fontsize=10)


def evenly(count: int, wanted: int) -> NDArray[np.int_]:
    """`wanted` of the numbers 0 to count - 1, evenly spaced, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def size_in_words(layer: "keras.layers.Layer") -> str:
    """Of a layer's output: "32×32, 16 ch."."""
    *positions, channels = layer.output.shape[1:]
    return f"{'×'.join(map(str, positions))}{', ' if positions else ''}{channels} ch."


def _fresh(layer):
    fresh = type(layer).from_config(layer.get_config())
    fresh.build((None, layer.alpha.shape[-1]))
    return fresh


# --------------------------------------------------------------------------- starts


def kaf_starts(
    targets: Sequence[str] = ("elu", "swish"), channels: int = 6, seed: int = 0
) -> Figure:
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
    layer.build((None, channels))
    axes[0].plot(x, activation_values(layer, x), color=ACTIVATION_COLORS["kaf"], lw=1)
    axes[0].set_title(f"random start: {channels} channels", fontsize=10)
    for ax, target in zip(axes[1:], targets, strict=True):
        layer = Kaf(ridge=target)
        layer.build((None, 1))
        _draw_ridge_start(ax, layer, x, target)
    for ax in axes:
        ax.axvspan(-3, 3, color=IN_DICTIONARY, zorder=0)
        ax.set_xlabel("pre-activation x (dictionary range shaded)")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("g(x)")
    return figure


def _draw_ridge_start(ax: Axes, layer, x: NDArray, target: str) -> None:
    g = activation_values(layer, x)[:, 0]
    alpha = np.asarray(layer.alpha)[:, 0]
    dictionary = np.linspace(-layer.boundary, layer.boundary, layer.D)
    gamma = 1 / (6 * (dictionary[1] - dictionary[0]) ** 2)
    terms = alpha * np.exp(-gamma * (x[:, None] - dictionary) ** 2)
    fitted = np.asarray(layer.ridge(x))
    ax.plot(x, terms, color="0.75", lw=0.7)
    ax.plot([], [], color="0.75", lw=0.7, label="terms of the sum")
    ax.plot(x, fitted, color=color_of(target), ls="--", label=target)
    ax.plot(x, g, color=ACTIVATION_COLORS.get(f"kaf_{target}", "C1"), label=f"KAF_{target}")
    low, high = min(g.min(), fitted.min()), max(g.max(), fitted.max())
    ax.set_ylim(low - 0.5, high + 0.5)
    ax.set_title(f"ridge start: {target}; terms up to {np.abs(terms).max():.0f}", fontsize=10)
    ax.legend(frameon=False, fontsize=8)


# --------------------------------------------------------------------------- derivatives


def functions_and_derivatives(
    layers: Mapping[str, "keras.layers.Layer"], *, channel: int = 0, limit: float = 4.0
) -> Figure:
    """Activations and their first derivatives, side by side.

    Args:
        layers: {label: activation layer}, labels as in `by_layer`.
        channel: which of a Kaf's functions is drawn.
        limit: of x.
    """
    x = np.linspace(-limit, limit, 2 * 200)  # not at 0, where ReLU has no derivative
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for number, one in enumerate(labelled(layers)):
        curves = value_and_derivative(one.data, x, channel)
        width = max(1.2, 3.4 - 0.8 * number)  # what lies below another line is seen
        for ax, values in zip((left, right), curves, strict=True):
            values = np.where(np.abs(np.diff(values, append=values[-1])) > 0.5, np.nan, values)
            ax.plot(x, values, color=one.color, lw=width, label=one.label)  # a jump is no line
    for ax, name in ((left, "g(x)"), (right, "g'(x)")):
        ax.set_xlabel("pre-activation x")
        ax.set_ylabel(name)
        ax.grid(alpha=0.25)
    shared_legend(figure)
    return figure


def value_and_derivative(
    layer: "keras.layers.Layer", x: NDArray, channel: int = 0
) -> tuple[NDArray, NDArray]:
    """g(x) and g'(x), (N,) each, at the points x (N,), of one channel of a Kaf."""
    import tensorflow as tf

    channels = layer.alpha.shape[-1] if hasattr(layer, "alpha") else 1
    points = tf.constant(np.repeat(np.asarray(x, np.float32)[:, None], channels, axis=1))
    with tf.GradientTape() as tape:
        tape.watch(points)
        values = layer(points)
    slopes = tape.gradient(values, points)
    place = channel if channels > 1 else 0
    return np.asarray(values)[:, place], np.asarray(slopes)[:, place]
