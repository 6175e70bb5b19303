"""Batch normalisation and Swish in one kernel each: what a training step is run on.

Keras writes batch normalisation in training mode as a chain of elementwise operations and
reductions, each of which passes over the whole feature map (on a CPU a quarter of ResNet20's
training step), and TensorFlow does the same with the gradient of Swish. `fused` gives a model's
twin that uses one kernel for either, with the same weights in the same order (so
`set_weights(get_weights())` carries them over) and the same results up to float rounding. What is
saved is the original, of Keras' own layers.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from kernel_expansion import exp2


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
    exponent = tf.clip_by_value(x * np.float32(-math.log2(math.e)), -126.0, 126.0)
    sigmoid = 1 / (1 + exp2(exponent))
    return upstream * sigmoid * (1 + x * (1 - sigmoid))


@tf.custom_gradient
def _swish(x):
    return tf.nn.silu(x), lambda upstream: _swish_gradient(x, upstream)


def fused(model: keras.Model) -> keras.Model:
    """A twin of `model` with fused batch normalisation and Swish, and copies of its weights.

    Where there is no fused form (another axis, mixed precision, renorm), Keras' layer stays.
    """

    def twin(layer):
        if type(layer) is keras.layers.BatchNormalization and _has_fused_form(layer):
            return FusedBatchNormalization.from_config(layer.get_config())
        if _is_swish(layer):
            return FusedSwish(name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=twin)
    copy.set_weights(model.get_weights())
    return copy


def _is_swish(layer):
    is_activation = type(layer) is keras.layers.Activation
    return (
        is_activation
        and layer.activation is keras.activations.silu
        and layer.compute_dtype == "float32"
    )


def _has_fused_form(layer):
    is_image = len(layer.input.shape) == 4 and layer.axis in (-1, 3)
    is_plain = layer.center and layer.scale and not layer.renorm and not layer.synchronized
    return is_image and is_plain and layer.compute_dtype == "float32"
