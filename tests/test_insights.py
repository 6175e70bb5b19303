"""What goes on inside a network, against hand computations."""

import math

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import itertools

from activationsf import Kaf
from kaf_study import InputError, insights
from kaf_study.architectures import resnet

layers = keras.layers


def dense_network(kernel_1, kernel_2, activation="relu", *, normalise=False):
    """x (B, n) -> W1 -> activation -> W2 -> activation: the logits."""
    inputs = x = keras.Input((kernel_1.shape[0],))
    for kernel in (kernel_1, kernel_2):
        dense = layers.Dense(kernel.shape[1], use_bias=False)
        x = dense(x)
        dense.set_weights([kernel])
        if normalise:
            x = layers.BatchNormalization(epsilon=1e-9)(x)
        x = layers.Activation(activation)(x) if isinstance(activation, str) else activation()(x)
    return keras.Model(inputs, x)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def small_network():
    keras.utils.set_random_seed(0)
    return insights.plain_network("kaf", 2, filters=4, input_shape=(8, 8, 3))


def images(rng, count):
    return rng.uniform(size=(count, 8, 8, 3)).astype("float32")


# --------------------------------------------------------------------------- movement


def test_movement_of_two_dense_layers_is_the_one_computed_by_hand(rng):
    W1, W2 = rng.normal(size=(3, 4)), rng.normal(size=(4, 2))
    x, x_adv = rng.normal(size=(2, 5, 3)).astype("float32")
    table = insights.movement(dense_network(W1, W2), x, x_adv)

    def by_hand(x):
        first = np.maximum(x @ W1, 0)
        return {
            (1, "pre-activation"): x @ W1,
            (1, "activation"): first,
            (2, "pre-activation"): first @ W2,
            (2, "activation"): np.maximum(first @ W2, 0),
        }

    clean, attacked = by_hand(x), by_hand(x_adv)
    for key in clean:
        a, b = clean[key], attacked[key]
        rows = table[(table["layer"] == key[0]) & (table["of"] == key[1])]
        rows = rows[rows["values"] == "all"].sort_values("image")
        expected = {
            "distance": np.linalg.norm(b - a, axis=1),
            "clean_norm": np.linalg.norm(a, axis=1),
            "to_other_image": np.linalg.norm(a - np.roll(a, 1, axis=0), axis=1),
        }
        for column, values in expected.items():
            np.testing.assert_allclose(rows[column], values, rtol=1e-5, atol=1e-6)


def test_identical_images_are_at_distance_0_and_another_image_is_not(small_network, rng):
    x = images(rng, 3)
    table = insights.movement(small_network, x, x)
    assert (table["distance"] == 0).all()
    assert (table[["clean_norm", "to_other_image"]] > 0).all(axis=None)
    assert table["layer"].nunique() == 2
    relative = insights.relative_movement(table)
    assert (relative == 0).all(axis=None)


def test_an_attack_that_swaps_two_images_moves_by_exactly_the_ruler(small_network, rng):
    x = images(rng, 2)
    table = insights.movement(small_network, x, x[::-1])
    for of in insights.QUANTITIES:
        for values in ("all", "channel means"):
            relative = insights.relative_movement(table, of=of, values=values)
            np.testing.assert_allclose(relative, 1, rtol=1e-4)


def test_channel_means_are_of_positions_only(rng):
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, layers.Activation("linear")(inputs))
    x, x_adv = rng.normal(size=(2, 4, 4, 4, 3)).astype("float32")
    table = insights.movement(model, x, x_adv)
    means = table[(table["values"] == "channel means") & (table["of"] == "activation")]
    expected = np.linalg.norm((x_adv - x).mean(axis=(1, 2)), axis=1)
    np.testing.assert_allclose(means["distance"], expected, rtol=1e-5)


def test_relative_movement_ignores_scale_and_one_ruler_ignores_a_constant_too(rng):
    inputs = keras.Input((6,))

    def table(scale, shift):
        outputs = layers.Rescaling(scale, shift)(inputs)
        model = keras.Model(inputs, layers.Activation("linear")(outputs))
        return insights.movement(model, x, x + 0.1)

    x = rng.normal(size=(20, 6)).astype("float32")
    plain, scaled, shifted = table(1, 0), table(5, 0), table(1, 10)
    for ruler in insights.RULERS:
        a, b = (insights.relative_movement(t, ruler).to_numpy() for t in (plain, scaled))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    a, b = (insights.relative_movement(t).to_numpy() for t in (plain, shifted))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    a, b = (insights.relative_movement(t, "clean_norm")["value"].item() for t in (plain, shifted))
    assert b < 0.5 * a


def made_up(rng, distances):
    count = len(distances)
    return pd.DataFrame(
        {
            "layer": 1,
            "of": "pre-activation",
            "values": "all",
            "image": np.arange(count),
            "distance": distances,
            "clean_norm": 2.0,
            "to_other_image": 4.0,
        }
    )


def test_intervals_are_as_wide_as_the_standard_error_says(rng):
    distances = rng.uniform(1, 3, 400)
    row = insights.relative_movement(made_up(rng, distances), "clean_norm").loc[1]
    error = distances.std() / 20 / 2
    assert row["value"] == pytest.approx(distances.mean() / 2)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_ratio_of_two_models_is_paired_by_image(rng):
    distances = rng.uniform(1, 3, 100)
    ratio = insights.movement_ratio(made_up(rng, distances), made_up(rng, 2 * distances))
    np.testing.assert_allclose(ratio, 0.5)  # image by image: no uncertainty
    with pytest.raises(InputError, match="same images"):
        insights.movement_ratio(made_up(rng, distances), made_up(rng, distances[:50]))


def test_histograms_count_every_value_once_also_those_outside(rng):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Activation("relu")(inputs))
    x = np.float32([[-9, -0.5, 0.5, 1.5], [0.5, 0.6, 7, 8]])
    shares = insights.histograms(model, x, limit=2.0, bins=4, batch_size=1)
    np.testing.assert_allclose(shares, np.array([[1, 0, 1, 3, 1, 2]]) / 8)


def test_training_mode_leaves_the_moving_averages_alone(small_network, rng):
    before = small_network.get_weights()
    x = images(rng, 4)
    training = insights.histograms(small_network, x, training=True)
    insights.gradient_norms(small_network, x, np.arange(4))
    for a, b in zip(before, small_network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(training, insights.histograms(small_network, x))


def test_a_model_without_activation_layers_is_refused():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, activation="relu")(inputs))
    with pytest.raises(InputError, match="no activation layers"):
        insights.activation_layers(model)


# --------------------------------------------------------------------------- the variance argument


def test_relu_halves_the_squared_gradient_and_gains_pi_over_pi_minus_1():
    relu = insights.moments(keras.activations.relu)
    assert relu.squared_derivative.item() == pytest.approx(1 / 2, abs=1e-6)
    assert relu.variance.item() == pytest.approx(1 / 2 - 1 / (2 * math.pi), abs=1e-5)
    assert relu.gain == pytest.approx(math.pi / (math.pi - 1), rel=1e-4)


def test_a_straight_line_gains_exactly_1_and_everything_else_more():
    assert insights.moments(lambda x: 3 * x + 1).gain == pytest.approx(1, rel=1e-5)
    for name in ("relu", "elu", "swish", "tanh"):
        assert insights.moments(keras.activations.get(name)).gain > 1.01


def test_moments_of_one_gaussian_kernel_are_the_closed_forms():
    # kappa = exp(-c z^2), z ~ N(0, 1): E[kappa^n] = (1 + 2 n c)^-1/2, and
    # E[kappa'^2] = 4 c^2 E[z^2 exp(-2 c z^2)] = 4 c^2 (1 + 4 c)^-3/2
    c = 1.7
    m = insights.moments(lambda x: keras.ops.exp(-c * x * x))
    variance = (1 + 4 * c) ** -0.5 - 1 / (1 + 2 * c)
    assert m.variance.item() == pytest.approx(variance, rel=1e-4)
    assert m.squared_derivative.item() == pytest.approx(4 * c**2 * (1 + 4 * c) ** -1.5, rel=1e-4)


def test_a_random_start_has_the_moments_predicted_at_any_scale_of_alpha():
    keras.utils.set_random_seed(0)
    kaf = Kaf()
    kaf.build((None, 800))
    predicted, drawn = insights.random_start_moments(), insights.moments(kaf, 800)
    assert drawn.squared_derivative.mean() == pytest.approx(
        predicted.squared_derivative.item(), rel=0.05
    )
    assert drawn.variance.mean() == pytest.approx(predicted.variance.item(), rel=0.05)
    wider = insights.random_start_moments(alpha_std=0.5)
    assert wider.variance.item() == pytest.approx(100 * predicted.variance.item())
    assert wider.gain == pytest.approx(predicted.gain)


def test_a_ridge_start_has_the_moments_of_its_target():
    kaf = Kaf(ridge="elu")
    kaf.build((None, 1))
    start, target = insights.moments(kaf), insights.moments(keras.activations.elu)
    assert start.gain == pytest.approx(target.gain, rel=0.05)


def test_predicted_growth_of_dense_layers_with_batch_norm_is_the_gain(rng):
    W1, W2 = rng.normal(size=(3, 40)), rng.normal(size=(40, 20))
    growth = insights.predicted_growth(dense_network(W1, W2, normalise=True))
    np.testing.assert_allclose(growth, [math.pi / (math.pi - 1), 1], rtol=1e-4)


def test_predicted_growth_of_a_residual_block_is_the_one_computed_by_hand():
    # gain G, convolutions of gain a where the size changes: G (a + G) / (a + 1) for each block,
    # and G for the layer inside a block, over its end, weighted with 1 / (1 + a)
    keras.utils.set_random_seed(0)
    model = resnet("relu", depth=8)
    G = math.pi / (math.pi - 1)
    growth = insights.predicted_growth(model)
    assert len(growth) == 7 and growth[-1] == 1
    a = 2 / 3  # glorot: 2 fan_in / (fan_in + fan_out)
    block = G * (a + G) / (a + 1)
    np.testing.assert_allclose(growth[4] / growth[6], block, rtol=0.05)
    np.testing.assert_allclose(growth[5] / growth[6], G / (a + 1), rtol=0.05)
    np.testing.assert_allclose(growth[0] / growth[2], G * (1 + G) / 2, rtol=0.05)


def test_predicted_growth_refuses_layers_it_knows_nothing_of():
    inputs = keras.Input((8, 8, 3))
    x = layers.Activation("relu")(layers.MaxPooling2D()(inputs))
    with pytest.raises(InputError, match="MaxPooling2D"):
        insights.predicted_growth(keras.Model(inputs, x))


# --------------------------------------------------------------------------- measured gradients


def test_gradient_norms_of_two_dense_layers_are_those_computed_by_hand(rng):
    W1, W2 = rng.normal(size=(3, 4)), rng.normal(size=(4, 2))
    x, y = rng.normal(size=(6, 3)).astype("float32"), np.array([0, 1, 0, 1, 1, 0])
    norms = insights.gradient_norms(dense_network(W1, W2, "tanh"), x, y, loss_scale=8.0)
    h = np.tanh(x @ W1)
    logits = np.tanh(h @ W2)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    at_2 = (p - np.eye(2)[y]) / len(x)
    before_2 = at_2 * (1 - logits**2)
    at_1 = before_2 @ W2.T
    before_1 = at_1 * (1 - h**2)
    expected = {
        ("activation", 1): at_1,
        ("activation", 2): at_2,
        ("kernel", 1): x.T @ before_1,
        ("kernel", 2): h.T @ before_2,
        ("pre-activation", 1): before_1,
        ("pre-activation", 2): before_2,
    }
    assert list(zip(norms["of"], norms["layer"], strict=True)) == list(expected)
    np.testing.assert_allclose(
        norms["norm"], [np.linalg.norm(g) for g in expected.values()], rtol=1e-4
    )
    assert (norms["not_finite"] == 0).all()
    gains = insights.measured_gains(norms)
    ratio = np.sum(before_1**2) / np.sum(at_1**2)
    assert gains["squared_derivative"][1] == pytest.approx(ratio, rel=1e-4)
    assert gains["growth"][1] == pytest.approx(np.sum(before_1**2) / np.sum(before_2**2), rel=1e-4)


def test_growth_measured_in_a_wide_network_is_the_predicted_one(rng):
    widths = (50, 200, 200, 200)
    kernels = [rng.normal(size=shape) / math.sqrt(shape[0]) for shape in itertools.pairwise(widths)]
    inputs = x = keras.Input((50,))
    for kernel in kernels:
        dense = layers.Dense(kernel.shape[1])
        x = dense(x)
        dense.kernel.assign(kernel)
        x = Kaf()(layers.BatchNormalization()(x))
    model = keras.Model(inputs, layers.Dense(10)(x))
    x, y = rng.normal(size=(512, 50)).astype("float32"), rng.integers(0, 10, 512)
    measured = insights.measured_gains(insights.gradient_norms(model, x, y))["growth"]
    predicted = insights.predicted_growth(model)
    assert predicted[0] > 4  # two layers of random KAFs
    np.testing.assert_allclose(measured, predicted, rtol=0.15)


def test_float16_sums_overflow_and_are_reported():
    x = np.linspace(-3, 3, 61, dtype="float32")[:, None]
    half, full = insights.HalfPrecisionKaf(ridge="elu"), Kaf(ridge="elu")
    errors = np.abs(np.asarray(half(x)) - np.asarray(full(x)))
    assert 0.003 < errors.max() < 3  # coefficients that cancel, in 11 bits

    with insights.dtype_policy("mixed_float16"):
        inputs = keras.Input((1,))
        model = keras.Model(inputs, layers.Dense(2)(insights.HalfPrecisionKaf()(inputs)))
    assert keras.config.dtype_policy().name == "float32"
    y = np.zeros(len(x), int)
    assert (insights.gradient_norms(model, x, y)["not_finite"] == 0).all()
    norms = insights.gradient_norms(model, x, y, loss_scale=2.0**24)
    assert norms["not_finite"].max() > 0
    assert not np.isfinite(norms["norm"]).all()


def test_half_precision_kaf_survives_saving(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, insights.HalfPrecisionKaf()(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(model(x), loaded(x))


# --------------------------------------------------------------------------- training


def linear_model():
    inputs = keras.Input((2, 2, 1))
    outputs = layers.Dense(2, kernel_initializer="zeros")(layers.Flatten()(inputs))
    return keras.Model(inputs, outputs)


def test_training_steps_are_those_of_gradient_descent(rng):
    x = rng.normal(size=(8, 2, 2, 1)).astype("float32")
    y = rng.integers(0, 2, 8)
    model = linear_model()
    history = insights.train_steps(
        model, x, y, optimizer=keras.optimizers.SGD(0.5), steps=1, batch_size=8
    )
    flat = x.reshape(8, 4)
    upstream = (0.5 - np.eye(2)[y]) / 8
    gradient = [flat.T @ upstream, upstream.sum(axis=0)]
    assert history["loss"].item() == pytest.approx(math.log(2))
    norm = math.sqrt(sum((g**2).sum() for g in gradient))
    assert history["gradient_norm"].item() == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], -0.5 * gradient[0], rtol=1e-4, atol=1e-7)


def test_norms_of_watched_weights_are_those_before_each_step(rng):
    x, y = rng.normal(size=(8, 2, 2, 1)).astype("float32"), rng.integers(0, 2, 8)
    model = linear_model()
    kernel, bias = model.trainable_variables
    history = insights.train_steps(
        model, x, y, optimizer=keras.optimizers.SGD(0.5), steps=2, batch_size=8,
        watched={"bias": bias, "kernel": kernel},
    )  # fmt: skip
    upstream = (0.5 - np.eye(2)[y]) / 8
    of_kernel = np.linalg.norm(x.reshape(8, 4).T @ upstream)
    of_bias = np.linalg.norm(upstream.sum(axis=0))
    first, second = history.to_dict("records")
    assert first["gradient_kernel"] == pytest.approx(of_kernel, rel=1e-5)
    assert first["gradient_bias"] == pytest.approx(of_bias, rel=1e-5)
    assert first["weight_kernel"] == 0 and first["weight_bias"] == 0
    assert second["weight_kernel"] == pytest.approx(0.5 * of_kernel, rel=1e-4)
    assert second["weight_bias"] == pytest.approx(0.5 * of_bias, rel=1e-4)


def test_training_stops_at_a_loss_that_is_not_a_number(rng):
    x = rng.normal(size=(8, 2, 2, 1)).astype("float32")
    x[3] = np.nan
    y = np.zeros(8, int)
    optimizer = keras.optimizers.SGD(0.5)
    history = insights.train_steps(
        linear_model(), x, y, optimizer=optimizer, steps=20, batch_size=4
    )
    assert len(history) <= 2
    assert np.isnan(history["loss"].iloc[-1])


def test_training_repeats_the_images_until_the_steps_are_done(rng):
    x = rng.normal(size=(6, 2, 2, 1)).astype("float32")
    y = (x.mean(axis=(1, 2, 3)) > 0).astype(int)
    optimizer = keras.optimizers.SGD(0.5)
    history = insights.train_steps(
        linear_model(), x, y, optimizer=optimizer, steps=40, batch_size=4
    )
    assert list(history["step"]) == list(range(40))
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
