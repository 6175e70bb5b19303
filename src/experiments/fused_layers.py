"""Batch normalisation in one TensorFlow kernel: what a training step is run on.

Keras writes batch normalisation in training mode as a chain of elementwise operations and
reductions, each of which passes over the whole feature map; on a CPU that is a quarter of
ResNet20's training step. `fused` gives a model's twin that uses TensorFlow's fused kernel, with the
same weights in the same order (so `set_weights(get_weights())` carries them over) and the same
results up to float rounding. What is saved is the original, of Keras' own layers.
"""

import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization with TensorFlow's fused kernel in training mode."""

    def call(self, inputs, training=None, mask=None):
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


def fused(model):
    """A twin of `model` with fused batch normalisation and copies of its weights.

    Where there is no fused form (another axis, mixed precision, renorm), Keras' layer stays.
    """

    def twin(layer):
        is_fusable = type(layer) is keras.layers.BatchNormalization and _has_fused_form(layer)
        copy_class = FusedBatchNormalization if is_fusable else type(layer)
        return copy_class.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=twin)
    copy.set_weights(model.get_weights())
    return copy


def _has_fused_form(layer):
    is_image = len(layer.input.shape) == 4 and layer.axis in (-1, 3)
    is_plain = layer.center and layer.scale and not layer.renorm and not layer.synchronized
    return is_image and is_plain and layer.compute_dtype == "float32"
