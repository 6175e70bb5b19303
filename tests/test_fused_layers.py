"""The fused twin trains like Keras' own layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kaf_study.fused_layers import FusedBatchNormalization, FusedSwish, fused


@pytest.fixture
def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Activation("swish")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.BatchNormalization()(x)  # rank 2: has no fused form
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def test_twin_has_the_same_weights_and_fuses_what_it_can(network):
    twin = fused(network)
    for ours, theirs in zip(twin.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    kinds = [type(layer) for layer in twin.layers]
    assert kinds.count(FusedBatchNormalization) == 1
    assert kinds.count(keras.layers.BatchNormalization) == 1
    assert kinds.count(FusedSwish) == 1
    assert all(type(layer) is not FusedBatchNormalization for layer in network.layers)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_outputs_gradients_and_moving_statistics_equal_keras(network, batch):
    twin = fused(network)
    x = tf.constant(np.random.default_rng(0).uniform(size=(batch, 8, 8, 3)), tf.float32)
    results = []
    for model in (network, twin):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
            loss = tf.reduce_mean(tf.square(y - 1))
        gradients = tape.gradient(loss, [x, *model.trainable_variables])
        # a bias in front of batch normalisation has gradient 0, up to rounding
        results.append([y, *gradients, *model.get_weights(), model(x, training=False)])
    for ours, theirs in zip(*results, strict=True):
        scale = max(0.1, float(tf.reduce_max(tf.abs(theirs))))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-4 * scale)


def test_swish_and_its_gradient_equal_keras_far_out_too():
    x = tf.constant([-np.inf, -1e4, -100.0, -5.0, -1e-3, 0.0, 0.3, 5.0, 100.0, 1e4, np.nan])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = FusedSwish()(x)
    gradient = tape.gradient(y, x).numpy()
    finite = x.numpy()[1:-1].astype("float64")
    sigmoid = 1 / (1 + np.exp(-np.maximum(finite, -700)))
    np.testing.assert_allclose(y[1:-1], finite * sigmoid, rtol=1e-5, atol=1e-30)
    expected = sigmoid * (1 + finite * (1 - sigmoid))
    np.testing.assert_allclose(gradient[1:-1], expected, rtol=1e-5, atol=1e-30)
    assert np.isnan(gradient[-1])
