"""Square attack: the authors' schedule, each image its own squares, logits alone."""

import numpy as np
import pytest
import tensorflow as tf
from toys import attack_all

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


def test_sides_follow_the_schedule_of_the_authors_code():
    # `p_selection`: p = 0.8 (AutoAttack's p_init), halved after 10, 50, 200, 500, 1000, 2000, 4000,
    # 6000, 8000 of 10,000, query 10 still with the first p. The sides are round(sqrt(p * 32 * 32)).
    sides = [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    lasting = np.diff([-1, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 9999])
    expected = list(np.repeat(sides, lasting))
    assert [square_side(query, 10_000, 32, 32) for query in range(10_000)] == expected
    # Fewer queries go through the whole schedule faster.
    assert [square_side(query, 1000, 32, 32) for query in range(1000)] == expected[::10]


def test_sides_fit_the_image():
    assert square_side(0, 100, 1, 1) == square_side(99, 100, 8, 8) == 1
    assert square_side(0, 100, 2, 40) == 2
    assert square_side(0, 100, 10, 20) == 10  # not round(sqrt(0.8 * 200)) = 13


def test_begins_with_vertical_stripes(data, weights):
    attack = Square(classifier(weights), epsilon=EPSILON, steps=1)
    stripes = attack.begin(data, np.zeros(N, int), np.arange(N), 1, 0)["x_adv"] - data
    np.testing.assert_allclose(np.abs(stripes), EPSILON, atol=1e-6)
    signs = np.sign(stripes)
    assert (np.ptp(signs, axis=1) == 0).all()
    # Every image, column and channel has a draw of its own.
    for axis in (0, 2, 3):
        assert (np.ptp(signs, axis=axis) > 0).any()
    assert abs(signs[:, 0].mean()) < 0.2


def test_points_differ_from_the_best_in_one_square_of_one_sign_a_channel(data, weights):
    """The best stays the clean image, so that the whole square shows; it can touch every edge."""
    steps = 1000
    attack = Square(classifier(weights), epsilon=EPSILON / 2, steps=steps)
    y = np.zeros(N, int)
    state = attack.begin(data, y, np.arange(N), 1, 0)
    state["best_margin"][:] = -1.0
    touched, signs = np.zeros(SHAPE[:2], int), []
    for query in range(45, 56):  # sides of 3 and then of 2
        attack.propose(state, {"margin": np.zeros(N, "float32")}, query)
        delta = state["x_adv"] - data
        side = square_side(query, steps, *SHAPE[:2])
        for changed in delta:
            rows, columns, _ = np.nonzero(changed)
            assert len(rows) == side**2 * SHAPE[2]
            assert np.ptp(rows) == np.ptp(columns) == side - 1
            square = changed[rows.min() :, columns.min() :][:side, :side]
            # The change is 2 epsilon, cut to the ball.
            np.testing.assert_allclose(np.abs(square), EPSILON / 2, atol=1e-6)
            assert (np.ptp(np.sign(square), axis=(0, 1)) == 0).all()
            signs.append(np.sign(square[0, 0]))
        touched += (delta != 0).any(axis=-1).sum(axis=0)
    assert touched.min() > 0
    assert np.abs(np.mean(signs, axis=0)).max() < 0.2


def test_a_square_turns_the_best_over_where_the_signs_differ(data, weights):
    """From -epsilon to +epsilon: a change of 2 epsilon inside the ball, and nothing elsewhere."""
    attack = Square(classifier(weights), epsilon=EPSILON, steps=50)
    state = attack.begin(data, np.zeros(N, int), np.arange(N), 1, 0)
    state["x_adv"] = data - np.float32(EPSILON)
    attack.propose(state, {"margin": np.zeros(N, "float32")}, 20)
    np.testing.assert_array_equal(state["best_x"], data - np.float32(EPSILON))
    np.testing.assert_allclose(np.abs(state["x_adv"] - data), EPSILON, atol=1e-6)
    risen = (state["x_adv"] > data).sum(axis=(1, 2))
    assert set(risen.ravel()) == {0, square_side(20, 50, *SHAPE[:2]) ** 2}


def test_the_better_of_two_points_is_kept(data, weights):
    attack = Square(classifier(weights), epsilon=EPSILON, steps=50)
    state = attack.begin(data, np.zeros(N, int), np.arange(N), 1, 0)
    first = state["x_adv"]
    attack.propose(state, {"margin": np.ones(N, "float32")}, 0)
    second = state["x_adv"]
    # The second is better for even images, equal or worse for odd ones.
    margin = np.where(np.arange(N) % 2 == 0, 0.5, np.where(np.arange(N) % 4 == 1, 1.0, 1.5))
    attack.propose(state, {"margin": margin.astype("float32")}, 1)
    np.testing.assert_array_equal(state["best_x"][::2], second[::2])
    np.testing.assert_array_equal(state["best_x"][1::2], first[1::2])
    np.testing.assert_array_equal(state["best_margin"], np.minimum(margin, 1))


def test_margin_is_the_label_against_the_best_other():
    def model(x, training=False):
        return tf.reshape(x, (-1, 4))

    logits = np.array([[1, 5, 3, 4], [1, 5, 3, 4], [7, -1, 2, 2]], "float32")
    state = {"x_adv": logits.reshape(3, 1, 1, 4), "y": np.array([1, 2, 1])}
    attack = Square(CompiledClassifier(model, 4, (1, 1, 4)), epsilon=0.1, steps=1)
    seen, found = attack.look(state)
    np.testing.assert_array_equal(seen, logits)
    np.testing.assert_array_equal(found["margin"], [5 - 4, 3 - 5, -1 - 7])


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
