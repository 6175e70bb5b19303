"""Fast adversarial training does the paper's step, and its probe sees what it should."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from functools import partial

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import fbfadvtrain
from fbfadvtrain import (
    FastBetterFreeTrainedModel,
    Refinements,
    RobustnessProbe,
    fgsm_from_noise,
    fgsm_random_start,
)

EPS, ALPHA = 8 / 255, 10 / 255
SHAPE = (8, 8, 1)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def images(n, low=0.1, high=0.9, seed=0):
    return np.random.default_rng(seed).uniform(low, high, (n, *SHAPE)).astype("float32")


def labels(n, classes=2):
    return np.random.default_rng(1).integers(0, classes, n)


def linear(trainer=FastBetterFreeTrainedModel, classes=2, **kwargs):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    outputs = keras.layers.Dense(classes)(keras.layers.Flatten()(inputs))
    return trainer(inputs, outputs, **kwargs)


def margins(model, x, y):
    logits = np.asarray(model(x))
    return logits[np.arange(len(y)), y] - logits[np.arange(len(y)), 1 - y]


def worst_margins(model, x, y):
    """margin - epsilon * ||w||_1, exact where the pixels are at least epsilon from 0 and 1."""
    kernel = np.asarray(model.layers[-1].kernel)
    return margins(model, x, y) - EPS * np.abs(kernel[:, 0] - kernel[:, 1]).sum()


def small_conv(seed=5, **kwargs):
    """Batch norm, dropout and l2: everything that a step must treat rightly."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    x = keras.layers.Conv2D(4, 3, strides=2, kernel_regularizer=keras.regularizers.L2(0.1))(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Activation("swish")(x)
    x = keras.layers.Dropout(0.2, seed=1)(keras.layers.Flatten()(x))
    outputs = keras.layers.Dense(3, dtype="float32")(x)
    return FastBetterFreeTrainedModel(inputs, outputs, eps=EPS, alpha=ALPHA, seed=seed, **kwargs)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- the attack


@pytest.mark.parametrize("seed", range(3))
def test_one_step_of_twice_epsilon_reaches_the_worst_case_from_any_start(seed):
    model, x, y = linear(keras.Model), images(20, seed=seed), labels(20)
    # Labels are the true ones: an image already misclassified is pushed further off its class.
    assert (margins(model, x, y) < 0).any() and (margins(model, x, y) > 0).any()
    x_adv = fgsm_random_start(
        model, CROSS_ENTROPY, tf.constant(x), y, epsilon=EPS, alpha=2 * EPS,
        seed_generator=keras.random.SeedGenerator(seed),
    )  # fmt: skip
    np.testing.assert_allclose(margins(model, x_adv, y), worst_margins(model, x, y), atol=1e-5)


@pytest.mark.parametrize("noise", [EPS, 2 * EPS])
def test_the_step_is_the_formula_from_a_start_that_lies_in_the_image(noise):
    """Noise, the image; one step; the ball, which N-FGSM (of 2 eps) leaves out; the image."""
    model, x, y, seen = linear(keras.Model), images(500, -0.2, 1.2).clip(0, 1), labels(500), []

    def recorded(x, training):
        seen.append((np.asarray(x), training))
        return model(x)

    arguments = (recorded, CROSS_ENTROPY, tf.constant(x), y)
    seed_generator = keras.random.SeedGenerator(0)
    if noise == EPS:
        x_adv = fgsm_random_start(
            *arguments, epsilon=EPS, alpha=ALPHA, seed_generator=seed_generator
        )
    else:
        start, x_adv = fgsm_from_noise(
            *arguments, noise=noise, alpha=ALPHA, ball=None, seed_generator=seed_generator
        )
        np.testing.assert_array_equal(start, seen[0][0])
    [(start, training)] = seen
    assert training is True
    drawn = keras.random.uniform(x.shape, -noise, noise, seed=keras.random.SeedGenerator(0))
    np.testing.assert_allclose(start, (x + np.asarray(drawn)).clip(0, 1), atol=1e-6)
    kernel = np.asarray(model.layers[-1].kernel)
    away = np.sign(np.where(y[:, None], 1, -1) * (kernel[:, 0] - kernel[:, 1]))  # lowers the margin
    x_expected = start + ALPHA * away.reshape(x.shape)
    if noise == EPS:
        x_expected = np.clip(x_expected, x - EPS, x + EPS)
    np.testing.assert_allclose(x_adv, np.clip(x_expected, 0, 1), atol=1e-6)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("alpha", [0.0, ALPHA, 3 * EPS])
def test_start_and_result_stay_in_the_ball_and_in_the_image(n, alpha):
    x = images(n, -0.5, 1.5).clip(0, 1)  # about half of the pixels are 0 or 1
    x_adv = fgsm_random_start(
        linear(keras.Model), CROSS_ENTROPY, tf.constant(x), labels(n), epsilon=EPS, alpha=alpha,
        seed_generator=keras.random.SeedGenerator(0),
    )  # fmt: skip
    x_adv = np.asarray(x_adv)
    assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1
    assert 0.9 * EPS < np.abs(x_adv - x).max() <= EPS + 1e-6


def test_the_attack_computes_no_weight_gradients(monkeypatch):
    tapes = []

    def recorded_tape(**kwargs):
        tapes.append(tf.GradientTape(**kwargs))
        return tapes[-1]

    monkeypatch.setattr(fbfadvtrain, "tf", types.SimpleNamespace(GradientTape=recorded_tape))
    fbfadvtrain.input_gradient(
        linear(keras.Model), CROSS_ENTROPY, tf.constant(images(2)), labels(2), training=True
    )
    assert len(tapes) == 1 and tapes[0].watched_variables() == ()


# --- random starts in training


@keras.saving.register_keras_serializable(package="test_fbfadvtrain")
class Seen(keras.layers.Layer):
    """Keeps the last batch of 4 that it saw in training; a variable, so that XLA allows it."""

    def build(self, input_shape):
        self.seen = self.add_weight(shape=(4, *input_shape[1:]), trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.seen.assign(inputs)
        return inputs


def starts(model, batches=3):
    """What the model was trained on in `batches` identical batches, with alpha = 0: the starts."""
    x, y, seen = images(4), labels(4), []
    for _ in range(batches):
        model.train_on_batch(x, y)
        seen.append(keras.ops.convert_to_numpy(model.get_layer("seen").seen) - x)
    return np.array(seen)


def recording(seed=5, **compile_arguments):
    inputs = keras.Input(SHAPE)
    x = keras.layers.Flatten()(Seen(name="seen")(inputs))
    outputs = keras.layers.Dense(2)(x)
    model = FastBetterFreeTrainedModel(inputs, outputs, eps=EPS, alpha=0, seed=seed)
    model.compile("sgd", CROSS_ENTROPY, **compile_arguments)
    return model


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_random_start_differs_between_steps(mode, tmp_path):
    model = recording(**mode)
    first = starts(model)
    model.save(tmp_path / "trainer.keras")
    loaded = keras.models.load_model(tmp_path / "trainer.keras")
    assert loaded.jit_compile == mode.get("jit_compile", False)
    for some in (first, starts(loaded)):
        assert np.abs(some).max() <= EPS + 1e-6
        for i in range(len(some)):
            for j in range(i):
                # of two independent uniform draws, the mean distance is 2/3 epsilon
                assert np.abs(some[i] - some[j]).mean() == pytest.approx(EPS * 2 / 3, rel=0.2)


def test_the_seed_decides_the_starts():
    first = starts(recording(seed=5))
    np.testing.assert_array_equal(first, starts(recording(seed=5)))
    assert not np.allclose(first, starts(recording(seed=6)), atol=1e-3)


# --- the training step


@pytest.mark.filterwarnings("error:The structure of")
@pytest.mark.parametrize("kind", ["plain", "weighted", "refined"])
def test_a_step_is_the_ordinary_one_on_the_perturbed_batch(kind):
    x, y = images(6), labels(6, classes=3)
    weight = np.linspace(0.2, 3, 6).astype("float32") if kind == "weighted" else np.ones(6, "f")
    refinements = Refinements(noise=2, ramp=4, pairing=5, pairing_ramp=6)
    model = small_conv(**({"refinements": refinements} if kind == "refined" else {}))
    twin = keras.models.clone_model(model.inference_model())
    twin.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    model.optimizer.iterations.assign(3)
    reported = model.train_on_batch(x, y, sample_weight=weight if kind == "weighted" else None)

    def cross_entropy(logits):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)

    refined = kind == "refined"
    eps, alpha = (0.75 * EPS, 0.75 * ALPHA) if refined else (EPS, ALPHA)  # after 3 of 4 steps
    noise = keras.random.uniform(x.shape, -1, 1, seed=keras.random.SeedGenerator(5))
    start = tf.clip_by_value(x + noise * (2 * eps if refined else eps), 0.0, 1.0)
    with tf.GradientTape() as tape:
        tape.watch(start)
        loss = tf.reduce_mean(cross_entropy(twin(start, training=True)))
    x_adv = start + alpha * tf.sign(tape.gradient(loss, start))
    if not refined:
        x_adv = tf.clip_by_value(x_adv, x - eps, x + eps)
    x_adv = tf.clip_by_value(x_adv, 0.0, 1.0)
    with tf.GradientTape() as tape:
        logits = twin(x_adv, training=True)
        loss = tf.reduce_mean(weight * cross_entropy(logits))
        objective = loss + tf.add_n(twin.losses)
        if refined:  # after 3 of 6 steps
            difference = logits - twin(start, training=True)
            objective += 0.5 * 5 * tf.reduce_mean(difference**2)
    for variable, gradient in zip(
        twin.trainable_variables, tape.gradient(objective, twin.trainable_variables), strict=True
    ):
        variable.assign_sub(0.1 * gradient)

    # The adversarial loss alone, without the regulariser.
    assert reported == pytest.approx(float(loss), rel=1e-4)
    assert float(tf.add_n(twin.losses)) > 0.01
    # Moving statistics are among the weights: all passes of a step have updated them.
    for ours, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_with_no_radius_a_step_is_keras_own():
    trained = []
    for trainer in (partial(FastBetterFreeTrainedModel, eps=0, alpha=0), keras.Model):
        keras.utils.set_random_seed(2)
        inputs = keras.Input(SHAPE)
        x = keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 3)(inputs))
        model = trainer(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
        model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
        for seed in range(2):
            model.train_on_batch(images(6, seed=seed), labels(6))
        trained.append(model.weights)
    for ours, keras_own in zip(*trained, strict=True):  # moving statistics: of one pass a step
        np.testing.assert_allclose(ours, keras_own, atol=1e-6, err_msg=ours.path)


def test_fit_takes_a_short_last_batch_and_counts_each_image_once():
    model, x, y = linear(eps=0, alpha=0), images(9), labels(9)
    model.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY, metrics=["accuracy"])
    fitted = model.fit(x, y, batch_size=4, verbose=0).history
    loss, accuracy = model.evaluate(x, y, verbose=0)
    assert fitted["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert fitted["accuracy"][0] == pytest.approx(accuracy)


@pytest.mark.filterwarnings("error:The structure of")
def test_evaluate_and_predict_see_images_as_they_are():
    model, x, y = linear(eps=0.5, alpha=0.5), images(9), labels(9)
    model.compile("sgd", CROSS_ENTROPY)
    expected = np.asarray(model.inference_model()(x))
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(float(CROSS_ENTROPY(y, expected)))


def test_a_loss_may_be_a_name_or_a_function():
    def own(y, logits):
        return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    losses = []
    for loss in (CROSS_ENTROPY, own):
        model = linear(seed=3)
        model.compile("sgd", loss)
        losses.append(model.train_on_batch(images(5), labels(5)))
    assert losses[0] == pytest.approx(losses[1])
    model = linear(seed=3, classes=1)
    model.compile("sgd", "mse")
    assert np.isfinite(model.train_on_batch(images(5), labels(5)[:, None]))


def test_mixed_float16_trains_with_loss_scaling():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = small_conv()
        model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
        before = model.get_weights()
        losses = [model.train_on_batch(images(6), labels(6, classes=3)) for _ in range(2)]
    finally:
        keras.config.set_dtype_policy(policy)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert np.isfinite(losses).all()
    assert int(model.optimizer.inner_optimizer.iterations) == 2
    assert not np.array_equal(before[0], model.get_weights()[0])
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_attack_in_float16_follows_the_gradient_of_float32():
    """Of confident predictions: the gradient of the plain mean loss underflows in float16."""
    x, signs = images(128), []
    policy = keras.config.dtype_policy()
    for name in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(name)
        try:
            model = small_conv()
        finally:
            keras.config.set_dtype_policy(policy)
        if not signs:
            weights = model.get_weights()
            weights[-2] *= 40
        model.set_weights(weights)
        x = tf.constant(x)
        y = np.argmax(model(x, training=False), axis=-1)
        gradient = fbfadvtrain.input_gradient(model, CROSS_ENTROPY, x, y, training=False)
        signs.append(np.sign(gradient.numpy()))
    assert np.mean(signs[0] == signs[1]) > 0.98


def test_scale_of_the_attack_changes_no_digit_in_float32(monkeypatch):
    model, x, y = small_conv(), tf.constant(images(16)), labels(16, classes=3)
    scaled = fbfadvtrain.input_gradient(model, CROSS_ENTROPY, x, y, training=False).numpy()
    monkeypatch.setattr(fbfadvtrain, "GRADIENT_SCALE", 1.0)
    plain = fbfadvtrain.input_gradient(model, CROSS_ENTROPY, x, y, training=False).numpy()
    np.testing.assert_array_equal(scaled, 2.0**10 * plain)


@pytest.mark.parametrize("loss", [None, [CROSS_ENTROPY], {"a": CROSS_ENTROPY}])
def test_anything_but_one_loss_is_refused(loss):
    with pytest.raises(ValueError, match="one loss; received"):
        linear().compile("sgd", loss)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"eps": -0.1}, "from 0 to 1; received -0.1"),
        ({"eps": 8}, "from 0 to 1; received 8 and"),
        ({"alpha": -0.1}, "from 0 to 1"),
        ({"alpha": 10}, "from 0 to 1"),
        ({"pixel_range": (1, 0)}, "lowest, highest"),
        ({"pixel_range": (0, float("nan"))}, "lowest, highest"),
        ({"refinements": {"noise": -1}}, "not negative; received"),
        ({"refinements": {"pairing": float("inf")}}, "not negative; received"),
    ],
)
def test_impossible_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        linear(**arguments)


def test_a_model_of_integer_images_has_no_gradient_and_is_refused():
    inputs = keras.Input(SHAPE, dtype="uint8")
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs)))
    with pytest.raises(ValueError, match="float type; received uint8"):
        FastBetterFreeTrainedModel(inputs, outputs)


# --- images of other ranges and types


@pytest.mark.parametrize("pixel_range", [(0, 255), (-1, 1)])
def test_a_pixel_range_scales_radius_step_and_clipping(pixel_range, monkeypatch):
    """The same steps on images in [0, 1], and in another range before a layer that scales back."""
    low, high = pixel_range
    x, y = images(6, -0.5, 1.5).clip(0, 1), labels(6)
    trained = []
    for given, scaling in (((0, 1), None), (pixel_range, (1 / (high - low), -low / (high - low)))):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(SHAPE)
        unit = keras.layers.Rescaling(*scaling)(inputs) if scaling else inputs
        # Where the signs of the gradient lie depends on the images, unlike in a linear model.
        hidden = keras.layers.Dense(4, "tanh")(keras.layers.Flatten()(unit))
        outputs = keras.layers.Dense(2)(hidden)
        model = FastBetterFreeTrainedModel(
            inputs, outputs, eps=0.2, alpha=0.1, seed=5, pixel_range=given
        )
        model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY, run_eagerly=True)
        seen = []
        perturbed = model.perturbed
        monkeypatch.setattr(
            model, "perturbed", lambda x, y, p=perturbed, s=seen: (s.append(p(x, y)), s[-1])[1]
        )
        model.train_on_batch((given[0] + (given[1] - given[0]) * x).astype("float32"), y)
        x_adv = (np.asarray(seen[0]) - given[0]) / (given[1] - given[0])
        trained.append((x_adv, *model.get_weights()))
    assert np.abs(trained[0][0] - x).max() == pytest.approx(0.2, abs=1e-5)
    for ours, theirs in zip(*trained, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_numbers_of_any_type_are_cast():
    x, y = np.round(255 * images(4)), labels(4)
    weights = []
    for dtype in ("float32", "float64", "uint8", "int32"):
        model = linear(seed=5, pixel_range=(0, 255))
        model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
        model.fit(tf.data.Dataset.from_tensor_slices((x.astype(dtype), y)).batch(4), verbose=0)
        weights.append(model.get_weights())
    for others in weights[1:]:
        for ours, theirs in zip(weights[0], others, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("pixel_range", "scale", "shift", "is_refused"),
    [
        ((0, 1), 255, 0, True),
        ((0, 1), 2, -1, True),
        ((0, 1), 1 / 255, 0, True),  # divided by 255 twice
        ((0, 255), 1, 0, True),
        ((0, 1), np.nan, 0, True),
        ((-1, 1), 2, -1, False),
        ((0, 1), 1.06, -0.03, False),  # interpolated
        ((0, 1), 0, 0, False),  # black
    ],
)
def test_images_that_do_not_fit_the_range_are_refused_before_a_step(
    pixel_range, scale, shift, is_refused
):
    model = linear(pixel_range=pixel_range)
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY, run_eagerly=True)
    before = model.get_weights()
    x, y = images(4, 0, 1), labels(4)
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    if not is_refused:
        model.train_on_batch(scale * x + shift, y)
        model.train_on_batch(255 * x, y)  # only the first batch is looked at
        return
    for _ in range(2):
        with pytest.raises(ValueError, match="first batch lie in") as error:
            model.train_on_batch(scale * x + shift, y)
        assert "\n" not in str(error.value)
    np.testing.assert_array_equal(before[0], model.get_weights()[0])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_compiled_step_refuses_them_as_well_and_goes_on_with_others(jit_compile):
    model, x, y = linear(), images(4), labels(4)
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY, jit_compile=jit_compile)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"pixel_range=\(0\.0, 1\.0\)"):
        model.fit(255 * x, y, batch_size=2, verbose=0)
    assert np.array_equal(before[0], model.get_weights()[0]) == (not jit_compile)
    model.fit(x, y, batch_size=2, epochs=2, verbose=0)
    model.fit(255 * x, y, batch_size=2, verbose=0)  # not the first batch any more


# --- several devices

REPLICAS = """
import os
import keras, numpy as np, tensorflow as tf
import fbfadvtrain
from kaf_study.lr_policy import LRFinder

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
rng = np.random.default_rng(0)
x, y = rng.uniform(size=(9, 8, 8, 1)).astype("float32"), np.arange(9) % 3
weight = np.linspace(0.2, 3, 9).astype("float32")

def model(strategy, reduction="sum_over_batch_size", batch_norm=False):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8, 8, 1))
        l2 = keras.regularizers.L2(0.1)
        hidden = keras.layers.Conv2D(4, 3, strides=2, kernel_regularizer=l2)(inputs)
        if batch_norm:
            hidden = keras.layers.BatchNormalization()(hidden)
        hidden = keras.layers.Flatten()(keras.layers.Activation("swish")(hidden))
        outputs = keras.layers.Dense(3)(hidden)
        model = fbfadvtrain.FastBetterFreeTrainedModel(inputs, outputs, seed=5)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        model.compile(keras.optimizers.SGD(0.1), loss)
    return model

def plain(strategy):  # its optimizer has no variables yet
    trainer = model(strategy)
    with strategy.scope():
        network = trainer.inference_model()
        network.compile(keras.optimizers.SGD(0.1, momentum=0.5), trainer.loss)
    return network

# Batches of 6 and 3: 3 images and 3, 2 and 1; batches of 8 and 1: 4 images and 4, 1 and none.
settings = {"sum_over_batch_size": 8, "sum": 6, "mean_with_sample_weight": 6}
facts = os.environ["FACTS"].split()
for reduction in filter(settings.get, facts):
    batch_size = settings[reduction]
    losses, weights = [], []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        trainer = model(strategy, reduction)
        data = {"sample_weight": weight, "batch_size": batch_size, "shuffle": False, "verbose": 0}
        losses.append(trainer.fit(x, y, **data).history["loss"])
        weights.append(trainer.get_weights())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    print(reduction)

if "batch_norm" in facts:
    normalised = model(mirrored, batch_norm=True)
    normalised.fit(x, y, batch_size=8, verbose=0)
    assert all(np.isfinite(weight).all() for weight in normalised.get_weights())
    print("batch_norm")

if "range_test" in facts:
    find = {"steps": 4, "batch_size": 6, "min_lr": 1e-3, "max_lr": 0.1}
    strategies = tf.distribute.get_strategy(), mirrored
    for make, n in ((model, 9), (plain, 8)):  # Keras' own loss is right for equal shares alone
        found = [LRFinder(make(s)).find(x[:n], y[:n], **find) for s in strategies]
        np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-4)
    print("range_test")
"""


@pytest.mark.parametrize(
    "facts",
    [
        "sum_over_batch_size",
        pytest.param("sum mean_with_sample_weight batch_norm range_test", marks=pytest.mark.slow),
    ],
)
def test_two_replicas_train_as_one_device(facts):
    """Regularisers, sample weights, short last batches; the range test outside of the scope."""
    result = run_python(REPLICAS, FACTS=facts)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == facts.split()


# --- files


def with_dropout():
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    x = keras.layers.Dropout(0.5, seed=1)(keras.layers.Flatten()(inputs))
    model = FastBetterFreeTrainedModel(inputs, keras.layers.Dense(2)(x), eps=0.3, alpha=0.3, seed=5)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), CROSS_ENTROPY)
    return model


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    """From a .keras file, from a file of weights, and by Keras' own callback."""

    def fit(model, epochs, **kwargs):
        x, y = images(4), labels(4)
        model.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, **kwargs)
        return model

    uninterrupted = fit(with_dropout(), 4)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    begun = fit(with_dropout(), 2, callbacks=[backup])
    begun.save(tmp_path / "begun.keras")
    begun.save_weights(tmp_path / "begun.weights.h5")
    loaded = keras.models.load_model(tmp_path / "begun.keras")
    with_weights = with_dropout()
    with_weights.load_weights(tmp_path / "begun.weights.h5")
    for resumed in (
        fit(loaded, 4, initial_epoch=2),
        fit(with_weights, 4, initial_epoch=2),
        fit(with_dropout(), 4, callbacks=[backup]),
    ):
        for ours, theirs in zip(resumed.variables, uninterrupted.variables, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_files_go_from_a_trainer_to_a_plain_model_and_back(tmp_path):
    trainer, plain = small_conv(), keras.models.clone_model(small_conv().inference_model())
    trainer.set_weights([weight + 1 for weight in trainer.get_weights()])
    trainer.save_weights(tmp_path / "trainer.weights.h5")
    plain.load_weights(tmp_path / "trainer.weights.h5")
    other = small_conv()
    plain.save_weights(tmp_path / "plain.weights.h5")
    other.load_weights(tmp_path / "plain.weights.h5")
    for model in (plain, other):
        for ours, theirs in zip(model.get_weights(), trainer.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_trained_model_loads_from_either_format(suffix, tmp_path):
    model, x, y = small_conv(pixel_range=(0, 2)), images(6), labels(6, classes=3)
    model.refinements = Refinements(noise=2, pairing=3.5)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), CROSS_ENTROPY, metrics=["accuracy"])
    model.train_on_batch(x, y)
    model.save(tmp_path / f"trainer.{suffix}")
    loaded = keras.models.load_model(tmp_path / f"trainer.{suffix}")
    assert type(loaded) is FastBetterFreeTrainedModel
    assert loaded.pixel_range == (0, 2) and loaded.refinements == model.refinements
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5)
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(loaded.train_on_batch(x, y)).all()


# --- other processes


def test_a_fresh_process_loads_the_trainer_and_goes_on(tmp_path):
    model, x, y = small_conv(), images(6), labels(6, classes=3)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), CROSS_ENTROPY, metrics=["accuracy"])
    model.fit(x, y, batch_size=3, verbose=0)
    model.save(tmp_path / "trainer.keras")
    assert type(model.inference_model()) is type(keras.Model(model.inputs, model.outputs))
    model.inference_model().save(tmp_path / "inference.keras")
    np.save(tmp_path / "logits.npy", model.predict(x, verbose=0))
    np.save(tmp_path / "x.npy", x)
    result = run_python(f"""
        import keras, numpy as np
        folder = {str(tmp_path)!r}
        x, logits = np.load(folder + "/x.npy"), np.load(folder + "/logits.npy")
        plain = keras.models.load_model(folder + "/inference.keras")
        np.testing.assert_allclose(plain.predict(x, verbose=0), logits, rtol=1e-4)
        import fbfadvtrain
        model = keras.models.load_model(folder + "/trainer.keras")
        np.testing.assert_allclose(model.predict(x, verbose=0), logits, rtol=1e-4)
        assert type(model) is fbfadvtrain.FastBetterFreeTrainedModel
        assert model.eps == {EPS!r} and model.alpha == {ALPHA!r}
        assert model.get_config()["seed"] == 5
        assert int(model.optimizer.iterations) == 2
        assert any(np.any(v) for v in model.optimizer.variables if "momentum" in v.path)
        import warnings
        warnings.simplefilter("error", UserWarning)
        history = model.fit(x, np.zeros(6, int), verbose=0).history
        assert set(history) == {{"loss", "accuracy"}}, history
        assert int(model.optimizer.iterations) == 3
    """)
    assert result.returncode == 0, result.stderr


def test_another_backend_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"this is torch\. Set KERAS_BACKEND=tensorflow"):
        linear()


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_jax_is_refused_with_the_way_out():
    result = run_python(
        """
        import keras
        from fbfadvtrain import FastBetterFreeTrainedModel
        inputs = keras.Input((4,))
        FastBetterFreeTrainedModel(inputs, keras.layers.Dense(2)(inputs))
        """,
        KERAS_BACKEND="jax",
    )
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("RuntimeError: FastBetterFreeTrainedModel needs Keras' TensorFlow")
    assert "this is jax" in last_line and last_line.endswith("Set KERAS_BACKEND=tensorflow.")


# --- the probe


def test_probe_reports_the_closed_form_accuracies():
    model, x = linear(), images(50)
    kernel = model.layers[-1].kernel
    kernel.assign(kernel * 0.2)  # margins of the order of epsilon * ||w||_1
    y = np.where(margins(model, x, np.zeros(50, int)) > 0, 0, 1)
    y[:5] = 1 - y[:5]
    model.compile("sgd", CROSS_ENTROPY)
    probe = RobustnessProbe(x, y, epsilon=EPS, batch_size=16)
    probe.set_model(model)
    probe.on_train_begin()
    robust = float(np.mean(worst_margins(model, x, y) > 0))
    assert 0.1 < robust < 0.8
    # FGSM from the image is exact here, and PGD's ten steps of 2/255 cross the whole ball.
    expected = {"probe_clean": 0.9, "probe_fgsm": robust, "probe_pgd": robust}
    assert probe.accuracies() == pytest.approx(expected)


def test_probe_takes_labels_as_keras_gives_them_and_any_compiled_model():
    x, y = images(40), labels(40)
    expected = None
    for trainer in (FastBetterFreeTrainedModel, keras.Model):
        for given in (y, y[:, None]):
            model = linear(trainer)
            model.compile("sgd", CROSS_ENTROPY)
            probe = RobustnessProbe(x, given, epsilon=EPS, batch_size=16)
            probe.set_model(model)
            probe.on_train_begin()
            expected = expected or probe.accuracies()
            assert probe.accuracies() == expected
            has_an_attack = trainer is FastBetterFreeTrainedModel
            assert (probe.measure()[1] is not None) == has_an_attack
    assert 0 < expected["probe_clean"] < 1
    for wrong in (y[:39], np.eye(2)[y[:39]], y[:, None, None]):
        with pytest.raises(ValueError, match=r"y of shape \(40,\) or \(40, classes\); received"):
            RobustnessProbe(x, wrong)


def own_loss(y, logits):
    return keras.losses.categorical_crossentropy(y, logits, from_logits=True)


def test_probe_serves_losses_of_numbers_and_of_one_hot_rows_alike():
    x, y = images(40), labels(40)
    smoothed = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    measured = []
    for loss, given in (
        (CROSS_ENTROPY, y),
        (CROSS_ENTROPY, np.eye(2)[y]),
        (smoothed, y),
        (own_loss, np.eye(2)[y]),
    ):
        model = linear()
        model.compile("sgd", loss)
        probe = RobustnessProbe(x, given, epsilon=EPS)
        probe.set_model(model)
        probe.on_train_begin()
        measured.append(probe.measure())
    assert measured[0][0]["probe_fgsm"] < measured[0][0]["probe_clean"]
    assert all(row == measured[0] for row in measured)
    probe = RobustnessProbe(x, y)
    probe.set_model(model)
    with pytest.raises(ValueError, match="own_loss does not take the labels"):
        probe.on_train_begin()


def test_probe_measures_the_same_where_functions_run_eagerly():
    x, y = images(40), labels(40)
    model = linear()
    model.compile("sgd", CROSS_ENTROPY)
    measured = []
    for is_eager in (False, True):
        tf.config.run_functions_eagerly(is_eager)
        try:
            probe = RobustnessProbe(x, y, epsilon=EPS, batch_size=16)
            probe.set_model(model)
            probe.on_train_begin()
            measured.append(probe.accuracies())
        finally:
            tf.config.run_functions_eagerly(False)
    assert measured[0] == measured[1]


def test_probe_has_images_in_the_range_of_the_model():
    x, y = np.round(255 * images(40)).astype("uint8"), labels(40)
    rows = []
    unit_images = x.astype("float32") / 255
    trainer = FastBetterFreeTrainedModel
    for given, scale, kind in (
        (x, 255, partial(trainer, pixel_range=(0, 255))),
        (unit_images, 1, partial(trainer, pixel_range=(0, 1))),
        (unit_images, 1, keras.Model),  # which does not say; [0, 1] is meant
    ):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(SHAPE)
        unit = keras.layers.Rescaling(1 / scale)(inputs)
        dense = keras.layers.Dense(2, bias_initializer=keras.initializers.Constant([0.2, -0.2]))
        model = kind(inputs, dense(keras.layers.Flatten()(unit)))
        model.compile("sgd", CROSS_ENTROPY)
        probe = RobustnessProbe(given, y, epsilon=EPS)
        probe.set_model(model)
        probe.on_train_begin()
        rows.append(probe.measure())
    assert rows[0][0] == rows[1][0] == rows[2][0]
    assert rows[0][0]["probe_fgsm"] < rows[0][0]["probe_clean"]
    for wrong in (x, unit_images + 0.5, unit_images - 0.5):
        probe = RobustnessProbe(wrong, y)
        probe.set_model(model)
        with pytest.raises(ValueError, match="must lie in"):
            probe.on_train_begin()


def test_pgd_attacks_the_model_in_inference():
    def model(x, training):  # what raises the loss in training lowers it in inference
        return tf.reshape(x, (-1, 12))[:, :2] * (-1.0 if training else 1.0)

    x = tf.fill((1, 2, 2, 3), 0.5)
    x_adv = fbfadvtrain.pgd(
        model, CROSS_ENTROPY, x, tf.constant([0]), start=x, epsilon=0.1, alpha=0.04, steps=4
    )
    np.testing.assert_allclose(np.ravel(x_adv), [0.4, 0.6, *[0.5] * 10], atol=1e-6)


def test_other_callbacks_see_the_probe(tmp_path):
    model, x, y = linear(), images(8), labels(8)
    model.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY)
    history = model.fit(
        x,
        y,
        epochs=3,
        verbose=0,
        callbacks=[
            RobustnessProbe(x, y),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "{epoch}-{probe_pgd:.3f}.keras", monitor="probe_pgd", mode="max"
            ),
        ],
    ).history
    logged = pd.read_csv(tmp_path / "log.csv")
    for key in ("probe_clean", "probe_fgsm", "probe_pgd"):
        np.testing.assert_allclose(logged[key], history[key])
    last = f"3-{history['probe_pgd'][-1]:.3f}.keras"
    assert (tmp_path / last).exists()


def scripted(figures, history=()):
    """A probe with given (FGSM, PGD) accuracies of each epoch, and the weights before each."""
    probe = RobustnessProbe(images(2), labels(2), history=history)
    script = iter(figures)

    def measure():
        fgsm, pgd = next(script)
        return {"probe_clean": 0.9, "probe_fgsm": fgsm, "probe_pgd": pgd}, None

    probe.measure = measure
    return probe


def fit_scripted(probe, epochs=4):
    model = small_conv()
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    weights = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: weights.append(model.get_weights())
    )
    history = model.fit(
        images(8), labels(8, 3), epochs=epochs, verbose=0, callbacks=[keep, probe]
    ).history
    return model, history, weights


def test_catastrophic_overfitting_stops_the_training_and_is_undone(capsys):
    probe = scripted([(0.4, 0.3), (0.5, 0.4), (0.9, 0.1), (0.9, 0.0)])
    model, history, weights_before = fit_scripted(probe)
    assert len(history["loss"]) == 3 and probe.overfitted_in_epoch == 2
    for ours, theirs in zip(model.get_weights(), weights_before[2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    said = capsys.readouterr().out.strip()
    assert "\n" not in said and "Catastrophic overfitting in epoch 3" in said
    assert "40.0% -> 10.0%" in said and "50.0% -> 90.0%" in said


def test_probe_knows_the_accuracy_under_the_attack_of_the_training():
    """A step of 2 eps reaches the worst corner of a linear model from anywhere; one of 0 stays."""
    for alpha in (2 * EPS, 0.0):
        model, x = linear(FastBetterFreeTrainedModel), images(50)
        kernel = model.layers[-1].kernel
        kernel.assign(kernel * 0.2)
        model.alpha = alpha
        y = np.where(margins(model, x, np.zeros(50, int)) > 0, 0, 1)
        model.compile("sgd", CROSS_ENTROPY)
        probe = RobustnessProbe(x, y, epsilon=EPS, batch_size=16)
        probe.set_model(model)
        probe.on_train_begin()
        left = worst_margins(model, x, y) if alpha else margins(model, probe.images[-1], y)
        assert probe.measure()[1] == pytest.approx(np.mean(left > 0))


@pytest.mark.parametrize(
    ("training_attack", "pgd", "n", "is_seen"),
    [
        (0.34, 0.12, 512, True),
        (0.34, 0.15, 512, False),  # less than half, but within two standard errors of it
        (0.34, 0.12, 16, False),
        (0.32, 0.28, 180, False),  # ReLU on digits, third epoch; training accuracy 53 %
        (0.146, 0.041, 512, False),  # a VGG with KAF leaves chance in its second epoch
        (0.2, 0.041, 512, True),
        (None, 0.01, 512, False),  # ordinary training: no attack to be overfitted
    ],
)
def test_catastrophic_overfitting_from_the_start_is_seen_by_the_attack_of_the_training(
    training_attack, pgd, n, is_seen, capsys
):
    probe = RobustnessProbe(images(n), labels(n), history=[{"probe_fgsm": 0.22, "probe_pgd": 0.11}])
    row = {"probe_clean": 0.33, "probe_fgsm": 0.18, "probe_pgd": pgd}
    probe.measure = lambda: (row, training_attack)
    model = keras.Sequential([keras.layers.Input(images(1).shape[1:]), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    probe.set_model(model)
    probe.good_weights = before = model.get_weights()
    model.set_weights([weight + 1 for weight in before])
    model.stop_training = False
    probe.on_epoch_end(1, {"accuracy": 0.9})
    assert model.stop_training == is_seen and (probe.overfitted_in_epoch == 1) == is_seen
    moved = 0 if is_seen else 1
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_allclose(ours, theirs + moved, rtol=1e-6)
    said = capsys.readouterr().out
    told = f"{training_attack or 0:.1%} under the attack of the training, {pgd:.1%} under PGD"
    assert (told in said) == is_seen


@pytest.mark.parametrize(
    "figures",
    [
        [(0.5, 0.4), (0.4, 0.1), (0.5, 0.1)],  # FGSM accuracy does not rise
        [(0.5, 0.4), (0.9, 0.2), (0.9, 0.21)],  # PGD accuracy falls, but to half
        [(0.1, 0.1), (0.3, 0.2), (0.5, 0.4)],
    ],
)
def test_a_bad_epoch_alone_is_no_catastrophe(figures, capsys):
    probe = scripted(figures)
    _, history, _ = fit_scripted(probe, epochs=3)
    assert len(history["loss"]) == 3 and probe.overfitted_in_epoch is None
    assert capsys.readouterr().out == ""


def test_a_resumed_run_remembers_its_best_epoch():
    history = [{"probe_fgsm": 0.5, "probe_pgd": 0.4}, {"probe_fgsm": 0.4, "probe_pgd": 0.3}]
    probe = scripted([(0.9, 0.1)], history)
    model, _, weights_before = fit_scripted(probe)
    assert probe.overfitted_in_epoch == 0
    for ours, theirs in zip(model.get_weights(), weights_before[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
