"""Fast adversarial training does the paper's step, and its probe sees what it should."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import types

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import fbfadvtrain
from fbfadvtrain import FastBetterFreeTrainedModel, RobustnessProbe, fgsm_random_start

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
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_is_the_ordinary_one_on_the_perturbed_batch(weighted):
    x, y = images(6), labels(6, classes=3)
    weight = np.linspace(0.2, 3, 6).astype("float32") if weighted else np.ones(6, "float32")
    model = small_conv()
    twin = keras.models.clone_model(model.inference_model())
    twin.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    reported = model.train_on_batch(x, y, sample_weight=weight if weighted else None)

    def cross_entropy(images):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(y, twin(images, training=True))

    seed_generator = keras.random.SeedGenerator(5)
    start = tf.clip_by_value(
        x + keras.random.uniform(x.shape, -EPS, EPS, seed=seed_generator), 0.0, 1.0
    )
    with tf.GradientTape() as tape:
        tape.watch(start)
        loss = tf.reduce_mean(cross_entropy(start))
    x_adv = start + ALPHA * tf.sign(tape.gradient(loss, start))
    x_adv = tf.clip_by_value(tf.clip_by_value(x_adv, x - EPS, x + EPS), 0.0, 1.0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(weight * cross_entropy(x_adv))
        objective = loss + tf.add_n(twin.losses)
    for variable, gradient in zip(
        twin.trainable_variables, tape.gradient(objective, twin.trainable_variables), strict=True
    ):
        variable.assign_sub(0.1 * gradient)

    # The adversarial loss alone, without the regulariser.
    assert reported == pytest.approx(float(loss), rel=1e-4)
    assert float(tf.add_n(twin.losses)) > 0.01
    # Moving statistics are among the weights: both passes of a step have updated them.
    for ours, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


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


@pytest.mark.parametrize("arguments", [{"eps": -0.1}, {"alpha": -0.1}])
def test_negative_radius_or_step_is_refused(arguments):
    with pytest.raises(ValueError, match="must not be negative"):
        linear(**arguments)


# --- other processes


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


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
    with pytest.raises(ValueError, match=r"received \(40, 2\)"):
        RobustnessProbe(x, np.eye(2)[y])


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
        left = worst_margins(model, x, y) if alpha else margins(model, probe.start, y)
        assert probe.measure()[1] == pytest.approx(np.mean(left > 0))


@pytest.mark.parametrize(
    ("training_attack", "pgd", "n", "is_seen"),
    [
        (0.34, 0.12, 512, True),
        (0.34, 0.15, 512, False),  # less than half, but within two standard errors of it
        (0.34, 0.12, 16, False),
        (0.32, 0.28, 180, False),  # ReLU on digits, third epoch; training accuracy 53 %
        (None, 0.01, 512, False),  # ordinary training: no attack to be overfitted
    ],
)
def test_catastrophic_overfitting_from_the_start_is_seen_by_the_attack_of_the_training(
    training_attack, pgd, n, is_seen, capsys
):
    probe = RobustnessProbe(images(n), labels(n), history=[{"probe_fgsm": 0.22, "probe_pgd": 0.11}])
    row = {"probe_clean": 0.33, "probe_fgsm": 0.18, "probe_pgd": pgd}
    probe.measure = lambda: (row, training_attack)
    model = small_conv()
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
    assert ("34.0% under the attack of the training, 12.0% under PGD" in said) == is_seen


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
