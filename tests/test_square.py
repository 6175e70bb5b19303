"""Square attack: the published schedule, each image its own squares, logits alone."""

import numpy as np
import pytest
import tensorflow as tf

from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.square import Square, square_side

SHAPE, N, EPSILON = (8, 8, 3), 20, 0.05
PIXELS = int(np.prod(SHAPE))


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).uniform(0.2, 0.8, (N, *SHAPE)).astype("float32")


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).normal(size=(PIXELS, 2)).astype("float32")


def classifier(weights):
    def model(x, training=False):
        return tf.reshape(x - 0.5, (-1, PIXELS)) @ weights

    return CompiledClassifier(model, 2, SHAPE)


def attack_all(attack, x, y, images=None, batch_size=8):
    images = np.arange(len(x)) if images is None else images
    return attack.run(x, y, images, 1, seed=0, batch_size=batch_size)


def test_sides_follow_the_published_schedule():
    # Section 5: p = 0.8, halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 of 10,000
    assert square_side(0, 10_000, 32, 32) == round((0.8 * 1024) ** 0.5)
    assert square_side(11, 10_000, 32, 32) == round((0.4 * 1024) ** 0.5)
    assert square_side(9_999, 10_000, 32, 32) == round((0.8 / 2**9 * 1024) ** 0.5)
    sides = [square_side(query, 1000, 32, 32) for query in range(1000)]
    assert sides == sorted(sides, reverse=True)
    assert square_side(0, 100, 1, 1) == 1


def test_points_differ_from_the_best_in_one_square_that_can_touch_every_edge(data, weights):
    attack = Square(classifier(weights), epsilon=EPSILON, steps=400)
    y = np.zeros(N, int)
    state = attack.begin(data, y, np.arange(N), 1, 0)
    np.testing.assert_allclose(np.abs(state["x_adv"] - data), EPSILON, atol=1e-6)
    assert (np.ptp(np.sign(state["x_adv"] - data), axis=1) == 0).all()  # vertical stripes
    touched = np.zeros(SHAPE[:2], bool)
    for query in range(300, 400):
        found = {"margin": np.zeros(N, "float32")}
        attack.propose(state, found, query)
        changed = (state["x_adv"] != state["best_x"]).any(axis=-1)
        side = square_side(query, 400, *SHAPE[:2])
        for image in changed:
            rows, columns = np.nonzero(image.any(axis=1))[0], np.nonzero(image.any(axis=0))[0]
            assert len(rows) == 0 or max(np.ptp(rows), np.ptp(columns)) < side
        touched |= changed.any(axis=0)
    assert touched.all()


def test_margin_of_the_best_point_only_falls(data, weights):
    model = classifier(weights)
    attack = Square(model, epsilon=0.001, steps=30)
    y = model.predict(data).argmax(axis=-1)
    state = attack.begin(data, y, np.arange(N), 1, 0)
    margins = []
    for query in range(30):
        _, found = attack.look(state)
        attack.propose(state, found, query)
        margins.append(state["best_margin"].copy())
    assert (np.diff(margins, axis=0) <= 0).all() and margins[-1].sum() < margins[0].sum()


def test_never_fells_what_cannot_fall_and_needs_no_gradient(data, weights):
    model = classifier(weights)
    logits = model.predict(data)
    y = logits.argmax(axis=-1)
    reach = EPSILON * np.abs(weights[:, 0] - weights[:, 1]).sum()
    worst = np.abs(logits[:, 0] - logits[:, 1]) - reach
    run = attack_all(Square(model, epsilon=EPSILON, steps=500), data, y)
    assert not run.fell[worst > 0].any()
    assert run.fell.sum() > 0.5 * (worst < 0).sum() > 0
    assert model.gradient_calls == 0
    assert np.abs(run.x_adv - data).max() <= EPSILON + 1e-6


def test_what_happens_to_an_image_does_not_depend_on_the_others(data, weights):
    model = classifier(weights)
    y = model.predict(data).argmax(axis=-1)
    attack = Square(model, epsilon=0.01, steps=60)
    together = attack_all(attack, data, y)
    some = np.array([3, 11, 17])
    alone = attack_all(attack, data[some], y[some], images=some, batch_size=2)
    np.testing.assert_array_equal(alone.x_adv, together.x_adv[some])
    np.testing.assert_array_equal(alone.iterations, together.iterations[some])
