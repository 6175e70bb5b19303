"""Auto-PGD: its losses are ART's, its iterates those of a plain reading of Algorithm 1."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import toys
from art.attacks.evasion import AutoProjectedGradientDescent
from art.estimators.classification import TensorFlowV2Classifier
from toys import attack_all

from kaf_study.attacks.apgd import APGD, LOSSES, checkpoints
from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.loop import random_start

SHAPE, CLASSES, N, EPSILON = (6, 6, 3), 5, 12, 0.05


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).uniform(0, 1, (N, *SHAPE)).astype("float32")
    return x, np.arange(N) % CLASSES


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Conv2D(8, 3, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES),
        ]
    )
    return CompiledClassifier(model, CLASSES, SHAPE)


linear = functools.partial(toys.linear, SHAPE)


def test_checkpoints_are_those_of_the_paper():
    # p_j of section 3.2: 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(50) == [0, 11, 21, 29, 35, 40, 44, 47, 50]


def test_difference_of_logits_ratio_is_arts(classifier, data):
    x, y = data
    estimator = TensorFlowV2Classifier(
        model=classifier.model,
        nb_classes=CLASSES,
        input_shape=SHAPE,
        loss_object=keras.losses.CategoricalCrossentropy(from_logits=True),
        clip_values=(0, 1),
    )
    art = AutoProjectedGradientDescent(
        estimator, eps=0.1, eps_step=0.1, loss_type="difference_logits_ratio", verbose=False
    )
    art_loss = art.estimator.loss_object
    art_loss.reduction = "none"
    logits = classifier.predict(x)
    expected = art_loss(np.eye(CLASSES)[y], tf.constant(logits))
    ours = LOSSES["dlr"](tf.constant(logits), tf.constant(y), None)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert ((ours.numpy() > 0) == (logits.argmax(axis=-1) != y)).all()


@pytest.mark.parametrize("name", ["dlr", "targeted dlr"])
def test_ratios_do_not_change_when_logits_are_scaled(name, data):
    logits = np.random.default_rng(1).normal(size=(N, CLASSES)).astype("float32")
    y, target = tf.constant(data[1]), tf.constant((data[1] + 1) % CLASSES)
    loss = LOSSES[name]
    once, thousandfold = (loss(tf.constant(s * logits), y, target) for s in (1, 1000))
    np.testing.assert_allclose(once, thousandfold, rtol=1e-4)


def test_targeted_ratio_is_equation_7():
    logits = np.array([[5.0, 1.0, 3.0, -2.0, 0.0]], "float32")
    # z_y = 3, z_t = -2; first 5, third 1, fourth 0
    loss = LOSSES["targeted dlr"](tf.constant(logits), tf.constant([2]), tf.constant([3]))
    np.testing.assert_allclose(loss, -(3 + 2) / (5 - (1 + 0) / 2), rtol=1e-6)


def plain_algorithm_1(f, gradient, x, start, epsilon, steps, rho=0.75, alpha=0.75):
    """Croce & Hein 2020, Algorithm 1, for one image, line by line.

    As in its authors' code, the checkpoint w_j comes when x^(w_j) has been looked at, and an
    iterate that is given up for x_max keeps its own f in the count of Condition 1.

    Returns:
        The points looked at, x^(0) to x^(steps); and the checkpoints at which x_max was gone back
        to from another point.
    """

    def project(z):
        return np.clip(np.clip(z, x - epsilon, x + epsilon), 0, 1)

    w, eta = checkpoints(steps), 2 * epsilon
    xs, fs = [start], [f(start)]
    looked_at, returns = [start], []
    x_max, f_max = start, fs[0]
    eta_at, f_max_at = {0: eta}, {0: f_max}  # by checkpoint
    for k in range(steps):
        if k > 0 and k in w:
            last = w[w.index(k) - 1]
            is_slow = sum(fs[i + 1] > fs[i] for i in range(last, k)) < rho * (k - last)
            earlier = w[max(w.index(last) - 1, 0)]
            is_stuck = eta_at[earlier] == eta_at[last] and f_max_at[last] == f_max
            if is_slow or is_stuck:
                eta = eta / 2
                if not np.array_equal(xs[k], x_max):
                    returns.append(k)
                xs[k] = x_max
            eta_at[k], f_max_at[k] = eta, f_max
        z = project(xs[k] + eta * np.sign(gradient(xs[k])))
        if k == 0:
            xs.append(z)
        else:
            xs.append(project(xs[k] + alpha * (z - xs[k]) + (1 - alpha) * (xs[k] - xs[k - 1])))
        looked_at.append(xs[-1])
        fs.append(f(xs[-1]))
        if fs[-1] > f_max:
            x_max, f_max = xs[-1], fs[-1]
    return looked_at, returns


def peaked():
    """Classifier whose loss for label 0 has one top, near the middle of the pixels' range.

    Steps of one size jump over it, so that the step is halved with x_max behind. Label 0 is
    predicted everywhere (nothing falls, no ratio is flat), and all is done pixel by pixel (the same
    bits in every batch).
    """
    generator = np.random.default_rng(5)
    top, weight = generator.uniform((0.45, 0.1), (0.55, 1), (*SHAPE, 2)).astype("float32").T
    top, weight = top.T, weight.T

    def model(x, training=False):
        away = tf.square(x - top)
        bent = away * weight + 0.5 * away * tf.roll(away, 1, axis=2)
        score = -1 - tf.reduce_sum(bent, axis=(1, 2, 3))
        return tf.stack([0 * score, score, 0 * score - 50, 0 * score - 60], axis=-1)

    return CompiledClassifier(model, 4, SHAPE)


@pytest.mark.parametrize("name", ["ce", "dlr"])
def test_iterates_are_those_of_a_plain_reading(name, monkeypatch):
    n, steps, epsilon = 6, 40, 0.1
    classifier = peaked()
    x = np.random.default_rng(6).uniform(0.4, 0.6, (n, *SHAPE)).astype("float32")
    y = np.zeros(n, int)
    compiled = classifier.differentiable(LOSSES[name])
    attack = APGD(classifier, name, epsilon=epsilon, steps=steps)
    seen, look = [], attack.look

    def spy(state):
        seen.append(state["x_adv"].copy())
        return look(state)

    monkeypatch.setattr(attack, "look", spy)
    assert not attack.run(x, y, np.arange(n), 1, seed=0, batch_size=n).fell.any()
    all_returns = []
    for i in range(n):
        xs, returns = plain_algorithm_1(
            lambda z: compiled(z[None], y[:1], y[:1])[0][0],
            lambda z: compiled(z[None], y[:1], y[:1])[2][0],
            x[i],
            random_start(x[i], epsilon=epsilon, seed=0, image=i, restart=1),
            epsilon,
            steps,
        )
        for k, iterate in enumerate(xs):
            np.testing.assert_allclose(seen[k][i], iterate, atol=2e-6, err_msg=f"{i}, {k}")
        all_returns += returns
    # The case that separates x^(k-1) from x_max in the momentum, and some that do not halve.
    assert 0 < len(all_returns) < n * (len(set(checkpoints(steps))) - 2)


def losses_with_rises(rises, first):
    """(101,) losses: `first`, a fall, then in the windows of 100 steps as many rises as given.

    Each rise is 1 and each fall (after the first) is small, so that later losses are the higher.
    """
    w, loss = [*checkpoints(100), 100], [first]
    for window, (begin, end) in enumerate(itertools.pairwise(w)):
        length = end - begin
        up = np.arange(length) >= length - rises[window]
        loss += list(loss[-1] + np.cumsum(np.where(up, 1.0, -0.01)))
    return np.array(loss, "float32")


def test_the_step_is_halved_by_the_two_conditions():
    """Condition 1: fewer than 3/4 of the steps rose. Condition 2: no new best since the last
    checkpoint, which did not halve. Windows of 22, 19, 16, 13, 10, 7, 6, 6 and 1 steps.
    """
    all_rise = (22, 19, 16, 13, 10, 7, 6, 6, 1)
    just_enough = (17, 15, 12, 10, 8, 6, 5, 5, 1)
    one_short = (16, 14, 11, 9, 7, 5, 4, 4, 1)
    scripts = [losses_with_rises(rises, 0.0) for rises in (all_rise, just_enough, one_short)]
    never_better = losses_with_rises(all_rise, 0.0)
    never_better[0] = 1000.0
    better_once = never_better.copy()
    better_once[45] = 2000.0  # in the window from 41 to 57
    scripts = np.stack([*scripts, never_better, better_once])
    n = len(scripts)
    attack = APGD(linear(np.ones((int(np.prod(SHAPE)), 2))), "ce", epsilon=0.1, steps=100)
    x = np.full((n, *SHAPE), 0.5, "float32")
    state = attack.begin(x, np.zeros(n, int), np.arange(n), 1, 0)
    steps = []
    for k in range(100):
        attack.propose(state, {"loss": scripts[:, k], "gradient": np.ones_like(x)}, k)
        steps.append(state["step"])
    halved = np.diff(np.log2(np.array(steps) / 0.2), axis=0) == -1
    assert [list(np.flatnonzero(rows) + 1) for rows in halved.T] == [
        [],
        [],
        [22, 41, 57, 70, 80, 87, 93, 99],
        [22, 57, 80, 93],  # every second one: what has just been halved is given time
        [22, 70, 87, 99],
    ]


@pytest.mark.parametrize("name", ["ce", "dlr"])
def test_linear_model_falls_exactly_where_it_must(name):
    generator = np.random.default_rng(1)
    pixels = int(np.prod(SHAPE))
    w = generator.normal(size=pixels)
    x = generator.uniform(0.2, 0.8, (80, *SHAPE)).astype("float32")
    score = x.reshape(80, -1) @ w
    bias = -np.median(score)
    y = (score + bias > 0).astype(int)
    margin = np.abs(score + bias)
    epsilon = float(np.median(margin) / np.abs(w).sum())
    # A third class that is never likely: the ratio needs three logits.
    weights = np.stack([-w / 2, w / 2, np.zeros(pixels)], axis=1)
    classifier = linear(weights, np.array([-bias / 2, bias / 2, -1e3], "float32"))
    run = attack_all(APGD(classifier, name, epsilon=epsilon, steps=12), x, y)
    worst = margin - epsilon * np.abs(w).sum()
    assert np.abs(worst).min() > 1e-5
    np.testing.assert_array_equal(run.fell, worst < 0)


def test_targeted_restarts_aim_at_the_other_classes_in_turn(data):
    """Only the likeliest class has a gradient to follow in restart 1, the next in restart 2, ..."""
    x, _ = data
    pixels = int(np.prod(SHAPE))
    weights = np.zeros((pixels, CLASSES))
    weights[:, 3] = 1.0  # only class 3 rises with the pixels
    bias = np.array([0.0, -1.0, -2.0, -3.0, -4.0], "float32")
    bias[3] -= x.reshape(N, -1).sum(axis=1).max()
    bias[3] += 0.5
    mean = np.full((1, *SHAPE), x.mean(), "float32")
    classifier = linear(weights, bias)
    logits = classifier.predict(mean)[0]
    assert logits.argmax() == 0
    rank = int((np.sort(logits)[::-1] == logits[3]).argmax())  # 1: likeliest other class
    attack = APGD(classifier, "targeted dlr", epsilon=1.0, steps=5)
    y = np.array([0])
    for restart in range(1, CLASSES):
        target = attack.begin(mean, y, y, restart, 0)["target"]
        assert (target == 3) == (restart == rank)
    assert attack_all(attack, mean, y, restart=rank).fell.all()


def test_saturated_cross_entropy_hides_what_the_ratio_finds():
    """Logits of 1e4 leave the softmax no gradient in float32; the ratio does not mind."""
    generator = np.random.default_rng(2)
    weights = generator.normal(size=(int(np.prod(SHAPE)), CLASSES)) * 1e4
    classifier = linear(weights)
    x = generator.uniform(0.3, 0.7, (20, *SHAPE)).astype("float32")
    y = classifier.predict(x).argmax(axis=-1)
    by_entropy, by_ratio = (
        attack_all(APGD(classifier, name, epsilon=0.1, steps=10), x, y).fell.mean()
        for name in ("ce", "dlr")
    )
    assert by_ratio == 1 > by_entropy


@pytest.mark.parametrize("name", list(LOSSES))
def test_stays_in_the_ball_whatever_the_batch_size(classifier, data, name):
    x, _ = data
    y = classifier.predict(x).argmax(axis=-1)
    attack = APGD(classifier, name, epsilon=EPSILON, steps=10)
    runs = [attack_all(attack, x, y, batch_size=size) for size in (12, 5, 1)]
    for run in runs:
        assert np.abs(run.x_adv - x).max() <= EPSILON + 1e-6
        assert run.x_adv.min() >= 0 and run.x_adv.max() <= 1
        np.testing.assert_array_equal(run.fell, runs[0].fell)
        np.testing.assert_allclose(run.x_adv, runs[0].x_adv, atol=1e-6)
    assert 0 < runs[0].fell.sum()


def test_restarts_begin_elsewhere(classifier, data):
    x, y = data
    attack = APGD(classifier, "ce", epsilon=EPSILON, steps=3)
    first, second, again = (
        attack.begin(x, y, np.arange(N), restart, 0)["x_adv"] for restart in (1, 2, 1)
    )
    assert np.abs(first - second).max() > EPSILON
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", ["dlr", "targeted dlr"])
def test_equal_logits_give_a_finite_ratio(name):
    classifier = linear(np.zeros((int(np.prod(SHAPE)), CLASSES)))
    x = np.full((1, *SHAPE), 0.5, "float32")
    loss, _, gradient = classifier.differentiable(LOSSES[name])(x, [1], [2])
    assert loss[0] == 0 and np.isfinite(gradient).all()
