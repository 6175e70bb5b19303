"""ART's PGD with another outer loop: same steps, same survivors, nothing wasted."""

import keras
import numpy as np
import pytest
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import TensorFlowV2Classifier

from kaf_study import InputError
from kaf_study.attacks import pgd as attacks
from kaf_study.attacks.pgd import (
    PGD,
    CompiledClassifier,
    check_perturbation,
    pool_sizes,
    random_start,
    run_restart,
)

EPSILON, ALPHA, STEPS, CLASSES, N = 8 / 255, 2 / 255, 5, 4, 64
SHAPE = (8, 8, 3)


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
def data(cnn):
    """64 images with the model's own predictions as labels, so that all are correct when clean."""
    x = np.random.default_rng(0).uniform(0, 1, (N, *SHAPE)).astype("float32")
    return x, cnn.predict(x, verbose=0).argmax(axis=-1)


def plain_art(cnn, steps=STEPS):
    classifier = TensorFlowV2Classifier(
        model=cnn,
        nb_classes=CLASSES,
        input_shape=SHAPE,
        loss_object=keras.losses.CategoricalCrossentropy(from_logits=True),
        clip_values=(0, 1),
    )
    return ProjectedGradientDescent(
        classifier,
        eps=EPSILON,
        eps_step=ALPHA,
        max_iter=steps,
        num_random_init=0,
        batch_size=N,
        verbose=False,
    )


def ours(cnn, steps=STEPS):
    return PGD(CompiledClassifier(cnn, CLASSES, SHAPE), epsilon=EPSILON, alpha=ALPHA, steps=steps)


def test_every_step_equals_arts_own(cnn, data):
    x, y = data
    one_hot = np.eye(CLASSES, dtype="float32")[y]
    attack, x_adv = ours(cnn), x
    for steps in range(1, STEPS + 1):
        x_adv, _ = attack.step(x_adv, x, one_hot)
        np.testing.assert_allclose(x_adv, plain_art(cnn, steps).generate(x, y=one_hot), atol=1e-6)


def test_survivors_equal_those_of_calling_art_plainly(cnn, data):
    x, y = data
    plain = plain_art(cnn).generate(x, y=np.eye(CLASSES, dtype="float32")[y])
    stands_plain = cnn.predict(plain, verbose=0).argmax(axis=-1) == y
    last = run_restart(ours(cnn), x, lambda i: x[i], y, batch_size=16, judge_every=False)
    every = run_restart(ours(cnn), x, lambda i: x[i], y, batch_size=16)
    assert 5 < stands_plain.sum() < N - 5
    np.testing.assert_array_equal(~last.fell, stands_plain)
    np.testing.assert_allclose(last.x_adv, plain, atol=1e-6)
    assert not np.any(~every.fell & ~stands_plain)  # judging every iterate is at least as strong


def test_gradient_equals_arts_but_for_the_batch_mean(cnn, data):
    x, y = data
    one_hot = np.eye(CLASSES, dtype="float32")[y]
    classifier = CompiledClassifier(cnn, CLASSES, SHAPE)
    gradient = classifier.loss_gradient(x, one_hot)
    plain = plain_art(cnn).estimator.loss_gradient(x, one_hot)
    np.testing.assert_allclose(gradient, N * plain, atol=1e-5)
    np.testing.assert_allclose(classifier.last_logits, cnn(x, training=False), atol=1e-5)


def test_fallen_images_make_room_for_the_next(cnn, data):
    x, y = data
    attack = ours(cnn)
    settled = []
    run = run_restart(
        attack, x, lambda i: x[i], y, batch_size=16, progress=lambda *step: settled.append(step)
    )
    needed = (run.iterations + 1).sum()  # gradients of single images that had to be computed
    assert attack.estimator.gradient_calls <= needed / 16 + STEPS + 1
    assert sum(advanced for advanced, _ in settled) == N * (STEPS + 1)
    assert sum(fell for _, fell in settled) == run.fell.sum()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_run_does_not_depend_on_the_batch_size(cnn, data, batch_size):
    x, y = data

    def start(i):
        return random_start(x[i], epsilon=EPSILON, seed=3, image=i, restart=1)

    one, other = (run_restart(ours(cnn), x, start, y, batch_size=b) for b in (16, batch_size))
    np.testing.assert_array_equal(one.fell, other.fell)
    np.testing.assert_array_equal(one.iterations, other.iterations)
    np.testing.assert_allclose(one.x_adv, other.x_adv, atol=1e-6)


@pytest.mark.parametrize("judge_every", [True, False])
@pytest.mark.parametrize("steps", [40, 41])
def test_leaving_out_cycles_changes_nothing_but_the_number_of_gradients(
    cnn, data, judge_every, steps, monkeypatch
):
    x, y = data
    runs, calls = [], []
    for without in (False, True):
        if without:
            monkeypatch.setattr(
                attacks, "_whole_cycles", lambda before, previous, x_adv, left: 0 * left
            )
        attack = ours(cnn, steps)
        runs.append(
            run_restart(
                attack,
                x,
                lambda i: random_start(x[i], epsilon=EPSILON, seed=3, image=i, restart=1),
                y,
                batch_size=N,
                judge_every=judge_every,
            )
        )
        calls.append(attack.estimator.gradient_calls)
    np.testing.assert_array_equal(runs[0].fell, runs[1].fell)
    np.testing.assert_array_equal(runs[0].predictions, runs[1].predictions)
    np.testing.assert_array_equal(runs[0].iterations, runs[1].iterations)
    np.testing.assert_array_equal(runs[0].x_adv, runs[1].x_adv)
    assert calls[0] < calls[1]


def test_pool_has_few_sizes():
    assert pool_sizes(128) == [16, 32, 64, 128]
    assert pool_sizes(1) == [1]


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


def test_model_is_attacked_in_inference_mode():
    seen = []

    def model(x, training=None):
        seen.append(training)
        return keras.ops.reshape(x, (-1, 12))[:, :2]

    classifier = CompiledClassifier(model, 2, (2, 2, 3))
    classifier.loss_gradient(np.zeros((1, 2, 2, 3), "float32"), np.eye(2, dtype="float32")[:1])
    classifier.predict(np.zeros((1, 2, 2, 3), "float32"))
    assert seen and not any(seen)


def test_nan_under_attack_is_not_counted_as_robust():
    def model(x, training=False):
        flat = keras.ops.reshape(x, (-1, 12))  # NaN below 0.5, where the attack takes pixel 0
        return flat[:, :2] - np.array([0, 5], "float32") + keras.ops.sqrt(flat[:, :1] - 0.5)

    x = np.full((2, 2, 2, 3), 0.6, "float32")
    attack = PGD(CompiledClassifier(model, 2, (2, 2, 3)), epsilon=0.2, alpha=0.06, steps=3)
    with pytest.raises(InputError, match="NaN"):
        run_restart(attack, x, lambda i: x[i], np.array([0, 0]), batch_size=2)


def test_perturbation_is_checked():
    x = np.full((2, 2, 2, 1), 0.5, "float32")
    np.testing.assert_allclose(check_perturbation(x, x + 0.01, 0.02), [0.01, 0.01], rtol=1e-5)
    for wrong in (x + 0.03, x * np.nan, x + 0.6):
        with pytest.raises(RuntimeError):
            check_perturbation(x, wrong.astype("float32"), 0.02)
    with pytest.raises(RuntimeError, match="0, 1"):
        check_perturbation(x, x + 0.6, 1.0)
