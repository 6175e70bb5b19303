"""What goes on inside a network: how far an attack moves it, and how its gradients grow.

Movement: the L2 distance between what a layer gives for a clean image and for the attacked one,
image by image, next to two rulers: the norm of the clean values, and the distance between two
different clean images in the same layer. The first ignores the layer's scale, the second its
constant part as well.

Growth: the squared gradient passes through an activation g times E[g'(z)^2], and through the batch
normalisation behind it divided by the variance of what was normalised, which is proportional to
Var g(z). For z ~ N(0, 1) the quotient E[g'(z)^2] / Var g(z) is therefore the gain of one layer,
whatever the scale of g and of the weights; it is pi / (pi - 1) for ReLU (Yang, Pennington, Rao,
Sohl-Dickstein & Schoenholz 2019, "A mean field theory of batch normalization", arXiv 1902.08129),
and never below 1 (Gaussian Poincare inequality, Chernoff 1981), where only straight lines reach it.

An activation layer, here, is a layer of its own (Kaf, Kwta, keras.layers.Activation); they are
numbered from 1, first to last. Models are functional Keras models of logits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from keras import ops
from numpy.typing import NDArray

from activationsf import Kaf, Kwta
from activationsf import activation as activation_by_name
from kaf_study import InputError
from kaf_study.datasets import batches
from kernel_expansion import equally_spaced_dictionary, plain_expansion, rule_of_thumb_bandwidth

RULERS = ("clean_norm", "to_other_image")
QUANTITIES = ("pre-activation", "activation")


def activation_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The activation layers of a model, first to last."""
    kinds = (Kaf, Kwta, keras.layers.Activation)
    layers = [layer for layer in model.layers if isinstance(layer, kinds)]
    if not layers:
        raise InputError(
            f"{model.name!r} has no activation layers of its own (Kaf, Kwta or Activation), so "
            "there is nothing to look at; build it with separate activation layers"
        )
    return layers


def with_activations(model: keras.Model) -> tuple[keras.Model, int]:
    """`model` with the inputs and outputs of its L activation layers before its own outputs."""
    layers = activation_layers(model)
    outputs = [layer.input for layer in layers] + [layer.output for layer in layers]
    return keras.Model(model.inputs, outputs + model.outputs), len(layers)


@contextmanager
def statistics_kept(model: keras.Model) -> Iterator[None]:
    """Put back afterwards what batch norm in training mode does to its moving averages."""
    kept = [np.array(variable) for variable in model.non_trainable_variables]
    try:
        yield
    finally:
        for variable, value in zip(model.non_trainable_variables, kept, strict=True):
            variable.assign(value)


# --------------------------------------------------------------------------- what an attack moves


def _values(model, training=False):
    """Function: images (B, H, W, C) -> pre-activations and activations, L tensors each."""
    inside, count = with_activations(model)

    def values(x):
        outputs = inside(x, training=training)
        return outputs[:count], outputs[count : 2 * count]

    return values


def _channel_means(values):
    """(B, ..., C) -> (B, C)"""
    return tf.reduce_mean(values, axis=list(range(1, len(values.shape) - 1)))


def movement(
    model: keras.Model, x: NDArray, x_adv: NDArray, *, batch_size: int = 100
) -> pd.DataFrame:
    """How far an attack moves each image in each layer: L2 distances, in inference mode.

    Args:
        model: functional Keras model.
        x, x_adv: clean and attacked images (N, H, W, C), float32 in [0, 1], N >= 2. The clean
            image before it in its batch is each image's other image: give them in random order.

    Returns:
        DataFrame, one row for each layer, quantity and image. layer: from 1. of: "pre-activation"
        or "activation". values: "all", or "channel means" (one number per channel, averaged over
        positions). image: position in x. distance: of clean to attacked. clean_norm: of the clean
        values. to_other_image: distance of clean to the clean values of another image.
    """
    if len(x) < 2 or len(x) != len(x_adv):
        raise InputError(
            "movement needs at least 2 images, as many clean as attacked; "
            f"got {len(x)} and {len(x_adv)}"
        )
    values = _values(model)
    parts = []
    batch_count = min(-(-len(x) // batch_size), len(x) // 2)  # two images each, at least
    for index in np.array_split(np.arange(len(x)), batch_count):
        clean, attacked = values(tf.constant(x[index])), values(tf.constant(x_adv[index]))
        for of, before, after in zip(QUANTITIES, clean, attacked, strict=True):
            for layer, pair in enumerate(zip(before, after, strict=True), start=1):
                means = [_channel_means(v) for v in pair]
                for which, (a, b) in (("all", pair), ("channel means", means)):
                    columns = {
                        "distance": _norms(b - a),
                        "clean_norm": _norms(a),
                        "to_other_image": _norms(a - tf.roll(a, 1, axis=0)),
                    }
                    names = {"layer": layer, "of": of, "values": which, "image": index}
                    parts.append(pd.DataFrame(names | columns))
    return pd.concat(parts, ignore_index=True)


def _norms(values):
    """L2 norms (B,) of (B, ...)."""
    return tf.norm(tf.reshape(values, (tf.shape(values)[0], -1)), axis=1).numpy()


def relative_movement(
    table: pd.DataFrame,
    ruler: str = "to_other_image",
    *,
    of: str = "pre-activation",
    values: str = "all",
    **how: Any,
) -> pd.DataFrame:
    """Mean distance over images divided by the mean of a ruler, for each layer.

    Args:
        table: of `movement`. ruler: "to_other_image" or "clean_norm".
        how: resamples, confidence and seed of the bootstrap over images.

    Returns:
        DataFrame indexed by layer: value, and low and high, a percentile bootstrap interval over
        images. It says nothing about how another training run of the same network would differ.
    """
    parts = _by_layer(table, ruler, of, values)
    return _bootstrap(lambda weigh: weigh(parts["distance"]) / weigh(parts[ruler]), parts, **how)


def movement_ratio(
    first: pd.DataFrame,
    second: pd.DataFrame,
    ruler: str = "to_other_image",
    *,
    of: str = "pre-activation",
    values: str = "all",
    **how: Any,
) -> pd.DataFrame:
    """`relative_movement` of one model divided by another's, on the same images (paired).

    Below 1: the first model moves less. Arguments and result as in `relative_movement`.
    """
    a, b = (_by_layer(table, ruler, of, values) for table in (first, second))
    if not a["distance"].index.equals(b["distance"].index):
        raise InputError("movement_ratio compares two models on the same images; they differ")
    layers = a["distance"].columns.intersection(b["distance"].columns)
    a, b = ({name: part[layers] for name, part in parts.items()} for parts in (a, b))

    def ratio(weigh):
        first = weigh(a["distance"]) / weigh(a[ruler])
        return first / (weigh(b["distance"]) / weigh(b[ruler]))

    return _bootstrap(ratio, a, **how)


def _by_layer(table, ruler, of, values):
    """Distances and rulers as tables (N images, L layers)."""
    if ruler not in RULERS:
        raise InputError(f"the ruler is one of {', '.join(RULERS)}; got {ruler!r}")
    rows = table[(table["of"] == of) & (table["values"] == values)]
    if rows.empty:
        raise InputError(f"there are no {values} values of the {of} in this table")
    names = ["distance", ruler]
    return {name: rows.pivot(index="image", columns="layer", values=name) for name in names}


def _bootstrap(statistic, parts, *, resamples=1000, confidence=0.95, seed=0):
    """Percentile interval of `statistic`, which gets a function: (N, L) -> weighted means."""
    table = parts["distance"]
    count = len(table)
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, resamples) / count
    drawn = statistic(lambda part: weights @ part.to_numpy())  # (resamples, L)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    value = statistic(lambda part: part.to_numpy().mean(axis=0))
    return pd.DataFrame({"value": value, "low": low, "high": high}, index=table.columns)


def histograms(
    model: keras.Model,
    x: NDArray,
    *,
    limit: float = 6.0,
    bins: int = 96,
    channel_means: bool = False,
    training: bool = False,
    batch_size: int = 50,
) -> NDArray[np.float64]:
    """How the pre-activations of each layer are distributed.

    Args:
        x: images (N, H, W, C). limit, bins: equal bins on [-limit, limit].
        channel_means: of the means over positions instead of all values.
        training: batch norm by the statistics of the batch (the moving averages stay as they are).

    Returns:
        float64 (L, bins + 2): shares of each layer's values, the first and last being those below
        -limit and above limit. Values that are not numbers are in none of them.
    """
    values = _values(model, training=training)
    counts: Any = 0
    sizes: Any = 0
    with statistics_kept(model):
        for first in range(0, len(x), batch_size):
            layers, _ = values(tf.constant(x[first : first + batch_size]))
            layers = [(_channel_means(z) if channel_means else z).numpy().ravel() for z in layers]
            within = [np.histogram(z, bins, (-limit, limit))[0] for z in layers]
            outside = [((z < -limit).sum(), (z > limit).sum()) for z in layers]
            counts = counts + np.array(
                [[low, *inner, high] for inner, (low, high) in zip(within, outside, strict=True)]
            )
            sizes = sizes + np.array([[z.size] for z in layers])
    return counts / sizes


# --------------------------------------------------------------------------- gradients: prediction


@dataclass(frozen=True)
class Moments:
    """Of functions g_c of z ~ N(0, std^2), one for each channel: arrays (C,)."""

    squared_derivative: np.ndarray  # E[g'(z)^2]
    variance: np.ndarray  # Var g(z)

    @property
    def gain(self) -> float:
        """Of one layer with batch normalisation (std = 1). Means: a convolution mixes channels."""
        return self.squared_derivative.mean() / self.variance.mean()


def moments(
    function: Callable[[tf.Tensor], Any], channels: int = 1, *, std: float | NDArray = 1.0
) -> Moments:
    """E[g'(z)^2] and Var g(z) for z ~ N(0, std^2), by the midpoint rule.

    Args:
        function: of a tensor (N, channels), elementwise, a function per channel: a built Kaf layer,
            keras.activations.relu, ... Kinks and jumps are fine at 0, between two points.
        std: a number, or one for each channel (C,).
    """
    edges = np.linspace(-8, 8, 4001)
    z = (edges[1:] + edges[:-1]) / 2
    weights = np.exp(-(z**2) / 2)
    weights /= weights.sum()
    x = tf.constant(z[:, None] * np.broadcast_to(std, channels), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        g = function(x)
    derivative, g = (np.asarray(v, "float64") for v in (tape.gradient(g, x), g))
    mean = weights @ g
    return Moments(weights @ derivative**2, weights @ (g - mean) ** 2)


def random_start_moments(D: int = 20, alpha_std: float = 0.05) -> Moments:
    """What `moments` expects of a Kaf whose alpha are independent N(0, alpha_std^2).

    E over alpha: alpha_std^2 times the sum over the kernels kappa_i of the same moments.
    """
    boundary = 3.0  # as of a Kaf
    d = equally_spaced_dictionary(D, boundary).astype("float32")
    gamma = rule_of_thumb_bandwidth(D, boundary)
    kernels = moments(lambda x: ops.exp(-gamma * ops.square(x - d)), D)
    total = [alpha_std**2 * m.sum() for m in (kernels.squared_derivative, kernels.variance)]
    return Moments(*(np.array([value]) for value in total))


def measured_moments(model: keras.Model, x: NDArray) -> dict[str, Moments]:
    """`moments` over the pre-activations that the images x (B, H, W, C) give, in training mode.

    Returns:
        {layer name: Moments}, for the L activation layers.
    """
    with statistics_kept(model):
        pre_activations, _ = _values(model, training=True)(tf.constant(x))
    found = {}
    for layer, z in zip(activation_layers(model), pre_activations, strict=True):
        with tf.GradientTape() as tape:
            tape.watch(z)
            g = layer(z)
        derivative = tape.gradient(g, z)
        g, derivative = (np.asarray(v, "float64").reshape(-1, z.shape[-1]) for v in (g, derivative))
        found[layer.name] = Moments((derivative**2).mean(axis=0), g.var(axis=0))
    return found


def predicted_growth(
    model: keras.Model, moments_of: Mapping[str, Moments] | None = None
) -> NDArray[np.float64]:
    """The squared gradient at each pre-activation over that at the last one, by variances alone.

    For a network at initialisation (batch norm with scale 1 and shift 0) with random weights, wide,
    in training mode, borders of the images left out. Channel by channel: forward, variances are
    mixed by a convolution's squared weights, become 1 in batch normalisation, and add up where
    skips meet. Backward, squared gradients are mixed by the same weights, divided by the variance
    that was normalised, multiplied by E[g'(z)^2], and add up where a value was used twice.

    Args:
        moments_of: `measured_moments`, for the distributions that are there. None: every
            pre-activation is taken as normal.

    Returns:
        float64 (L,), the last being 1.

    Raises:
        InputError: for layers other than convolution, dense, batch norm, activation and addition.
    """
    layers = activation_layers(model)
    moments_of = dict(moments_of or {})
    variance: dict[str, NDArray] = {}  # of each layer's output
    order: list[keras.layers.Layer] = []  # of the computation

    def visit(layer):
        if layer.name in variance:
            return
        for source in _sources(layer):
            visit(source)
        before = [variance[source.name] for source in _sources(layer)]
        if isinstance(layer, Kaf | keras.layers.Activation) and layer.name not in moments_of:
            std = np.sqrt(before[0])
            moments_of[layer.name] = moments(layer, len(std), std=std)
        variance[layer.name] = _forward(layer, before, moments_of)
        order.append(layer)

    last = _sources(layers[-1])[0]
    visit(last)
    squared = {name: np.zeros_like(values) for name, values in variance.items()}
    squared[last.name] += 1 / len(squared[last.name])  # gradient at each layer's output
    for layer in reversed(order):
        for source in _sources(layer):
            squared[source.name] += _backward(
                layer, squared[layer.name], variance[source.name], moments_of
            )
    return np.array([squared[_sources(layer)[0].name].sum() for layer in layers])


def _sources(layer):
    """The layers whose outputs `layer` takes."""
    if isinstance(layer, keras.layers.InputLayer):
        return []
    tensors = layer.input if isinstance(layer.input, list) else [layer.input]
    return [tensor._keras_history.operation for tensor in tensors]


def _forward(layer, before, moments_of):
    """Variances (C,) of a layer's output from a list of those of its inputs."""
    if isinstance(layer, keras.layers.InputLayer):
        return np.ones(layer.output.shape[-1])  # any: the first batch norm divides by it
    if isinstance(layer, keras.layers.Add):
        return sum(before)
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
        return before[0] @ _squared_weights(layer)
    if isinstance(layer, keras.layers.BatchNormalization):
        return before[0] / (before[0] + layer.epsilon)
    if isinstance(layer, Kaf | keras.layers.Activation):
        return moments_of[layer.name].variance
    raise InputError(
        "predicted_growth knows convolutions, dense layers, batch norm, activations and additions; "
        f"got {type(layer).__name__} {layer.name!r}"
    )


def _backward(layer, squared, before, moments_of):
    """Squared gradients (C,) at an input of variances `before` from those at the output."""
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
        return _squared_weights(layer) @ squared
    if isinstance(layer, keras.layers.BatchNormalization):
        return squared / (before + layer.epsilon)
    if isinstance(layer, Kaf | keras.layers.Activation):
        return squared * moments_of[layer.name].squared_derivative
    return squared  # an addition


def _squared_weights(layer):
    """Squared weights, summed over the positions of a convolution: (C_in, C_out)."""
    kernel = np.asarray(layer.kernel, "float64")
    return np.sum(kernel**2, axis=tuple(range(kernel.ndim - 2)))


# --------------------------------------------------------------------------- gradients: measurement


def gradient_norms(
    model: keras.Model, x: NDArray, y: NDArray, *, loss_scale: float = 1.0
) -> pd.DataFrame:
    """L2 norms of the gradients of the mean cross-entropy, batch norm in training mode.

    Args:
        x: images (B, H, W, C). y: labels (B,), int. B is limited by memory: everything is kept.
        loss_scale: the loss is multiplied by it before, the gradients divided after the backward
            pass, as under mixed precision (Keras starts at 2^15), where it decides what overflows.

    Returns:
        DataFrame, one row for each tensor. of: "pre-activation" and "activation" (the L activation
        layers' inputs and outputs), "kernel" and "alpha" (of KAFs). layer: from 1, among those of
        the same kind. name. norm: inf or NaN where an element is. not_finite: share of elements
        that are infinite or NaN.
    """
    inside, count = with_activations(model)
    watched = [
        (of, number, path, weight)
        for of in ("kernel", "alpha")
        for number, (path, weight) in enumerate(
            ((v.path, v.value) for v in model.trainable_variables if v.name == of), start=1
        )
    ]
    x = tf.constant(x, tf.float32)
    with statistics_kept(model), tf.GradientTape() as tape:
        tape.watch(x)
        outputs = inside(x, training=True)
        loss = loss_scale * tf.reduce_mean(_cross_entropy(y, outputs[-1]))
    names = [layer.name for layer in activation_layers(model)]
    for of, part in zip(QUANTITIES, (outputs[:count], outputs[count:-1]), strict=True):
        watched += [
            (of, number, name, tensor)
            for number, (name, tensor) in enumerate(zip(names, part, strict=True), start=1)
        ]
    gradients = tape.gradient(loss, [tensor for *_, tensor in watched])
    rows = []
    for (of, layer, name, _), gradient in zip(watched, gradients, strict=True):
        gradient = np.asarray(gradient, "float64") / loss_scale
        with np.errstate(invalid="ignore"):
            norm = np.sqrt(np.sum(gradient**2))
        not_finite = np.mean(~np.isfinite(gradient))
        rows.append([of, layer, name, norm, not_finite])
    columns = ["of", "layer", "name", "norm", "not_finite"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["of", "layer"], ignore_index=True)


def _cross_entropy(y, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.cast(y, tf.int32), tf.cast(logits, tf.float32)
    )


def measured_gains(norms: pd.DataFrame) -> pd.DataFrame:
    """What the activations did to the squared gradient, from a table of `gradient_norms`.

    Returns:
        DataFrame indexed by layer. squared_derivative: squared gradient at the pre-activation over
        that at the activation, to be held against E[g'(z)^2]. growth: squared gradient at the
        pre-activation over that at the last one, to be held against `predicted_growth`.
    """
    norm = norms.pivot(index="layer", columns="of", values="norm")
    squared = norm["pre-activation"].dropna() ** 2
    return pd.DataFrame(
        {
            "squared_derivative": squared / norm["activation"].dropna() ** 2,
            "growth": squared / squared.iloc[-1],
        }
    )


@keras.saving.register_keras_serializable(package="robust_activations")
class HalfPrecisionKaf(Kaf):
    """Kaf whose sum, and so its gradients, run in float16: only to show what that does.

    As in a network under mixed precision whose KAFs are written out in Keras operations. `Kaf`
    itself sums in float32. For the Gaussian kernel with a fixed dictionary.
    """

    def call(self, inputs: Any) -> Any:
        x, alpha, dictionary = (
            ops.cast(v, "float16") for v in (inputs, self.alpha, self._initial_dictionary)
        )
        y = plain_expansion(x, alpha, dictionary, self.gamma, self.kernel)
        return ops.cast(y, self.compute_dtype)


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Layers built inside the `with` block have Keras' dtype policy `name` ("mixed_float16")."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def plain_network(
    activation: str,
    depth: int,
    *,
    batch_norm: bool = True,
    filters: int = 32,
    input_shape: tuple[int, int, int] = (32, 32, 3),
) -> keras.Model:
    """[conv3x3 - batch norm - activation] x depth, pooled to 10 logits: no skips. A keras.Model.

    Args:
        activation: a name of `activationsf.ACTIVATIONS`. batch_norm: False leaves it out.
    """
    inputs = x = keras.Input(input_shape)
    for index in range(depth):
        strides = 2 if index == 0 else 1
        x = keras.layers.Conv2D(filters, 3, strides=strides, padding="same")(x)
        if batch_norm:
            x = keras.layers.BatchNormalization()(x)
        x = activation_by_name(activation)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name=f"plain{depth}")


# --------------------------------------------------------------------------- a short training


def train_steps(
    model: keras.Model,
    x: NDArray,
    y: NDArray,
    *,
    optimizer: keras.optimizers.Optimizer,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
    watched: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Ordinary training for a few steps, on the cross-entropy alone, each step recorded.

    The steps after the first that is not finite are left out: nothing comes back from NaN weights.

    Args:
        model: is trained in place.
        x: images (N, H, W, C), without augmentation. y: labels (N,), int.
        optimizer: Keras optimizer; clipping is its own (`global_clipnorm`).
        seed: of the order of the images.
        watched: {name: trainable weight of the model} whose norms are recorded as well.

    Returns:
        DataFrame, one row for each step, of the batch before the step: step (from 0), loss (nats),
        accuracy (fraction), gradient_norm (L2 over all weights, before clipping), and of each
        watched weight weight_NAME and gradient_NAME (L2).
    """
    weights = model.trainable_variables
    optimizer.build(weights)
    all_weights = [id(weight) for weight in weights]
    places = {name: all_weights.index(id(weight)) for name, weight in (watched or {}).items()}

    images_spec = tf.TensorSpec((None, *x.shape[1:]), tf.float32)

    @tf.function(input_signature=[images_spec, tf.TensorSpec((None,), tf.int64)])
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(_cross_entropy(labels, logits))
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        is_right = tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float32)
        norm = tf.linalg.global_norm(gradients)
        row = {"loss": loss, "accuracy": tf.reduce_mean(is_right), "gradient_norm": norm}
        for name, place in places.items():
            row[f"weight_{name}"] = tf.norm(weights[place].value)
            row[f"gradient_{name}"] = tf.norm(gradients[place])
        with tf.control_dependencies(row.values()):
            optimizer.apply(gradients, weights)
        return row

    rows: list[dict[str, float]] = []
    for epoch in range(-(-steps * batch_size // len(x)) + 1):
        shuffled = batches(x, y, batch_size=batch_size, seed=seed, epoch=epoch, augment=False)
        for images, labels in shuffled:
            if len(rows) == steps or (rows and not np.isfinite(rows[-1]["loss"])):
                break
            rows.append({name: float(value) for name, value in step(images, labels).items()})
    return pd.DataFrame(rows).rename_axis("step").reset_index()
