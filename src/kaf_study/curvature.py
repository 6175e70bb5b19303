"""How curved activations are where they are used, whatever the scale of their inputs and outputs.

For one channel with activation g, whose pre-activations z come from a batch normalisation of scale
gamma, the normalised input is (z - beta) / gamma, and

    kappa = |gamma| rms g''(z) / rms g'(z)

is the curvature of g in units of that input's standard deviation, divided by its slope; rms over
the values that the layer sees. Multiplying g by a number, or stretching its input while gamma
shrinks, leaves kappa as it is, so that learned and fixed activations can be compared. It is the
quantity that low-curvature accounts of robustness are about (Singla et al. 2021, arXiv 2102.07861;
Dai, Mahloujifar & Mittal 2021, arXiv 2110.05626). ReLU has no second derivative: its kappa is 0
almost everywhere and says nothing; k-WTA has no g of one variable.
"""

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from kaf_study.insights import activation_layers, statistics_kept, with_activations

LIMIT, BINS = 12.0, 1200  # of the histograms of z: bins of 0.02, a thirtieth of a KAF's kernel
BATCH = 128  # images at a time


def curvatures(model: keras.Model, x: np.ndarray, *, training: bool = False) -> pd.DataFrame:
    """kappa of every channel of every activation layer.

    Args:
        model: functional Keras model with activation layers of their own.
        x: images (N, H, W, C) in [0, 1].
        training: batch norm by the statistics of the batch, for a network that is not yet trained.

    Returns:
        DataFrame, one row for each channel: layer (from 1), name, channel, gamma (of batch norm;
        where there is none the standard deviation of z), kappa. Values of z beyond LIMIT count as
        LIMIT.
    """
    layers = activation_layers(model)
    counts, rows = _histograms(model, x, training), []
    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)
    z = (edges[1:] + edges[:-1]) / 2
    for number, (layer, count) in enumerate(zip(layers, counts, strict=True), start=1):
        share = count / count.sum(axis=0)  # (BINS, C)
        first, second = _derivatives(layer, z, share.shape[1])
        rms = [np.sqrt((share * d**2).sum(axis=0)) for d in (first, second)]
        gamma = _scale(layer, share, z)
        with np.errstate(divide="ignore", invalid="ignore"):
            kappa = gamma * rms[1] / rms[0]
        named = {"layer": number, "name": layer.name, "channel": np.arange(len(gamma))}
        rows.append(pd.DataFrame(named | {"gamma": gamma, "kappa": kappa}))
    return pd.concat(rows, ignore_index=True)


def _histograms(model, x, training):
    """Counts (BINS, C) of the pre-activations of each activation layer."""
    whole, number = with_activations(model)
    counts = [0] * number
    with statistics_kept(model):
        for first in range(0, len(x), BATCH):
            outputs = whole(tf.constant(x[first : first + BATCH]), training=training)
            for i, z in enumerate(outputs[:number]):
                counts[i] = counts[i] + _histogram(np.asarray(z).reshape(-1, z.shape[-1]))
    return counts


def _histogram(z):
    """Counts (BINS, C) of z (N, C), each channel by itself."""
    channels = z.shape[1]
    place = np.clip((z + LIMIT) * (BINS / (2 * LIMIT)), 0, BINS - 1).astype(np.int64)
    place += BINS * np.arange(channels)
    return np.bincount(place.ravel(), minlength=BINS * channels).reshape(channels, BINS).T


def _derivatives(layer, z, channels):
    """g' and g'' of a layer's functions at z (N,): each float64 (N, C)."""
    x = tf.constant(np.repeat(z[:, None], channels, axis=1), tf.float32)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            g = layer(x)
        first = inner.gradient(g, x)
    second = outer.gradient(first, x)
    zeros = np.zeros(x.shape)  # a piecewise linear activation has none
    return np.asarray(first, "float64"), zeros if second is None else np.asarray(second, "float64")


def _scale(layer, share, z):
    """|gamma| (C,) of the batch norm before a layer, or the standard deviation of its inputs."""
    before = layer.input._keras_history.operation
    if isinstance(before, keras.layers.BatchNormalization):
        return np.abs(np.asarray(before.gamma, "float64"))
    mean = z @ share
    return np.sqrt(np.maximum((z**2) @ share - mean**2, 0))


class CurvatureProbe(keras.callbacks.Callback):
    """The median kappa of each activation layer at the end of each epoch.

    Adds curvature_1, curvature_2, ... (layers from the input) to the epoch's logs; list it before
    the callbacks that read them.

    Args:
        network: plain model with the layers of the one that is trained; gets its weights.
        x: images (N, H, W, C) in [0, 1]; 512 tell enough.
    """

    def __init__(self, network: keras.Model, x: np.ndarray):
        super().__init__()
        self.network, self.x = network, x

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.network.set_weights(self.model.get_weights())
        median = curvatures(self.network, self.x).groupby("layer")["kappa"].median()
        if logs is not None:
            logs.update({f"curvature_{layer}": float(kappa) for layer, kappa in median.items()})
