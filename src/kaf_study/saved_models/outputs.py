"""From what a classifier gives to its logits, which are what attacks need.

A saturated softmax, sigmoid or tanh has a zero gradient, which looks like robustness. Where the
squashing is found it is taken off; where it is out of reach, that is said.
"""

from collections.abc import Callable
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from kaf_study.saved_models.graphs import Graph, attackable
from kaf_study.saved_models.pixel_range import Rescaled

# What can be said about the numbers that are attacked.
LOGITS = "logits"
SOFTMAX_REMOVED, SIGMOID_REMOVED, TANH_REMOVED = (
    f"{squashing} removed" for squashing in ("softmax", "sigmoid", "tanh")
)
PROBABILITIES = "probabilities"
SQUASHED = "squashed"
NEAR_THE_END = 0.99  # of [-1, 1]: a tanh is flat there

HOW_ATTACKED = {
    LOGITS: "at its logits",
    SOFTMAX_REMOVED: "at its logits (softmax removed)",
    SIGMOID_REMOVED: "at its logits (sigmoid removed)",
    TANH_REMOVED: "at its logits (tanh removed)",
    PROBABILITIES: "through the logarithm of its probabilities (its logits are out of reach)",
    SQUASHED: (
        "at its outputs, which lie in [0, 1] as a sigmoid's do, or up to the ends of [-1, 1] as a "
        "tanh's; where that saturates the model looks more robust than it is"
    ),
}


def logits_of(model: Callable, x: np.ndarray) -> tuple[Callable, str]:
    """A model's logits as `f(x, training=False)`, and how they were obtained.

    Args:
        model: Keras model or callable with Keras' `training` argument.
        x: some images (B, H, W, C), to look at what the model gives for them.

    Returns:
        The function, and a key of HOW_ATTACKED: LOGITS (the outputs themselves), "... removed" (up
        to its softmax, sigmoid or tanh), PROBABILITIES (the logarithm of outputs that are
        probabilities) or SQUASHED (outputs in [0, 1] that are none, or that fill [-1, 1]).
    """
    if isinstance(model, Rescaled):
        inner, outputs = logits_of(model.model, np.asarray(model.pixels(tf.constant(x))))
        return replace(model, model=inner), outputs
    logits, squashing = before_squashing(model)
    if squashing is not None:
        return logits, f"{squashing} removed"
    p = np.asarray(model(tf.constant(x), training=False), dtype="float64")
    if p.min() < -1 or p.max() > 1:
        return model, LOGITS
    logits, squashing = before_squashing(_traced(model, x.shape[1:]))
    if squashing is not None:
        return logits, f"{squashing} removed"
    if p.min() < 0:
        return model, SQUASHED if np.abs(p).max() > NEAR_THE_END else LOGITS
    if np.allclose(p.sum(axis=-1), 1, atol=1e-3):
        return _logarithm(model), PROBABILITIES
    return model, SQUASHED


def before_squashing(model: Callable) -> tuple[Callable, str | None]:
    """`model` up to its logits, sharing its weights, and what was left out ("softmax", ...; None).

    Recognised at the end of a `Graph` and of a functional or Sequential Keras model: there, a layer
    whose activation squashes (it is rebuilt without), an Activation and a Softmax layer.
    """
    if isinstance(model, Graph):
        return model.before_squashing()
    if not isinstance(model, keras.Model) or not getattr(model, "outputs", None):
        return model, None
    last, node, _ = model.outputs[0]._keras_history
    if not last._inbound_nodes:
        return model, None
    before = last._inbound_nodes[node].input_tensors[0]
    if isinstance(last, keras.layers.Softmax):
        return keras.Model(model.inputs, before), "softmax"
    squashing = _squashing(getattr(last, "activation", None))
    if squashing is None:
        return model, None
    if isinstance(last, keras.layers.Activation):
        return keras.Model(model.inputs, before), squashing
    config = last.get_config() | {"activation": "linear", "name": f"{last.name}_logits"}
    linear = type(last).from_config(config)
    logits = linear(before)
    linear.set_weights(last.get_weights())
    return keras.Model(model.inputs, logits), squashing


def _squashing(activation):
    for name in ("softmax", "sigmoid", "tanh"):
        if activation is getattr(keras.activations, name):
            return name
    return None


def _traced(model, image_shape):
    """A model of any kind as a `Graph`, if it can be one, to look for its last operation."""
    if isinstance(model, Graph):
        return model
    spec = tf.TensorSpec((None, *image_shape), tf.float32)
    try:
        function = tf.function(lambda x: model(x, training=False), autograph=False)
        return attackable(function.get_concrete_function(spec))[0]
    except Exception:  # a model that needs eager execution
        return model


def _logarithm(model):
    # softmax(log p) = p: the cross-entropy of log p taken as logits is the model's own loss. The
    # floor is the smallest normal float32; a higher one (Keras uses 1e-7) zeroes more gradients.
    floor = np.finfo("float32").tiny

    def log_probabilities(x, training=False):
        return tf.math.log(tf.maximum(tf.cast(model(x, training=training), tf.float32), floor))

    return log_probabilities
