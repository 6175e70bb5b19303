"""All attacks: the same loop for all, ART's steps where ART is the reference, the ball kept to."""

import functools
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
import toys
from art.attacks.evasion import DeepFool as ArtDeepFool
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import TensorFlowV2Classifier

from kaf_study import InputError, architectures
from kaf_study.attacks.carlini_wagner import CarliniWagner
from kaf_study.attacks.classifier import FEW, CompiledClassifier, cross_entropy, in_halves
from kaf_study.attacks.deepfool import DeepFool
from kaf_study.attacks.loop import (
    check_perturbation,
    padded_size,
    project,
    random_start,
    random_starts,
)
from kaf_study.attacks.pgd import FGSM, PGD
from kaf_study.attacks.registry import ATTACKS, AttackSettings
from kaf_study.evaluation import evaluate

EPSILON, ALPHA, STEPS, CLASSES, N = 8 / 255, 2 / 255, 5, 4, 48
SHAPE = (6, 6, 3)
PIXELS = 6 * 6 * 3
EACH = np.arange(N)


@pytest.fixture(scope="module")
def cnn():
    keras.utils.set_random_seed(1)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(8, 3, activation="swish"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )


@pytest.fixture(scope="module")
def classifier(cnn):
    return CompiledClassifier(cnn, CLASSES, SHAPE)


@pytest.fixture(scope="module")
def art(cnn):
    return TensorFlowV2Classifier(
        model=cnn,
        nb_classes=CLASSES,
        input_shape=SHAPE,
        loss_object=keras.losses.CategoricalCrossentropy(from_logits=True),
        clip_values=(0, 1),
    )


@pytest.fixture(scope="module")
def data(classifier):
    """Images with the model's own predictions as labels, so that all are correct when clean."""
    x = np.random.default_rng(0).uniform(0, 1, (N, *SHAPE)).astype("float32")
    x[:8] = np.round(x[:8])  # pixels at 0 and 1
    return x, classifier.predict(x).argmax(axis=-1)


linear = functools.partial(toys.linear, SHAPE)


class FromTheImage(PGD):
    """PGD without a random start, as ART's with num_random_init=0."""

    def start(self, x, images, restart, seed):
        return x


def pgd(classifier, kind=PGD, steps=STEPS):
    return kind(classifier, epsilon=EPSILON, alpha=ALPHA, steps=steps)


def attacked(attack, x, y, images=EACH, restart=1, seed=3, batch_size=16, **kwargs):
    return attack.run(x, y, images, restart, seed=seed, batch_size=batch_size, **kwargs)


def arts_pgd(art, x, y, steps):
    attack = ProjectedGradientDescent(
        art,
        eps=EPSILON,
        eps_step=ALPHA,
        max_iter=steps,
        num_random_init=0,
        batch_size=N,
        verbose=False,
    )
    return attack.generate(x, y=np.eye(CLASSES, dtype="float32")[y])


# --------------------------------------------------------------------------- ART is the reference


def test_every_step_of_pgd_is_arts(classifier, art, data):
    x, y = data
    attack = pgd(classifier, FromTheImage)
    state = attack.begin(x, y, EACH, 1, 0)
    for step in range(STEPS):
        _, found = attack.look(state)
        attack.propose(state, found, step)
        np.testing.assert_allclose(state["x_adv"], arts_pgd(art, x, y, step + 1), atol=1e-6)


def test_pgd_judged_at_its_last_iterate_fells_what_art_fells(classifier, art, cnn, data):
    x, y = data
    plain = arts_pgd(art, x, y, STEPS)
    stands_plain = cnn.predict(plain, verbose=0).argmax(axis=-1) == y
    last = attacked(pgd(classifier, FromTheImage), x, y, judge_every=False)
    every = attacked(pgd(classifier, FromTheImage), x, y)
    assert 5 < stands_plain.sum() < N - 5
    np.testing.assert_array_equal(~last.fell, stands_plain)
    np.testing.assert_allclose(last.x_adv, plain, atol=1e-6)
    assert (last.iterations == STEPS).all() and (every.iterations[every.fell] < STEPS).any()
    assert not np.any(~every.fell & ~stands_plain)  # judging every iterate is at least as strong


def test_gradient_equals_arts_but_for_the_batch_mean(classifier, art, cnn, data):
    x, y = data
    loss, logits, gradient = classifier.differentiable(cross_entropy)(x, y)
    one_hot = np.eye(CLASSES, dtype="float32")[y]
    np.testing.assert_allclose(gradient, N * art.loss_gradient(x, one_hot), atol=1e-5)
    np.testing.assert_allclose(logits, cnn(x, training=False), atol=1e-5)
    np.testing.assert_allclose(loss, art.compute_loss(x, one_hot, reduction="none"), atol=1e-5)


def test_class_gradients_are_arts(classifier, art, data):
    x, _ = data
    ours = classifier.class_gradients(x[:5], np.tile([2, 0], (5, 1)))
    np.testing.assert_allclose(ours, art.class_gradient(x[:5])[:, [2, 0]], atol=1e-5)


def test_deepfool_is_arts_where_the_ball_cuts_nothing(classifier, art, data):
    x, y = data
    steps = 4  # by then most, not all, have fallen
    plain = ArtDeepFool(art, max_iter=steps, nb_grads=CLASSES, batch_size=N, verbose=False)
    expected = plain.generate(x)
    run = attacked(DeepFool(classifier, epsilon=1.0, steps=steps), x, y)
    fell = classifier.predict(expected).argmax(axis=-1) != y
    np.testing.assert_array_equal(run.fell, fell)
    assert 5 < (run.iterations[run.fell] < steps).sum()
    np.testing.assert_allclose(run.x_adv, expected, atol=1e-5)


@pytest.mark.parametrize("norm, dual, beyond", [(2, 2, 0), (np.inf, 1, 0.02)])
def test_deepfool_of_a_linear_model_is_the_nearest_boundary(norm, dual, beyond):
    """Of any class: |z_y - z_i| / ||w_y - w_i||_dual; the pixels stay inside of [0, 1]."""
    generator = np.random.default_rng(5)
    x = generator.uniform(0.4, 0.6, (30, *SHAPE)).astype("float32")
    w = generator.normal(size=(x[0].size, CLASSES)).astype("float32")
    # A class that is far in L2, as its weights are few, may be the nearest in L-inf
    w[::2, 1] *= 3

    def linear(images, training=False):
        return tf.reshape(images - 0.5, (-1, len(w))) @ w

    logits = linear(x).numpy().astype("float64")
    y, rows = logits.argmax(axis=-1), np.arange(len(x))
    differences = logits[rows, y][:, None] - logits  # (N, classes)
    slopes = np.linalg.norm(w.T[y][:, None] - w.T[None], ord=dual, axis=-1)
    slopes[rows, y] = np.nan
    expected = np.nanmin(differences / slopes, axis=-1)
    classifier = CompiledClassifier(linear, CLASSES, SHAPE)
    run = attacked(DeepFool(classifier, epsilon=1.0, steps=3, norm=norm), x, y)
    found = np.linalg.norm((run.x_adv - x).reshape(len(x), -1), ord=norm, axis=-1)
    np.testing.assert_allclose(found, (1 + beyond) * expected, rtol=1e-3, atol=1e-6)
    nearest = np.nanargmin(differences / slopes, axis=-1)
    np.testing.assert_array_equal(run.predictions[run.fell], nearest[run.fell])
    assert run.fell.all() if beyond else run.fell.any()  # ART's ends on the boundary itself


def test_deepfool_is_cut_to_the_ball(classifier, data):
    x, y = data
    whole, cut = (attacked(DeepFool(classifier, epsilon=e, steps=9), x, y) for e in (1, 0.01))
    assert np.abs(cut.x_adv - x).max() <= 0.01 + 1e-6 < np.abs(whole.x_adv - x).max()
    assert 0 < cut.fell.sum() < whole.fell.sum()


# --------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("batch_size", [1, 7, 48, 1000])
def test_run_does_not_depend_on_the_batch_size(classifier, data, batch_size):
    one, other = (attacked(pgd(classifier), *data, batch_size=size) for size in (16, batch_size))
    np.testing.assert_array_equal(one.fell, other.fell)
    np.testing.assert_array_equal(one.iterations, other.iterations)
    np.testing.assert_array_equal(one.predictions, other.predictions)
    np.testing.assert_allclose(one.x_adv, other.x_adv, atol=1e-6)
    assert len(set(one.iterations)) > 3


def test_what_happens_to_an_image_does_not_depend_on_the_others(classifier, data):
    x, y = data
    some = np.array([40, 3, 17])
    together = attacked(pgd(classifier), x, y)
    alone = attacked(pgd(classifier), x[some], y[some], images=some)
    np.testing.assert_allclose(alone.x_adv, together.x_adv[some], atol=1e-6)
    np.testing.assert_array_equal(alone.iterations, together.iterations[some])


@pytest.mark.parametrize("judge_every", [True, False])
@pytest.mark.parametrize("steps", [30, 31])
def test_run_is_a_plain_loop_over_all_steps_with_cycles_left_out(
    classifier, data, judge_every, steps
):
    x, y = data
    attack = pgd(classifier, steps=steps)
    state = attack.begin(x, y, EACH, 1, 3)
    iterates, predictions = [], []
    for iteration in range(steps + 1):
        logits, found = attack.look(state)
        iterates.append(state["x_adv"])
        predictions.append(logits.argmax(axis=-1))
        attack.propose(state, found, iteration)
    wrong = np.stack(predictions) != y  # (steps + 1, N)
    fell = wrong.any(axis=0) if judge_every else wrong[-1]
    at = np.where(fell & judge_every, wrong.argmax(axis=0), steps)

    before = classifier.gradient_calls
    run = attacked(attack, x, y, batch_size=N, judge_every=judge_every)
    np.testing.assert_array_equal(run.fell, fell)
    np.testing.assert_array_equal(run.iterations, at)
    np.testing.assert_array_equal(run.predictions, np.stack(predictions)[at, EACH])
    np.testing.assert_allclose(run.x_adv, np.stack(iterates)[at, EACH], atol=1e-6)
    assert 0 < fell.sum() < N
    if not judge_every:  # some images go to and fro, none has to be followed to the end
        assert classifier.gradient_calls - before < steps


def test_fallen_images_make_room_for_the_next(classifier, data):
    settled, before = [], classifier.gradient_calls
    run = attacked(pgd(classifier), *data, progress=lambda *step: settled.append(step))
    needed = (run.iterations + 1).sum()  # gradients of single images that had to be computed
    assert classifier.gradient_calls - before <= needed / 12 + STEPS + 1  # 12: 3/4 of a batch
    assert sum(advanced for advanced, _ in settled) == N * (STEPS + 1)
    assert sum(fell for _, fell in settled) == run.fell.sum() > 0


@pytest.mark.parametrize("is_compiled, shapes, most", [(True, 7, 1 / 2), (False, 40, 1 / 32)])
def test_batches_have_few_shapes_and_little_padding(is_compiled, shapes, most):
    size_for = functools.partial(padded_size, is_compiled=is_compiled)
    for batch_size in (128, 100, 9, 1):
        sizes = {count: size_for(count, batch_size) for count in range(1, batch_size + 1)}
        assert len(set(sizes.values())) <= shapes
        for count, size in sizes.items():
            padding = max(count if is_compiled else batch_size, 1) * most
            smallest = batch_size / 8 if is_compiled else 1
            assert count <= size <= min(batch_size, max(count + padding, smallest))
    assert (size_for(17, 128), size_for(67, 128)) == ((24, 96) if is_compiled else (18, 68))


@pytest.mark.parametrize("activation, is_compiled", [("kaf", True), ("swish", False)])
def test_models_with_kafs_are_compiled_for_each_batch_size(activation, is_compiled):
    model = architectures.resnet(activation, 8, (8, 8, 3), 4)
    assert CompiledClassifier(model, 4, (8, 8, 3)).is_compiled_by_shape == is_compiled


def test_random_start_is_named_by_seed_image_and_restart():
    x = np.full(SHAPE, 0.01, "float32")

    def start(**changed):
        named = {"epsilon": EPSILON, "seed": 0, "image": 5, "restart": 1} | changed
        return random_start(x, **named)

    np.testing.assert_array_equal(start(), start())
    for changed in ({"seed": 1}, {"image": 6}, {"restart": 2}):
        assert not np.array_equal(start(), start(**changed))
    assert start().min() == 0  # clipped to [0, 1]
    assert np.abs(start() - x).max() <= EPSILON + 1e-6
    assert np.unique(start(epsilon=0.005)).size == PIXELS  # each pixel its own
    assert np.ptp(start(epsilon=0.005)) > 0.009  # the whole ball
    both = random_starts(np.stack([x, x]), np.array([5, 6]), epsilon=EPSILON, seed=0, restart=1)
    np.testing.assert_array_equal(both, [start(), start(image=6)])


def test_starts_of_pgd_are_random_and_of_fgsm_the_image(classifier, data):
    x, y = data
    named = random_starts(x, EACH, epsilon=EPSILON, seed=3, restart=2)
    np.testing.assert_array_equal(pgd(classifier).begin(x, y, EACH, 2, 3)["x_adv"], named)
    fgsm = FGSM(classifier, epsilon=EPSILON)
    np.testing.assert_array_equal(fgsm.begin(x, y, EACH, 2, 3)["x_adv"], x)


def test_fgsm_is_one_signed_step_of_epsilon(classifier, data):
    x, y = data
    run = attacked(FGSM(classifier, epsilon=0.02), x, y)
    sign = np.sign(classifier.differentiable(cross_entropy)(x, y)[2])
    np.testing.assert_allclose(run.x_adv, np.clip(x + 0.02 * sign, 0, 1), atol=1e-6)


def test_nan_under_attack_is_not_counted_as_robust():
    def model(x, training=False):
        flat = keras.ops.reshape(x, (-1, 12))  # NaN below 0.5, where the attack takes pixel 0
        return flat[:, :2] - np.array([0, 5], "float32") + keras.ops.sqrt(flat[:, :1] - 0.5)

    x = np.full((2, 2, 2, 3), 0.6, "float32")
    classifier = CompiledClassifier(model, 2, (2, 2, 3))
    attack = FromTheImage(classifier, epsilon=0.2, alpha=0.06, steps=3)
    with pytest.raises(InputError, match="NaN"):
        attack.run(x, np.array([0, 0]), np.arange(2), 1, seed=0, batch_size=2)


GRADIENT_ATTACKS = [name for name, own in ATTACKS.items() if own.needs_gradient and not own.members]


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_a_pixel_whose_gradient_is_nan_counts_as_one_without(name):
    """The root of a ReLU below its kink: a logit that is finite, a slope of 0 times infinity."""
    generator = np.random.default_rng(4)
    weights = generator.normal(size=(PIXELS, CLASSES)).astype("float32")
    weights[0] = 0  # the first pixel does nothing but through its root

    def model(x, training=False, root=tf.sqrt):
        flat = tf.reshape(x - 0.5, (-1, PIXELS))
        return flat @ weights + root(tf.nn.relu(flat[:, :1])) * np.eye(1, CLASSES, dtype="float32")

    x = generator.uniform(0.2, 0.8, (8, *SHAPE)).astype("float32")
    x[:, 0, 0, 0] = 0.3
    rooted = CompiledClassifier(model, CLASSES, SHAPE)
    plain = CompiledClassifier(functools.partial(model, root=tf.identity), CLASSES, SHAPE)
    y = plain.predict(x).argmax(axis=-1)
    with pytest.raises(InputError, match="NaN"):  # is it there?
        rooted.check_gradient(x, y)
    settings = AttackSettings(name, 0.04, steps=min(ATTACKS[name].steps, 6), restarts=1)
    with_nan, without = (
        attacked(settings.made_for(c), x, y, images=EACH[:8]) for c in (rooted, plain)
    )
    assert with_nan.fell.any()
    np.testing.assert_array_equal(with_nan.fell, without.fell)
    np.testing.assert_allclose(with_nan.x_adv, without.x_adv, atol=1e-6)


def test_projection_is_the_nearest_point_of_ball_and_cube():
    x = np.array([0.01, 0.5, 0.99], "float32")
    for far, nearest in ((-1, [0, 0.4, 0.89]), (2, [0.11, 0.6, 1]), (0.5, [0.11, 0.5, 0.89])):
        np.testing.assert_allclose(project(np.full(3, far), x, 0.1), nearest, atol=1e-7)


def test_perturbation_is_held_to_the_ball_and_to_the_cube_within_a_millionth():
    x = np.zeros((2, 2, 2, 1), "float32")

    def moved(by, base=x):
        x_adv = base.copy()
        x_adv[1, 0, 1, 0] += by
        return check_perturbation(base, x_adv, 0.02)

    np.testing.assert_allclose(moved(0.01), [0, 0.01])
    np.testing.assert_allclose(moved(-0.01, x + 0.5), [0, 0.01], rtol=1e-5)
    moved(0.02 + 0.9e-6)
    with pytest.raises(RuntimeError, match="left the ball"):
        moved(0.02 + 1.1e-6)
    with pytest.raises(RuntimeError, match="left the ball"):
        moved(-0.03, x + 0.5)
    for by, base in ((-1e-9, x), (1e-6, x + 1)):
        with pytest.raises(RuntimeError, match="left \\[0, 1\\]"):
            moved(np.float32(by), base)
    for by in (np.nan, np.inf):
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            moved(by)


# --------------------------------------------------------------------------- the classifier


def test_model_is_attacked_in_inference_mode():
    seen = []

    def model(x, training=None):
        seen.append(training)
        return keras.ops.reshape(x, (-1, 12))[:, :2]

    classifier = CompiledClassifier(model, 2, (2, 2, 3))
    classifier.differentiable(cross_entropy)(np.zeros((1, 2, 2, 3), "float32"), np.array([0]))
    classifier.predict(np.zeros((1, 2, 2, 3), "float32"))
    assert len(seen) == 2 and not any(seen)


VALUES = tf.TensorSpec((None,), tf.float32)


def test_a_batch_is_computed_in_two_halves_in_its_order():
    @tf.function(input_signature=[VALUES])
    def function(x):
        return x, tf.fill(tf.shape(x), tf.size(x)), None

    for count, sizes in ((17, [8] * 8 + [9] * 9), (FEW, [FEW] * FEW)):
        x, size, nothing = in_halves(function, VALUES)(tf.range(count, dtype="float32"))
        np.testing.assert_array_equal(x, np.arange(count))
        np.testing.assert_array_equal(size, sizes)
        assert nothing is None


def test_on_a_gpu_a_batch_is_computed_whole(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])

    @tf.function(input_signature=[VALUES])
    def size_of(x):
        return tf.fill(tf.shape(x), tf.size(x))

    assert set(in_halves(size_of, VALUES)(tf.zeros(17)).numpy()) == {17}


def test_predictions_made_in_batches_are_the_models(classifier, cnn, data):
    x, _ = data
    expected = cnn(x, training=False)
    for predict in (classifier.predict, classifier.predict_as_given):
        np.testing.assert_allclose(predict(x, batch_size=20), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda flat: tf.stop_gradient(flat), "no gradient passes"),
        (lambda flat: tf.sqrt(flat * 0), "NaN or infinite"),
    ],
)
def test_a_model_without_a_gradient_is_refused(model, reason):
    classifier = CompiledClassifier(
        lambda x, training=False: model(tf.reshape(x, (-1, 12))[:, :2]), 2, (2, 2, 3)
    )
    with pytest.raises(InputError, match=reason):
        classifier.check_gradient(np.zeros((1, 2, 2, 3), "float32"), np.array([0]))


# --------------------------------------------------------------------------- by name


def test_every_attack_of_the_registry_can_be_made_and_keeps_to_the_ball(classifier, data):
    x, y = data[0][:16], data[1][:16]
    for name, own in ATTACKS.items():
        if own.members:
            continue
        settings = AttackSettings(name, 0.2, steps=min(own.steps, 8), restarts=1)
        run = attacked(settings.made_for(classifier), x, y, images=EACH[:16])
        assert run.fell.any(), name
        assert np.abs(run.x_adv - x).max() <= 0.2 + 1e-6, name
        assert run.x_adv.min() >= 0 and run.x_adv.max() <= 1, name
        predictions = classifier.predict(run.x_adv).argmax(axis=-1)
        np.testing.assert_array_equal(run.predictions, predictions)
        np.testing.assert_array_equal(run.fell, predictions != y)


def test_an_attack_has_as_many_points_as_the_registry_says(classifier):
    for name, own in ATTACKS.items():
        if not own.members:
            settings = AttackSettings(name).fitted(CLASSES)
            assert settings.made_for(classifier).steps == own.steps + own.points_after, name


def test_settings_reach_the_attack(classifier):
    attack = AttackSettings("pgd", 0.1, 0.03, 7).made_for(classifier)
    assert (type(attack), attack.epsilon, attack.alpha, attack.steps) == (PGD, 0.1, 0.03, 7)


def test_too_few_classes_are_refused():
    three = linear(np.zeros((PIXELS, 3)))
    with pytest.raises(InputError, match="apgd-t needs at least 4 classes, the model has 3"):
        AttackSettings("apgd-t").made_for(three)
    AttackSettings("apgd-dlr").made_for(three)


def test_more_targets_than_other_classes_are_refused(classifier):
    with pytest.raises(InputError, match="4 classes allow 3 restarts; got 4"):
        AttackSettings("apgd-t", restarts=4).made_for(classifier)
    AttackSettings("apgd-t", restarts=3).made_for(classifier)


@pytest.mark.parametrize("attack", ["apgd-t", "fab-t"])
def test_left_to_itself_an_attack_aims_at_the_other_classes_there_are(attack, classifier):
    settings = AttackSettings(attack)
    assert [settings.fitted(classes).restarts for classes in (4, 9, 10, 100)] == [3, 8, 9, 9]
    assert AttackSettings(attack, restarts=2).fitted(10).restarts == 2
    x = np.full((2, *SHAPE), 0.5, "float32")
    y = classifier.predict(x).argmax(axis=-1)
    summary = evaluate(classifier, x, y, replace(settings, steps=2)).summary
    assert summary["attack"]["restarts"] == 3


# --------------------------------------------------------------------------- Carlini & Wagner


def test_carlini_wagner_on_a_linear_model_falls_where_the_corner_does():
    generator = np.random.default_rng(1)
    w = generator.normal(size=(PIXELS, 2))
    x = generator.uniform(0, 1, (60, *SHAPE)).astype("float32")
    classifier = linear(w)
    bias = np.median(np.diff(classifier.predict(x)))
    classifier = linear(w, np.array([bias, 0.0], "float32"))
    logits = classifier.predict(x)
    y = logits.argmax(axis=-1)
    epsilon = 0.02
    direction = (w[:, 1] - w[:, 0]).reshape(SHAPE) * np.where(y == 0, 1, -1)[:, None, None, None]
    corner = np.clip(x + epsilon * np.sign(direction), 0, 1)
    gained = ((corner - x) * direction).reshape(60, -1).sum(axis=1)
    margin = np.abs(logits[:, 0] - logits[:, 1])
    attack = CarliniWagner(classifier, epsilon=epsilon, steps=40)
    run = attack.run(x, y, np.arange(60), 1, seed=0, batch_size=32)
    assert not run.fell[margin > gained].any() and run.fell[margin < 0.98 * gained].all()
    assert 10 < run.fell.sum() < 50


def test_carlini_wagner_moves_as_adam_does():
    generator = np.random.default_rng(1)
    w = generator.choice([-1, 1], (PIXELS, 2)) * generator.uniform(1, 2, (PIXELS, 2))
    w[:, 1] *= 3  # the margin's gradient is nowhere small, where Keras' Adam rounds otherwise
    classifier, x = linear(w), np.full((1, *SHAPE), 0.5, "float32")
    attack = CarliniWagner(classifier, epsilon=0.2, steps=3)
    state = attack.begin(x, np.array([0]), EACH[:1], 1, 0)
    np.testing.assert_allclose(state["x_adv"], x)
    down = np.sign(w[:, 0] - w[:, 1]).reshape(1, *SHAPE)
    keras_adam, variable = keras.optimizers.Adam(0.1), keras.Variable(np.zeros_like(x))
    for iteration in range(3):
        _, found = attack.look(state)
        slope = 0.2 * (1 - np.tanh(variable.numpy()) ** 2)
        keras_adam.apply([(w[:, 0] - w[:, 1]).reshape(1, *SHAPE) * slope], [variable])
        attack.propose(state, found, iteration)
        expected = 0.5 + 0.2 * np.tanh(variable.numpy())
        np.testing.assert_allclose(state["x_adv"], expected, atol=1e-5)
    assert (np.sign(state["x_adv"] - x) == -down).all()
