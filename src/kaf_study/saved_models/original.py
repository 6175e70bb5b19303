"""The original work's ResNets as networks of this project: the same function, faster.

Its SavedModels compute D exponentials for every value that enters a KAF, and keep them for the
gradient, which takes twelve times as long as through `Kaf`. Their checkpoints list the weights by
layer, in the order of `architectures.resnet`; a network that is given them stands in for the graph
where, and only where, it has the same logits.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from activationsf import Kaf
from kaf_study.architectures import Activation, resnet
from kaf_study.saved_models.outputs import logits_of

TOLERANCE = 1e-3
TWIN = f"its weights in this project's layers stand in for its graph, logits within {TOLERANCE:g}"
IMAGES = (16, 32, 32, 3)  # on which the logits are compared
FIXED = ("relu", "elu", "swish")

Weights = dict[str, np.ndarray]  # of a layer, by name


def twin(folder: Path, graph: Callable) -> keras.Model | None:
    """A network of `resnet` that computes what the SavedModel in `folder` does, or None.

    Args:
        graph: the SavedModel as a function of images, as `load_saved_model` gives it.
    """
    if tuple(getattr(graph, "input_shape", None) or ())[1:] != IMAGES[1:]:
        return None
    of_layers = _weights_of_layers(folder)
    kernels = [weights["kernel"] for weights in of_layers if "kernel" in weights]
    blocks, rest = divmod(len(kernels) - 4, 6)  # besides them: the first, two skips, the dense one
    if rest or blocks < 1:
        return None
    x = np.random.default_rng(0).uniform(0, 1, IMAGES).astype("float32")
    logits, _ = logits_of(graph, x)
    expected = logits(tf.constant(x)).numpy()
    for activation in _candidates(of_layers):
        network = resnet(activation, depth=6 * blocks + 2, classes=expected.shape[1])
        layers = [layer for layer in network.layers if layer.weights]
        try:
            for layer, weights in zip(layers, of_layers, strict=True):
                layer.set_weights(_as_ours(layer, weights))
            with warnings.catch_warnings():  # of inputs outside the dictionary: it is as it is
                warnings.simplefilter("ignore")
                got = np.asarray(network(x, training=False))
        except (KeyError, ValueError):  # another architecture
            continue
        if np.abs(got - expected).max() < TOLERANCE:
            return network
    return None


def _weights_of_layers(folder: Path) -> list[Weights]:
    """What the checkpoint of a Keras 2 model calls layer_with_weights-0, -1, ..., in order."""
    try:
        reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    except (tf.errors.OpError, ValueError, RuntimeError):
        return []
    found: dict[int, Weights] = {}
    for key in reader.get_variable_to_shape_map():
        match = re.fullmatch(r"layer_with_weights-(\d+)/(\w+)/\.ATTRIBUTES/VARIABLE_VALUE", key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = reader.get_tensor(key)
    return [found[number] for number in sorted(found)]


def _candidates(of_layers: list[Weights]) -> tuple[Activation, ...]:
    """The activations it may have; a fixed one has no weights to be known by."""
    kaf = next((w for w in of_layers if {"mix_coeffs", "d"} <= w.keys()), None)
    if kaf is None:
        return FIXED
    # A dictionary kept in float16 is not quite equally spaced.
    moving = "k_bandw" in kaf or kaf["d"].dtype != np.float32
    return (lambda: Kaf(D=kaf["d"].shape[-1], moving=moving),)


def _as_ours(layer: keras.layers.Layer, weights: Weights) -> list[np.ndarray]:
    """The weights of the original's layer as `set_weights` of ours takes them."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return [weights[name] for name in ("gamma", "beta", "moving_mean", "moving_variance")]
    if not isinstance(layer, Kaf):
        return [weights["kernel"], weights["bias"]]
    alpha = weights["mix_coeffs"].reshape(-1, layer.D).T  # (D, channels)
    if not layer.moving:
        return [alpha]
    dictionary = np.broadcast_to(weights["d"].reshape(-1, layer.D).T, alpha.shape)
    gamma = np.exp(layer.log_gamma.numpy())
    gamma = weights.get("k_bandw", gamma.astype(weights["d"].dtype))  # fixed, rounded as d is
    return [alpha, dictionary, np.log(gamma.reshape(-1).astype("float32"))]
