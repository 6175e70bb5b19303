"""kappa is the formula's, and does not depend on any scale."""

import keras
import numpy as np
import pytest

from activationsf import Kaf, activation
from kaf_study.curvature import CurvatureProbe, curvatures
from kernel_expansion import equally_spaced_dictionary

CHANNELS = 4


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 1, (40, 6, 6, 3)).astype("float32")


def network(act, gamma=1.0):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(CHANNELS, 3)(inputs)
    x = keras.layers.BatchNormalization(gamma_initializer=keras.initializers.Constant(gamma))(x)
    x = keras.layers.GlobalAveragePooling2D()(act(x))
    return keras.Model(inputs, keras.layers.Dense(2)(x))


def pre_activations(model, images):
    inside = keras.Model(model.inputs, model.layers[2].output)
    return inside.predict(images, verbose=0).astype("float64").reshape(-1, CHANNELS)


def rms(values):
    return np.sqrt((values**2).mean(axis=0))


def test_kappa_of_a_kaf_is_that_of_its_sum_of_gaussians(images):
    model = network(Kaf(), gamma=1.5)
    layer = model.layers[3]
    z = pre_activations(model, images)[:, None]  # (N, 1, C)
    d, gamma = equally_spaced_dictionary(20, 3.0)[:, None], layer.gamma
    terms = np.asarray(layer.alpha) * np.exp(-gamma * (z - d) ** 2)
    first = (-2 * gamma * (z - d) * terms).sum(axis=1)
    second = ((4 * gamma**2 * (z - d) ** 2 - 2 * gamma) * terms).sum(axis=1)
    found = curvatures(model, images)
    np.testing.assert_allclose(found["kappa"], 1.5 * rms(second) / rms(first), rtol=0.01)
    assert list(found["channel"]) == list(range(CHANNELS)) and set(found["layer"]) == {1}


def test_kappa_of_swish_is_its_formula(images):
    model = network(activation("swish"), gamma=2.0)
    z = pre_activations(model, images)
    s = 1 / (1 + np.exp(-z))
    first, second = s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))
    kappa = curvatures(model, images)["kappa"]
    np.testing.assert_allclose(kappa, 2.0 * rms(second) / rms(first), rtol=0.01)


def test_no_scale_changes_kappa(images):
    """A wider KAF behind a larger gamma is the same function of the normalised input."""
    narrow, wide = network(Kaf()), network(Kaf(boundary=6.0), gamma=2.0)
    alpha = np.asarray(narrow.layers[3].alpha)
    wide.layers[3].alpha.assign(5 * alpha)
    one, other = (curvatures(model, images)["kappa"] for model in (narrow, wide))
    np.testing.assert_allclose(one, other, rtol=0.01)


def test_what_has_no_curvature_has_none(images):
    assert (curvatures(network(activation("relu")), images)["kappa"] == 0).all()
    assert (curvatures(network(keras.layers.Activation("linear")), images)["kappa"] == 0).all()


def test_batch_statistics_are_used_and_put_back(images):
    model = network(activation("swish"))
    before = model.get_weights()
    trained, fresh = (curvatures(model, images, training=t)["kappa"] for t in (False, True))
    assert not np.allclose(trained, fresh, rtol=0.05)
    for kept, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_probe_writes_the_median_of_each_layer(images):
    model, copy = network(Kaf()), network(Kaf())
    model.compile(keras.optimizers.SGD(0.5), "mse")
    logs = model.fit(
        images, np.zeros((40, 2)), epochs=2, verbose=0, callbacks=[CurvatureProbe(copy, images)]
    ).history
    expected = curvatures(model, images)["kappa"].median()
    assert logs["curvature_1"][-1] == pytest.approx(expected)
    assert logs["curvature_1"][0] != pytest.approx(logs["curvature_1"][1])
