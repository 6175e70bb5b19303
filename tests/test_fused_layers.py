"""The fused twin trains like Keras' own layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kaf_study.fused_layers import (
    FusedBatchNormalization,
    FusedSwish,
    folded,
    fused,
    inference_twin,
)


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


def of_policy(network, policy):
    """The same of Keras' own layers, all but its ends in another precision."""

    def layer_of(layer):
        is_end = layer in (network.layers[0], network.layers[-1])
        return type(layer).from_config(layer.get_config() | ({} if is_end else {"dtype": policy}))

    other = keras.models.clone_model(network, clone_function=layer_of)
    other.set_weights(network.get_weights())
    return other


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_twin_is_as_near_to_float32_as_keras_own_layers(network, policy):
    half = fused(network, policy)
    kinds = [type(layer) for layer in half.layers]
    assert FusedBatchNormalization in kinds and FusedSwish in kinds
    computing = {layer.compute_dtype for layer in half.layers[1:-1]}
    assert computing == {policy.removeprefix("mixed_")}
    assert half.output.dtype == half.input.dtype == "float32"
    x = tf.constant(np.random.default_rng(1).uniform(size=(64, 8, 8, 3)), tf.float32)
    results = []
    for model in (network, half, of_policy(network, policy)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_mean(tf.square(model(x, training=True) - 1))
        # In front of batch norm a bias has no gradient but rounding.
        weights = [w for w in model.trainable_variables if w is not model.layers[1].bias]
        gradients = tape.gradient(loss, [x, *weights])
        assert {w.dtype for w in model.weights} == {"float32"}
        results.append([loss, *gradients, *model.get_weights()])
    for exact, ours, theirs in zip(*results, strict=True):
        error, scale = np.linalg.norm(ours - exact), np.linalg.norm(exact)
        assert error <= 1.5 * np.linalg.norm(theirs - exact) + 1e-4 * scale


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


def trained(model):
    """Every weight away from its start; variances stay positive."""
    generator = np.random.default_rng(0)
    model.set_weights([generator.uniform(0.2, 1.5, w.shape) for w in model.get_weights()])
    return model


def normalizations(model):
    return sum(type(layer) is keras.layers.BatchNormalization for layer in model.layers)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_folded_twin_gives_the_same_with_fewer_layers(bias, scale):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=bias)(inputs)
    x = keras.layers.BatchNormalization(scale=scale, center=scale, epsilon=0.1)(x)
    x = keras.layers.Conv2D(4, 3)(keras.layers.Activation("elu")(x))
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization()(x))
    model = trained(keras.Model(inputs, outputs))
    before = [w.copy() for w in model.get_weights()]
    twin = folded(model)
    assert normalizations(twin) == 0 and normalizations(model) == 2
    images = np.random.default_rng(1).uniform(size=(5, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(twin(images), model(images, training=False), rtol=1e-5)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def of_one_convolution(use, **kwargs):
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, use(keras.layers.Conv2D(4, 3, **kwargs)(inputs)))


@pytest.mark.parametrize(
    "model",
    [
        of_one_convolution(lambda x: keras.layers.Add()([keras.layers.BatchNormalization()(x), x])),
        of_one_convolution(lambda x: [keras.layers.BatchNormalization()(x), x]),
        of_one_convolution(keras.layers.BatchNormalization(), activation="relu"),
        of_one_convolution(keras.layers.BatchNormalization(axis=1)),
        of_one_convolution(lambda x: keras.layers.BatchNormalization()(keras.layers.Add()([x, x]))),
    ],
    ids=["seen by another layer", "is an output", "activated", "other axis", "behind a sum"],
)
def test_what_is_no_convolution_alone_is_not_folded(model):
    twin = folded(trained(model))
    assert normalizations(twin) == 1
    images = np.random.default_rng(1).uniform(size=(5, 8, 8, 3)).astype("float32")
    for ours, theirs in zip(
        keras.tree.flatten(twin(images)),
        keras.tree.flatten(model(images, training=False)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_layer_that_is_called_twice_is_not_folded():
    inputs = keras.Input((8, 8, 3))
    convolution = keras.layers.Conv2D(3, 3, padding="same")
    normalization = keras.layers.BatchNormalization()
    model = trained(keras.Model(inputs, normalization(convolution(normalization(inputs)))))
    images = np.random.default_rng(1).uniform(size=(5, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(folded(model)(images), model(images, training=False), rtol=1e-5)


class Remembering(keras.layers.Layer):
    """A layer that is not made by its config alone, as a foreign one may be."""

    factor = 1.0

    def call(self, inputs):
        return self.factor * inputs


class NotCloned(Remembering):
    def get_config(self):
        raise NotImplementedError


@pytest.mark.parametrize("own, has_twin", [(None, True), ("other", False), ("refusing", False)])
def test_a_model_is_attacked_through_its_twin_only_where_they_agree(own, has_twin):
    layer = {None: keras.layers.ReLU(), "other": Remembering(), "refusing": NotCloned()}[own]
    model = of_one_convolution(lambda x: layer(keras.layers.BatchNormalization()(x)))
    trained(model)
    layer.factor = 1 + 1e-4
    images = np.random.default_rng(1).uniform(size=(5, 8, 8, 3)).astype("float32")
    twin = inference_twin(model, images)
    assert (twin is not model) == has_twin
    np.testing.assert_allclose(twin(images), model(images, training=False), rtol=1e-5)


def test_what_is_no_keras_model_stays_what_it_is():
    def function(x, training=False):
        return x

    assert inference_twin(function, np.zeros((1, 8, 8, 3), "float32")) is function
