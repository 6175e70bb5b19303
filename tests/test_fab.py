"""FAB: its projection is the nearest point of the hyperplane in the box, its walk the paper's."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import toys
from scipy.optimize import linprog
from toys import attack_all

from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.fab import FAB, SEARCH_STEPS, to_hyperplane

SHAPE, CLASSES, N = (4, 4, 3), 5, 24
PIXELS = int(np.prod(SHAPE))


linear = functools.partial(toys.linear, SHAPE)


@pytest.fixture(scope="module")
def curved():
    """A small network, its images, and labels that are its predictions."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Rescaling(4.0, offset=-2.0),
            keras.layers.Conv2D(16, 3, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES),
        ]
    )
    classifier = CompiledClassifier(model, CLASSES, SHAPE)
    x = np.random.default_rng(0).uniform(0, 1, (N, *SHAPE)).astype("float32")
    return classifier, x, classifier.predict(x).argmax(axis=-1)


# ---------------------------------------------------------------- the projection


def nearest_by_linear_programming(x, normal, value):
    """min r over (change, r): |change_i| <= r, 0 <= x + change <= 1, normal . change = -value."""
    d = len(x)
    rows = np.block([[np.eye(d), -np.ones((d, 1))], [-np.eye(d), -np.ones((d, 1))]])
    solved = linprog(
        np.append(np.zeros(d), 1.0),
        A_ub=rows,
        b_ub=np.zeros(2 * d),
        A_eq=np.append(normal, 0.0)[None],
        b_eq=[-value],
        bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
    )
    return solved.x[-1] if solved.success else None


def test_projection_is_the_nearest_point_of_the_hyperplane_in_the_box():
    generator = np.random.default_rng(0)
    reached = 0
    for case in range(60):
        x = generator.uniform(0, 1, PIXELS)
        x[generator.random(PIXELS) < 0.2] = generator.integers(0, 2)  # some at their end already
        normal = generator.normal(size=PIXELS) * (generator.random(PIXELS) < 0.8)
        # How far the box reaches, on the side that is wanted.
        side = (-1) ** case
        reach = np.maximum(-side * normal * (1 - x), side * normal * x).sum()
        value = side * reach * generator.uniform(0, 1.1)
        change = to_hyperplane(
            x.reshape(1, *SHAPE).astype("float32"),
            normal.reshape(1, *SHAPE).astype("float32"),
            np.array([value], "float32"),
        ).ravel()
        assert (x + change).min() >= -1e-6 and (x + change).max() <= 1 + 1e-6
        nearest = nearest_by_linear_programming(x, normal, value)
        if nearest is None:  # out of reach: as near as the box allows
            np.testing.assert_allclose(normal @ change, -side * reach, rtol=1e-4)
        else:
            reached += 1
            np.testing.assert_allclose(value + normal @ change, 0, atol=1e-4)
            np.testing.assert_allclose(np.abs(change).max(), nearest, atol=1e-5)
    assert 40 < reached < 60


def test_projections_of_a_batch_do_not_depend_on_each_other():
    generator = np.random.default_rng(1)
    x = generator.uniform(0, 1, (N, *SHAPE)).astype("float32")
    normal = generator.normal(size=x.shape).astype("float32")
    value = generator.uniform(-15, 15, N).astype("float32")
    together = to_hyperplane(x, normal, value)
    for i in range(N):
        alone = to_hyperplane(x[i : i + 1], normal[i : i + 1], value[i : i + 1])
        np.testing.assert_array_equal(together[i], alone[0])


def test_a_point_on_the_hyperplane_and_a_plane_without_normal_stay():
    x = np.full((2, *SHAPE), 0.3, "float32")
    normal = np.zeros((2, *SHAPE), "float32")
    normal[0] = 1.0
    assert not to_hyperplane(x, normal, np.array([0.0, 2.0], "float32")).any()


# ---------------------------------------------------------------- the walk


def plain_fab(logits_of, x, y, target, iterations, alpha_max=0.1, eta=1.05, beta=0.9):
    """Croce & Hein 2020, Algorithm 1, for one image (D,); the points proposed and the best norm.

    logits_of: x (D,) -> logits (classes,) and their gradients (classes, D).
    """

    def projection(z, w, b):
        """Nearest point of {w . z = b} in the box; its distance by bisection."""
        sign = -np.sign(w @ z - b) * np.sign(w)

        def moved(length):
            return np.clip(z + length * sign, 0, 1)

        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            is_short = np.sign(w @ moved(middle) - b) == np.sign(w @ z - b)
            low, high = (middle, high) if is_short else (low, middle)
        return moved(high) - z

    walk, best, proposed = x, np.inf, []
    for _ in range(iterations):
        logits, gradients = logits_of(walk)
        w = gradients[target] - gradients[y]
        b = w @ walk - (logits[target] - logits[y])
        delta, delta_clean = projection(walk, w, b), projection(x, w, b)
        near, far = np.abs(delta).max(), np.abs(delta_clean).max()
        alpha = min(near / (near + far), alpha_max)
        walk = (1 - alpha) * (walk + eta * delta) + alpha * (x + eta * delta_clean)
        walk = np.clip(walk, 0, 1)
        proposed.append(walk)
        if logits_of(walk)[0].argmax() != y:
            best = min(best, np.abs(walk - x).max())
            walk = (1 - beta) * x + beta * walk
    return np.array(proposed), best


class Recording(FAB):
    """Keeps what every image was proposed, and the best norms before the final search."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.proposed, self.norms = [], []

    def propose(self, state, found, iteration):
        super().propose(state, found, iteration)
        self.proposed.append(state["proposed"])
        self.norms.append(state["best_norm"])


def test_points_are_those_of_a_plain_reading(curved):
    classifier, x, y = curved
    iterations, n = 12, 6
    attack = Recording(classifier, epsilon=0.0, steps=iterations)
    assert not attack_all(attack, x[:n], y[:n], restart=2).fell.any()
    logits = classifier.predict(x)
    gradient_of = classifier.differentiable(lambda logits, c: tf.gather(logits, c, batch_dims=1))

    def logits_of(z):
        images = np.repeat(z.reshape(1, *SHAPE).astype("float32"), CLASSES, axis=0)
        _, found, gradients = gradient_of(images, np.arange(CLASSES))
        return found[0], gradients.reshape(CLASSES, -1)

    is_adversarial = []
    for i in range(n):
        target = np.argsort(-logits[i])[2]  # the second likeliest other class
        proposed, best = plain_fab(logits_of, x[i].ravel(), y[i], target, iterations)
        for k in range(iterations):
            ours = attack.proposed[k][i].ravel()
            np.testing.assert_allclose(ours, proposed[k], atol=2e-4, err_msg=f"{i}, {k}")
        np.testing.assert_allclose(attack.norms[iterations][i], best, atol=2e-4)
        is_adversarial.append(np.isfinite(best))
    assert any(is_adversarial)


def test_final_search_comes_nearer_and_never_goes_farther(curved):
    classifier, x, y = curved
    attack = Recording(classifier, epsilon=0.0, steps=3)
    attack_all(attack, x, y, batch_size=N)
    assert len(attack.norms) == 3 + SEARCH_STEPS
    before, after = attack.norms[3], attack.norms[-1]
    found = np.isfinite(before)
    assert found.sum() > N / 2
    assert (after <= before)[found].all() and (after < before)[found].mean() > 0.5
    np.testing.assert_array_equal(np.isfinite(after), found)


def test_final_search_finds_the_boundary_of_a_linear_margin():
    """One search step suffices where the margin is linear along the segment."""
    generator = np.random.default_rng(4)
    weights = generator.normal(size=(PIXELS, 2))
    x = generator.uniform(0.4, 0.6, (N, *SHAPE)).astype("float32")
    classifier = linear(weights)
    logits = classifier.predict(x)
    y = logits.argmax(axis=-1)
    attack = Recording(classifier, epsilon=0.0, steps=1)
    attack_all(attack, x, y, batch_size=N)
    margin = np.abs(logits[:, 0] - logits[:, 1])
    exact = margin / np.abs(weights[:, 0] - weights[:, 1]).sum()
    # One iteration of a linear model overshoots by eta; the search takes that back.
    np.testing.assert_allclose(attack.norms[1], 1.05 * exact, rtol=1e-3)
    searched = np.abs(attack.proposed[1] - x).reshape(N, -1).max(axis=1)
    np.testing.assert_allclose(searched, exact, rtol=1e-3)


# ---------------------------------------------------------------- the verdict


def test_linear_model_falls_exactly_where_it_must():
    generator = np.random.default_rng(2)
    weights = generator.normal(size=(PIXELS, 2))
    x = generator.uniform(0.3, 0.7, (80, *SHAPE)).astype("float32")
    classifier = linear(weights)
    logits = classifier.predict(x)
    y = logits.argmax(axis=-1)
    distance = np.abs(logits[:, 0] - logits[:, 1]) / np.abs(weights[:, 0] - weights[:, 1]).sum()
    epsilon = float(np.median(distance))
    # Overshot by 5 % and then pulled back: the boundary is met to 1 %.
    is_clear = np.abs(distance / epsilon - 1) > 0.01
    run = attack_all(FAB(classifier, epsilon=epsilon, steps=10), x, y)
    np.testing.assert_array_equal(run.fell[is_clear], (distance < epsilon)[is_clear])
    assert 0.3 < run.fell.mean() < 0.7 and is_clear.mean() > 0.9


def test_an_image_falls_only_within_the_ball(curved):
    classifier, x, y = curved
    nearest = Recording(classifier, epsilon=0.0, steps=20)
    assert not attack_all(nearest, x, y, batch_size=N).fell.any()
    norms = nearest.norms[-1]
    epsilon = float(np.median(norms))
    run = attack_all(FAB(classifier, epsilon=epsilon, steps=20), x, y)
    # The last point of the search is looked at after the last norm was noted.
    assert run.fell[norms <= epsilon].all() and run.fell.mean() < 0.8
    assert np.abs(run.x_adv - x).max() <= epsilon + 1e-6
    assert run.x_adv.min() >= 0 and run.x_adv.max() <= 1
    np.testing.assert_array_equal(run.x_adv[~run.fell], x[~run.fell])
    predictions = classifier.predict(run.x_adv).argmax(axis=-1)
    np.testing.assert_array_equal(predictions, run.predictions)
    np.testing.assert_array_equal(predictions != y, run.fell)


def test_what_happens_to_an_image_does_not_depend_on_the_batch(curved):
    classifier, x, y = curved
    attack = FAB(classifier, epsilon=0.05, steps=8)
    runs = [attack_all(attack, x, y, batch_size=size) for size in (N, 5, 1)]
    assert 0 < runs[0].fell.sum() < N
    for run in runs[1:]:
        np.testing.assert_array_equal(run.fell, runs[0].fell)
        np.testing.assert_allclose(run.x_adv, runs[0].x_adv, atol=1e-4)


def test_restarts_aim_at_the_other_classes_in_turn():
    """Only class 3 can be reached, and it is the third likeliest other one."""
    weights = np.zeros((PIXELS, CLASSES))
    weights[:, 3] = 1.0
    x = np.full((1, *SHAPE), 0.5, "float32")
    bias = np.array([0.0, -1.0, -2.0, -2.5 - 0.5 * PIXELS, -4.0], "float32")
    attack = FAB(linear(weights, bias), epsilon=0.2, steps=5)
    y = np.array([0])
    fell = [attack_all(attack, x, y, restart=restart).fell.all() for restart in (1, 2, 3, 4)]
    assert fell == [False, False, True, False]


def test_an_image_that_is_wrong_when_clean_falls_as_it_is(curved):
    classifier, x, y = curved
    run = attack_all(FAB(classifier, epsilon=0.0, steps=2), x, (y + 1) % CLASSES)
    assert run.fell.all() and (run.iterations == 0).all()
    np.testing.assert_array_equal(run.x_adv, x)
