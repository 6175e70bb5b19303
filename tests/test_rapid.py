"""rapid: a long look where the short one came near, nowhere else; AutoAttack is what it says."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import toys

from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.rapid import NEAR, SHORT, TwoLooks
from kaf_study.attacks.registry import AttackSettings
from kaf_study.evaluation import evaluate

SHAPE, CLASSES, N, EPSILON, LONG = (4, 4, 3), 4, 24, 0.03, 7
PIXELS = int(np.prod(SHAPE))


linear = functools.partial(toys.linear, SHAPE)
attack_all = functools.partial(toys.attack_all, batch_size=N)


@pytest.fixture(scope="module")
def problem():
    """A linear classifier, images away from 0 and 1, labels, and by how much they stand or fall."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(PIXELS, CLASSES))
    x = generator.uniform(0.2, 0.8, (N, *SHAPE)).astype("float32")
    classifier = linear(weights)
    logits = classifier.predict(x)
    y = logits.argmax(axis=-1)
    reach = EPSILON * np.abs(weights[:, y].T[:, :, None] - weights[None]).sum(axis=1)
    left = logits[np.arange(N), y][:, None] - logits - reach
    left[np.arange(N), y] = np.inf
    return classifier, x, y, left.min(axis=1)


def state_after(attack, x, losses):
    """Propose on scripted losses (points, images); the state and what the last call answered."""
    n = len(x)
    state = attack.begin(x, np.zeros(n, int), np.arange(n), 1, 0)
    points = []
    for k, loss in enumerate(losses):
        points.append(state["x_adv"])
        found = {"loss": np.float32(loss), "gradient": np.ones_like(x)}
        answer = attack.propose(state, found, k)
    return state, answer, points


def test_the_long_look_is_for_images_that_came_near():
    """Near: what is left of the margin is at most NEAR of what has been taken away."""
    attack = TwoLooks(linear(np.ones((PIXELS, CLASSES))), epsilon=EPSILON, steps=LONG)
    x = np.full((4, *SHAPE), 0.5, "float32")
    losses = np.tile(-np.array([2.0, 2.0, 2.0, 2.0]), (SHORT, 1))
    # 1 taken away at some point, 1 left; just near; just not; nothing gained at all
    losses[5] = [-1.0, -2 * NEAR / (1 + NEAR) + 1e-4, -2 * NEAR / (1 + NEAR) - 1e-4, -2.0]
    _, left_out, _ = state_after(attack, x, losses)
    rest = attack.steps - SHORT  # the next point is the last one
    np.testing.assert_array_equal(left_out, [rest, 0, rest, rest])
    for k in range(1, SHORT):
        assert state_after(attack, x, losses[:k])[1] is None


def test_what_was_taken_away_is_counted_from_the_first_point():
    attack = TwoLooks(linear(np.ones((PIXELS, CLASSES))), epsilon=EPSILON, steps=LONG)
    losses = np.full((SHORT, 2), -0.15)
    losses[0] = [-2.0, -0.2]  # 1.85 and 0.05 taken away, 0.15 left of either
    _, left_out, _ = state_after(attack, np.full((2, *SHAPE), 0.5, "float32"), losses)
    np.testing.assert_array_equal(left_out, [0, attack.steps - SHORT])


@pytest.mark.parametrize("best", [0, 3, SHORT - 1, SHORT])
def test_the_long_look_begins_afresh_at_the_best_point(best):
    attack = TwoLooks(linear(np.ones((PIXELS, CLASSES))), epsilon=EPSILON, steps=LONG)
    x = np.full((2, *SHAPE), 0.5, "float32")
    losses = -np.linspace(1, 2, SHORT + 1)[:, None] * [1, 1]
    losses[best] = -0.5
    state, _, points = state_after(attack, x, losses)
    np.testing.assert_array_equal(state["x_adv"], points[best])
    np.testing.assert_allclose(state["step"], 2 * EPSILON, rtol=1e-6)
    # The next step is the first of Auto-PGD: all of it, without momentum.
    attack.propose(state, {"loss": np.zeros(2), "gradient": np.ones_like(x)}, SHORT + 1)
    np.testing.assert_allclose(state["x_adv"], x + EPSILON, atol=1e-6)


def test_as_many_gradients_as_looks(problem):
    classifier, x, y, left = problem
    attack = TwoLooks(classifier, epsilon=0.001, steps=LONG)
    for image in np.flatnonzero(left > 0)[:4]:
        one = slice(image, image + 1)
        before = classifier.gradient_calls
        assert not attack_all(attack, x[one], y[one], batch_size=1).fell.any()
        assert classifier.gradient_calls - before == SHORT + 1  # points 0 to SHORT


def test_a_long_look_takes_its_steps(problem):
    """A radius at which one image stands by a twentieth of what is taken away: near, in vain."""
    classifier, x, y, left = problem
    image = np.flatnonzero(left > 0)[:1]
    logits = classifier.predict(x[image])
    other = np.argsort(logits[0])[-2]
    loss_gradient = classifier.class_gradients(x[image], np.array([[other, y[image][0]]]))[0]
    slope = np.abs(loss_gradient[0] - loss_gradient[1]).sum()
    margin = logits[0, y[image][0]] - logits[0, other]
    attack = TwoLooks(classifier, epsilon=margin / (1.05 * slope), steps=LONG)
    before = classifier.gradient_calls
    assert not attack_all(attack, x[image], y[image], batch_size=1).fell.any()
    # The last point of the short look, then the first of the long one and one for each step
    assert classifier.gradient_calls - before == SHORT + 1 + 1 + LONG


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scaling_the_logits_changes_nothing(problem, scale):
    classifier, x, y, _ = problem
    scaled = CompiledClassifier(
        lambda images, training=False: scale * classifier.model(images), CLASSES, SHAPE
    )
    one, other = (
        attack_all(TwoLooks(c, epsilon=EPSILON, steps=LONG), x, y) for c in (classifier, scaled)
    )
    np.testing.assert_array_equal(one.fell, other.fell)
    np.testing.assert_array_equal(one.iterations, other.iterations)


def test_targets_are_the_other_classes_in_turn():
    """Only class 3 can be reached, and it is the second likeliest other one."""
    weights = np.zeros((PIXELS, CLASSES))
    weights[:, 3] = 1.0
    bias = np.array([0.0, -1.0, -3.0, -1.2 - 0.5 * PIXELS], "float32")
    x, y = np.full((1, *SHAPE), 0.5, "float32"), np.array([0])
    attack = TwoLooks(linear(weights, bias), epsilon=EPSILON, steps=LONG)
    fell = [attack_all(attack, x, y, restart=restart).fell.all() for restart in (1, 2, 3)]
    assert fell == [False, True, False]


def test_stays_in_the_ball(problem):
    classifier, x, y, _ = problem
    run = attack_all(TwoLooks(classifier, epsilon=EPSILON, steps=LONG), x, y, batch_size=5)
    assert np.abs(run.x_adv - x).max() <= EPSILON + 1e-6
    assert run.x_adv.min() >= 0 and run.x_adv.max() <= 1


def test_rapid_and_its_members_find_the_exact_figure_of_a_linear_model(problem):
    """Four classes: three targets are all there are, and one step reaches a linear worst case."""
    classifier, x, y, left = problem
    assert np.abs(left).min() > 1e-4 and 0.2 < (left > 0).mean() < 0.8
    result = evaluate(classifier, x, y, AttackSettings("rapid", EPSILON))
    np.testing.assert_array_equal(result.is_robust, left > 0)
    pgd, margin = result.summary["attack"]["members"]
    assert (pgd["name"], pgd["steps"], pgd["restarts"]) == ("pgd", 10, 1)
    assert (margin["name"], margin["restarts"]) == ("margin-t", 3)
    assert "not AutoAttack" in result.summary["attack"]["implementation"]


def test_a_long_look_finds_what_a_short_one_misses():
    """A ridge that Auto-PGD climbs by halving its steps: near after the short look, not there."""
    generator = np.random.default_rng(5)
    weight = generator.uniform(0.2, 1, (*SHAPE, 1)).astype("float32")[..., 0]
    top = np.float32(0.5)

    def model(x, training=False):
        score = 0.02 - tf.reduce_sum(weight * tf.abs(x - top), axis=(1, 2, 3))
        return tf.stack([0 * score, score, 0 * score - 9, 0 * score - 9], axis=-1)

    classifier = CompiledClassifier(model, 4, SHAPE)
    x = generator.uniform(0.47, 0.53, (N, *SHAPE)).astype("float32")
    y = np.zeros(N, int)
    clean = classifier.predict(x).argmax(axis=-1)
    assert (clean == y).all()
    run = attack_all(TwoLooks(classifier, epsilon=EPSILON, steps=100), x, y)
    assert run.fell.mean() > 0.5
    assert (run.iterations[run.fell] > SHORT).mean() > 0.5


def test_autoattack_is_the_standard_version():
    """Croce & Hein 2020, section 6 and the defaults of their code for L-inf."""
    settings = AttackSettings("autoattack", 8 / 255)
    assert [(m.attack, m.steps, m.restarts, m.epsilon) for m in settings.members] == [
        ("apgd-ce", 100, 1, 8 / 255),
        ("apgd-t", 100, 9, 8 / 255),
        ("fab-t", 100, 9, 8 / 255),
        ("square-5000", 5000, 1, 8 / 255),
    ]
    assert settings.members_for(10) == settings.members
    assert [m.restarts for m in settings.members_for(4)] == [1, 3, 3, 1]
    assert AttackSettings("autoattack", seed=3).members[0].seed == 3


def test_square_of_autoattack_is_on_the_schedule_of_10000_queries():
    square = AttackSettings("autoattack").members[-1].made_for(linear(np.ones((PIXELS, CLASSES))))
    assert (square.steps, square.scheduled) == (5000, 10_000)
    x = np.full((N, *SHAPE), 0.5, "float32")
    state = square.begin(x, np.zeros(N, int), np.arange(N), 1, 0)
    state["best_margin"][:] = -1.0
    square.propose(state, {"margin": np.zeros(N, "float32")}, 10)
    # Query 10 of 10,000 still has p = 0.8; of 5,000 it would have 0.4.
    assert (state["x_adv"] != x).any(axis=-1).sum(axis=(1, 2)).max() == round(
        (0.8 * 16) ** 0.5
    ) ** 2
