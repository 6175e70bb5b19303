"""The checks pass sound models and flag those that only hide their gradients."""

import json
from dataclasses import replace

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf

from activationsf import activation
from kaf_study import InputError, figures, sanity_checks
from kaf_study.attacks.registry import AttackSettings
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
