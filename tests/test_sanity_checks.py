"""The checks pass sound models and flag those that only hide their gradients."""

import json
from dataclasses import replace

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf

from activationsf import activation
from kaf_study import InputError, evaluation, figures, fused_layers, sanity_checks
from kaf_study.attacks.registry import ATTACKS, AttackSettings
from kaf_study.sanity_checks import CHECKED, NOT_RUN, RADII, check_model

matplotlib.use("Agg")
SHAPE, CLASSES, N = (8, 8, 3), 5, 40
FEW = 16  # an eighth of the batch size: one shape to compile
QUICK = {"settings": replace(CHECKED, steps=20), "queries": 200}


@pytest.fixture(scope="module")
def data():
    """Classes around centres, far enough apart to learn, near enough to be attacked at 8/255."""
    generator = np.random.default_rng(0)
    y = np.arange(300) % CLASSES
    centres = generator.uniform(0.35, 0.65, (CLASSES, *SHAPE))
    x = np.clip(centres[y] + generator.normal(0, 0.15, (300, *SHAPE)), 0, 1)
    return x.astype("float32"), y


def trained(data, name):
    """A small network; k-WTA as the paper has it, in place of every ReLU, needs wide layers."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(32, 3),
            activation(name),
            layers.Conv2D(32, 3),
            activation(name),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.003), loss)
    model.fit(*data, epochs=4, verbose=0)
    return model


@pytest.fixture(scope="module")
def relu(data):
    return trained(data, "relu")


def check(model, data, n=N, **kwargs):
    x, y = data
    return check_model(model, x[:n], y[:n], **QUICK, **kwargs)


def statuses(report):
    return {check.name: check.status for check in report.checks}


@pytest.fixture(scope="module")
def relu_report(relu, data):
    return check(relu, data)


def test_relu_passes_every_check(relu_report):
    assert relu_report.passed, relu_report.lines()
    assert [name for name, s in statuses(relu_report).items() if s == NOT_RUN] == ["beats transfer"]
    later = {"no optimisation at test time", "rapid beats Square 200", "rapid beats FAB 20"}
    assert later < set(statuses(relu_report))
    assert relu_report.lines()[-1] == "=> no sign of masked gradients"
    accuracy = relu_report.curve["accuracy"]
    assert relu_report.curve["eps"] == list(RADII)
    assert accuracy[0] > 0.8 and accuracy[-1] < 0.2  # the attack had something to do


def test_kaf_passes_also_against_what_was_found_on_relu(relu, data):
    report = check(trained(data, "kaf"), data, FEW, transfer_from=[("relu", relu)])
    assert report.passed, report.lines()
    assert set(statuses(report).values()) == {"pass"}
    assert "beats transfer from relu" in statuses(report)


def test_kwta_is_flagged(data):
    report = check(trained(data, "kwta"), data, FEW)
    assert "local linearity" in report.failed, report.lines()


def test_model_with_noise_is_flagged(relu, data):
    def randomised(x, training=False):
        return relu(x + tf.random.normal(tf.shape(x), stddev=0.2), training=False)

    report = check(randomised, data)
    assert "same figure twice" in report.failed, report.lines()


def with_a_tape(relu):
    def purified(x, training=False):
        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            energy = tf.reduce_sum(tf.square(relu(x, training=False)), axis=-1)
        return relu(x - 0.01 * tape.gradient(energy, x), training=False)

    return purified


def with_tf_gradients_in_a_loop(relu):
    def purified(x, training=False):
        def step(i, x):
            energy = tf.reduce_sum(tf.square(relu(x, training=False)), axis=-1)
            return i + 1, x - 0.01 * tf.gradients(energy, x)[0]

        return relu(tf.while_loop(lambda i, x: i < 2, step, (0, x))[1], training=False)

    return tf.function(purified, autograph=False)


@pytest.mark.parametrize("purifier", [with_a_tape, with_tf_gradients_in_a_loop])
def test_optimisation_at_test_time_is_flagged_in_code_and_in_a_saved_graph(
    relu, data, purifier, tmp_path
):
    count = sanity_checks.gradients_in_forward_pass
    purified = purifier(relu)
    assert count(purified, SHAPE) > 0
    assert count(relu, SHAPE) == count(keras.Sequential([activation("kaf_on_relu")]), SHAPE) == 0
    module = tf.Module()
    module.relu = relu  # whose variables it keeps
    signature = [tf.TensorSpec((None, *SHAPE), tf.float32)]
    module.serve = tf.function(lambda x: purified(x), input_signature=signature)
    tf.saved_model.save(module, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert count(lambda x, training: loaded.serve(x), SHAPE) > 0


def test_optimisation_at_test_time_is_a_check_of_the_report(relu, data):
    runs = sanity_checks._Runs(
        with_a_tape(relu), data[0][:8], data[1][:8], CHECKED, sanity_checks.Execution(8), 5, (), 5
    )
    assert sanity_checks.nothing_is_optimised(runs).status == "fail"


def test_the_checks_are_of_what_the_evaluation_attacks(data, monkeypatch):
    """The twin with folded batch normalisation, made once."""
    layers, twins = keras.layers, []
    model = keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )

    def noted(model, some):
        twins.append(fused_layers.inference_twin(model, some))
        return twins[-1]

    monkeypatch.setattr(evaluation, "inference_twin", noted)
    x, y = data[0][:8], data[1][:8]
    runs = sanity_checks._Runs(
        model, x, y, CHECKED, sanity_checks.Execution(8), CLASSES, (), queries=5
    )
    assert sanity_checks.outputs_are_logits(runs).status == "pass"
    runs.under("fgsm")
    assert [runs.classifier.model] == twins and runs.classifier.given is model is not twins[0]


def test_a_label_without_a_class_is_refused_wherever_it_stands(relu, data):
    x, y = data[0][:FEW], data[1][:FEW].copy()
    y[-1] = CLASSES
    with pytest.raises(InputError, match="a label 5, the model's classes are 0 to 4"):
        check_model(relu, x, y, classes=CLASSES, **QUICK)


def test_rapid_that_misses_what_square_fells_is_flagged():
    runs = sanity_checks._Runs(None, np.zeros((100, 1)), None, CHECKED, None, None, (), 5)
    runs.pgd, runs.rapid = np.zeros(100, bool), np.arange(100) < 40
    square = np.arange(100) < 38
    assert sanity_checks.as_strong_as(runs, "Square", square, than="rapid").status == "pass"
    square[37] = False
    missed = sanity_checks.as_strong_as(runs, "Square", square, than="rapid")
    assert (missed.status, missed.name) == ("fail", "rapid beats Square")
    assert "rapid 40.0%, Square 37.0%; 3 fell to Square alone" in missed.text
    assert sanity_checks.as_strong_as(runs, "Square", square).status == "pass"  # of PGD


def test_saturated_softmax_is_flagged(relu, data):
    """Its probabilities are exactly 0 and 1 in float32: PGD finds no gradient, Square does."""

    def saturated(x, training=False):
        z = 1e4 * relu(x, training=False)  # spelled out: a softmax would be found, and taken off
        e = tf.exp(z - tf.reduce_max(z, axis=-1, keepdims=True))
        return e / tf.reduce_sum(e, axis=-1, keepdims=True)

    report = check(saturated, data)
    assert {"outputs", "input gradients", "eps 128"} <= set(report.failed), report.lines()


def test_saturated_logits_are_flagged(relu, data):
    def saturated(x, training=False):
        return 1e5 * relu(x, training=False)

    report = check(saturated, data)
    assert {"input gradients", "eps 128"} <= set(report.failed), report.lines()
    assert statuses(report)["outputs"] == "pass"


def test_shattered_gradients_are_flagged(relu, data):
    """Pixels in 8 levels, with a gradient that has nothing to do with it."""

    def shattered(x, training=False):
        levels = tf.round(8 * x) / 8
        wrong = 1e-3 * tf.sin(1e3 * x)
        return relu(tf.stop_gradient(levels - wrong) + wrong, training=False)

    report = check(shattered, data)
    assert {"local linearity"} < set(report.failed), report.lines()
    assert any(name.startswith("beats") for name in report.failed), report.lines()


def test_linear_model_passes_at_its_known_accuracy(data):
    x, _ = data
    generator = np.random.default_rng(3)
    w = generator.normal(size=(int(np.prod(SHAPE)), 2)).astype("float32")

    def model(images, training=False):
        return tf.reshape(images - 0.5, (-1, w.shape[0])) @ w

    reach = np.abs(w[:, 0] - w[:, 1]).sum()
    # Pixels that can move by 32/255 either way, so that the closed form is exact.
    inside = np.clip(x[:N], 32 / 255, 223 / 255)
    logits = model(inside).numpy()
    label, margin = logits.argmax(axis=-1), np.abs(logits[:, 0] - logits[:, 1])
    report = check_model(model, inside, label, **QUICK)
    assert report.passed, report.lines()
    known = [(margin > r / 255 * reach).mean() for r in RADII]
    np.testing.assert_allclose(report.curve["accuracy"], known, atol=1e-9)


def test_report_goes_into_json_and_a_figure(relu_report):
    kept = json.loads(json.dumps(relu_report.as_dict()))
    assert kept["passed"] is True and len(kept["checks"]) == len(relu_report.checks)
    ax = figures.robustness_curve({"ReLU": relu_report.curve})
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array(relu_report.curve["accuracy"]))
    assert "255ths" in ax.get_xlabel() and "%" in ax.get_ylabel()
    matplotlib.pyplot.close("all")


def test_no_batch_is_larger_than_allowed(relu, data, monkeypatch):
    sizes = []
    monkeypatch.setattr(sanity_checks, "ITERATIONS", (1, 2))
    monkeypatch.setattr(sanity_checks, "NOISE_DRAWS", 2)
    monkeypatch.setattr(sanity_checks, "FAB_STEPS", 1)
    short = (("pgd", {"steps": 2, "restarts": 1}), ("margin-t", {"steps": 1, "restarts": 1}))
    monkeypatch.setitem(ATTACKS, "rapid", replace(ATTACKS["rapid"], members=short))

    def watched(x, training=False):
        if x.shape[0] is not None:
            sizes.append(int(x.shape[0]))
        return relu(x, training=training)

    tf.config.run_functions_eagerly(True)
    try:
        x, y = data[0][:12], data[1][:12]
        check_model(watched, x, y, replace(CHECKED, steps=3, restarts=1), queries=3, batch_size=9)
    finally:
        tf.config.run_functions_eagerly(False)
    assert max(sizes) == 9


def test_nothing_right_is_nothing_to_check(relu, data):
    x, _ = data
    wrong = (np.argmax(relu.predict(x[:5], verbose=0), axis=-1) + 1) % CLASSES
    with pytest.raises(InputError, match="none of the 5 images is classified correctly"):
        check_model(relu, x[:5], wrong)


@pytest.mark.parametrize("settings", [{"attack": "suite"}, {"labels": "predicted"}])
def test_other_attacks_than_pgd_are_refused(relu, data, settings):
    with pytest.raises(InputError, match="the checks are of pgd with true labels, got"):
        check_model(relu, *data, AttackSettings(**settings))
