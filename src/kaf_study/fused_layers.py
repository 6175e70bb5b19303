"""Batch normalisation and Swish in one kernel each: what training steps and attacks are run on.

Keras writes batch normalisation in training mode as a chain of elementwise operations and
reductions, each of which passes over the whole feature map (on a CPU a quarter of ResNet20's
training step), and TensorFlow does the same with the gradient of Swish. `fused` gives a model's
twin that uses one kernel for either, with the same weights in the same order (so
`set_weights(get_weights())` carries them over) and the same results up to float rounding. What is
saved is the original, of Keras' own layers. The twin may compute in half precision, with weights,
statistics and logits in float32.

In inference, batch normalisation behind a convolution is a change of that convolution's weights:
`folded` gives the twin that attacks are run on.
"""

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from kernel_expansion import exp2

FUSED_DTYPES = ("float32", "bfloat16", "float16")
SAME_OUTPUTS = 1e-5  # as a fraction of the largest: rounding, not another function


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization with TensorFlow's fused kernel in training mode."""

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        if not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            tf.convert_to_tensor(self.gamma),
            tf.convert_to_tensor(self.beta),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel returns the unbiased variance, Keras keeps the biased one.
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
        variance *= (count - 1) / count
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + now * (1 - self.momentum))
        return outputs


class FusedSwish(keras.layers.Layer):
    """x sigmoid(x); only x is kept for the backward pass."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return _swish(inputs)


@tf.function(jit_compile=True, autograph=False)
def _swish_gradient(x, upstream):
    # exp2 of kernel_expansion is one vectorised loop with the rest, tf.sigmoid is not
    dtype = x.dtype
    x, upstream = tf.cast(x, tf.float32), tf.cast(upstream, tf.float32)
    exponent = tf.clip_by_value(x * np.float32(-math.log2(math.e)), -126.0, 126.0)
    sigmoid = 1 / (1 + exp2(exponent))
    return tf.cast(upstream * sigmoid * (1 + x * (1 - sigmoid)), dtype)


@tf.custom_gradient
def _swish(x):
    return tf.nn.silu(x), lambda upstream: _swish_gradient(x, upstream)


def fused(model: keras.Model, policy: str | None = None) -> keras.Model:
    """A twin of `model` with fused batch normalisation and Swish, and copies of its weights.

    Where there is no fused form (another axis, float64, renorm), Keras' layer stays. Under a
    tf.distribute.Strategy of several replicas batch normalisation is Keras', synchronised.

    Args:
        policy: dtype policy of its layers, but for those that give the outputs; None: the model's.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync

    def twin(layer):
        kind, config = type(layer), layer.get_config()
        is_between = not any(layer.output is end for end in (*model.inputs, *model.outputs))
        if policy is not None and is_between:
            config["dtype"] = policy
        if kind is keras.layers.BatchNormalization and replicas > 1:
            config["synchronized"] = True
        elif kind is keras.layers.BatchNormalization and _has_fused_form(layer):
            kind = FusedBatchNormalization
        elif _is_swish(layer):
            kind, config = FusedSwish, {name: config[name] for name in ("name", "dtype")}
        return kind.from_config(config)

    copy = keras.models.clone_model(model, clone_function=twin)
    copy.set_weights(model.get_weights())
    return copy


def _is_swish(layer):
    return (
        type(layer) is keras.layers.Activation
        and layer.activation is keras.activations.silu
        and layer.compute_dtype in FUSED_DTYPES
    )


def _has_fused_form(layer):
    is_image = len(layer.input.shape) == 4 and layer.axis in (-1, 3)
    is_plain = layer.center and layer.scale and not layer.renorm and not layer.synchronized
    return is_image and is_plain and layer.compute_dtype in FUSED_DTYPES


def folded(model: keras.Model) -> keras.Model:
    """A twin of `model` for inference, batch normalisation folded into convolutions before it.

    With the factor a = gamma / sqrt(variance + epsilon), a (W * x + b - mean) + beta is a
    convolution by a W with bias a (b - mean) + beta. Folded where nothing else sees what the
    convolution gives; elsewhere (behind a sum, or behind another layer) Keras' layer stays.

    Raises:
        Whatever Keras raises for a model that it cannot clone, which need not be functional.
    """
    inputs, outputs = (
        tensors[0] if len(tensors) == 1 else tensors for tensors in (model.inputs, model.outputs)
    )
    model = keras.Model(inputs, outputs)  # Sequential ones as well
    pairs: dict[str, keras.layers.BatchNormalization] = {}  # convolution's name -> behind it
    for layer in model.layers:
        if type(layer) is keras.layers.Conv2D and len(layer._outbound_nodes) == 1:
            after = layer._outbound_nodes[0].operation
            if _folds(layer, after) and not any(layer.output is out for out in model.outputs):
                pairs[layer.name] = after
    behind = {normalization.name for normalization in pairs.values()}

    def twin(layer):
        config = layer.get_config() | ({"use_bias": True} if layer.name in pairs else {})
        return type(layer).from_config(config)

    def call(layer, *args, **kwargs):
        return args[0] if layer.name in behind else layer(*args, **kwargs)

    copy = keras.models.clone_model(model, clone_function=twin, call_function=call)
    for layer in copy.layers:
        if not layer.weights:
            continue
        weights = model.get_layer(layer.name).get_weights()
        if layer.name in pairs:
            weights = _folded_weights(pairs[layer.name], *weights)
        layer.set_weights(weights)
    return copy


def inference_twin(model: Callable, x: np.ndarray) -> Callable:
    """`folded`, where a model has such a twin with the same outputs on images x; else the model.

    Args:
        model: Keras model, or any callable with Keras' `training` argument. x: (B, H, W, C).
    """
    if not isinstance(model, keras.Model):
        return model
    try:
        twin = folded(model)
        ours, theirs = (np.asarray(network(x, training=False)) for network in (twin, model))
    except Exception:  # whatever layers of somebody's own raise when they are cloned
        return model
    scale = max(1.0, np.abs(theirs).max())
    return twin if np.abs(ours - theirs).max() < SAME_OUTPUTS * scale else model


def _folds(convolution, after):
    return (
        type(after) is keras.layers.BatchNormalization
        and len(after._inbound_nodes) == len(convolution._inbound_nodes) == 1
        and convolution.activation is keras.activations.linear
        and convolution.data_format == "channels_last"
        and convolution.compute_dtype == after.compute_dtype == "float32"
        and after.axis in (-1, 3)
    )


def _folded_weights(normalization, kernel, bias=0.0):
    """[kernel, bias] of the convolution that also normalises; computed in float64."""
    mean, variance, gamma, beta = (
        np.float64(otherwise if variable is None else keras.ops.convert_to_numpy(variable))
        for variable, otherwise in (
            (normalization.moving_mean, 0.0),
            (normalization.moving_variance, 1.0),
            (normalization.gamma, 1.0),
            (normalization.beta, 0.0),
        )
    )
    factor = gamma / np.sqrt(variance + normalization.epsilon)
    return [kernel * factor, (bias - mean) * factor + beta]
