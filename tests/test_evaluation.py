"""The evaluator reports what is true: on models whose robust accuracy is known, it is that."""

import json
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from kaf_study import InputError, evaluation
from kaf_study import records as results
from kaf_study.attacks.pgd import CompiledClassifier
from kaf_study.evaluation import AttackSettings, evaluate, evaluate_saved
from kaf_study.saved_models import open_model

EPSILON, ALPHA = 8 / 255, 2 / 255
SHAPE, CLASSES, N = (6, 6, 3), 3, 60
PIXELS = 6 * 6 * 3
QUICK = {"epsilon": EPSILON, "alpha": ALPHA, "steps": 6, "restarts": 3, "batch_size": 16}


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).uniform(0, 1, (N, *SHAPE)).astype("float32")
    return x, np.arange(N) % CLASSES


@pytest.fixture(scope="module")
def cnn(data):
    """A small CNN, trained a little on random labels: some right, some wrong, few robust."""
    keras.utils.set_random_seed(2)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(*data, epochs=12, verbose=0)
    return model


def csv(result, folder):
    return result.write(folder).with_suffix(".csv").read_bytes()


def test_linear_model_reports_its_known_robust_accuracy():
    """The worst margin of a linear two-class model is margin - epsilon * ||w||_1, exactly."""
    generator = np.random.default_rng(1)
    w = generator.normal(size=(PIXELS,)).astype("float32")
    x = generator.uniform(0.1, 0.9, (200, *SHAPE)).astype("float32")
    score = x.reshape(200, -1) @ w
    score -= (bias := np.median(score))
    y = (score > 0).astype(int)
    y[:20] = 1 - y[:20]  # wrong when clean
    margin = np.where(y == 1, score, -score)
    radius = 0.25 * np.abs(score).max() / np.abs(w).sum()
    worst = margin - radius * np.abs(w).sum()
    assert np.abs(worst).min() > 1e-4

    def model(x, training=False):
        z = tf.linalg.matvec(tf.reshape(x, (-1, PIXELS)), w) - bias
        return tf.stack([-z / 2, z / 2], axis=-1)

    result = evaluate(model, x, y, epsilon=radius, alpha=2 * radius, steps=2, restarts=2)
    assert result.summary["clean_accuracy"] == (margin > 0).mean() == 0.9
    assert result.summary["robust_accuracy"] == (worst > 0).mean()
    assert 0.1 < result.summary["robust_accuracy"] < 0.8
    rows = result.images
    np.testing.assert_array_equal(rows["label"] == rows["adversarial_prediction"], worst > 0)


def test_three_lines_recount_the_summary(cnn, data):
    for labels in ("true", "predicted"):
        result = evaluate(cnn, *data, **QUICK, labels=labels)
        rows, summary = result.images, result.summary
        kept = rows.label == rows.adversarial_prediction
        if labels == "true":
            robust = (rows.label == rows.clean_prediction) & kept
            assert 0 < robust.mean() == summary["robust_accuracy"]
            assert rows.restart.notna().sum() == (rows.label == rows.clean_prediction).sum() - (
                robust.sum()
            )
        else:
            assert kept.mean() == summary["accuracy_under_attack_predicted_labels"]


def test_attack_stays_within_what_it_is_allowed(cnn, data):
    x, y = data
    before = x.copy()
    result = evaluate(cnn, x, y, **QUICK)
    assert result.images["linf"].max() <= EPSILON + 1e-6
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    np.testing.assert_allclose(
        np.abs(result.x_adv - x).reshape(N, -1).max(axis=1), result.images["linf"]
    )
    np.testing.assert_array_equal(x, before)
    assert result.summary["attacked_predictions_not_reproduced"] == 0


def test_images_wrong_when_clean_are_not_attacked(cnn, data):
    result = evaluate(cnn, *data, **QUICK)
    wrong = result.images[result.images.label != result.images.clean_prediction]
    assert len(wrong) > 0
    assert wrong.linf.max() == 0
    assert wrong.restart.isna().all()
    assert (wrong.clean_prediction == wrong.adversarial_prediction).all()


@pytest.mark.parametrize("labels", ["true", "predicted"])
def test_csv_depends_on_the_seed_alone(cnn, data, labels, tmp_path):
    def written(name, **changed):
        return csv(evaluate(cnn, *data, **QUICK | {"labels": labels} | changed), tmp_path / name)

    once = written("once")
    assert written("again") == once
    assert written("other batch size", batch_size=25) == once
    assert written("other seed", seed=1) != once


def test_more_restarts_only_lower_it(cnn, data):
    settings = QUICK | {"epsilon": 4 / 255}
    one, many = (evaluate(cnn, *data, **settings | {"restarts": r}).images for r in (1, 5))
    stood_one, stood_many = one.restart.isna(), many.restart.isna()
    assert not (stood_many & ~stood_one).any()
    felled_first = ~stood_one
    assert (many.restart[felled_first] == 1).all()


def test_predicted_labels_count_wrong_images_pushed_onto_their_true_class():
    """Planted: two classes, so that every image moved off a wrong prediction is called robust."""

    def model(x, training=False):
        z = tf.reduce_mean(x, axis=(1, 2, 3)) - 0.5
        return tf.stack([-z, z], axis=-1)

    x = np.full((10, *SHAPE), 0.51, "float32")  # all predicted as 1, all within reach of 0
    y = np.array([1] * 6 + [0] * 4)
    true = evaluate(model, x, y, **QUICK).summary
    predicted = evaluate(model, x, y, **QUICK | {"labels": "predicted"}).summary
    assert true["clean_accuracy"] == 0.6
    assert true["robust_accuracy"] == 0
    assert predicted["accuracy_under_attack_predicted_labels"] == 0.4
    assert predicted["pushed_onto_true_class_predicted_labels"] == 4
    assert "robust_accuracy" not in predicted


def test_predicted_figure_is_never_below_the_true_one(cnn, data):
    true = evaluate(cnn, *data, **QUICK).images
    predicted = evaluate(cnn, *data, **QUICK | {"labels": "predicted"}).images
    robust = (true.label == true.clean_prediction) & (true.label == true.adversarial_prediction)
    assert (predicted.label == predicted.adversarial_prediction)[robust].all()


def test_probabilities_are_attacked_as_their_logits(cnn, data):
    softmax = keras.Sequential([*cnn.layers, keras.layers.Softmax()])
    saturated = keras.Sequential(
        [cnn, keras.layers.Lambda(lambda z: 60 * z), keras.layers.Softmax()]
    )
    plain = evaluate(cnn, *data, **QUICK)
    removed = evaluate(softmax, *data, **QUICK)
    assert plain.summary["outputs"] == "logits"
    assert removed.summary["outputs"] == "softmax removed"
    pd.testing.assert_frame_equal(plain.images, removed.images)
    # Behind a saturated softmax nothing would fall; the logits behind it tell the truth.
    revealed = evaluate(saturated, *data, **QUICK)
    assert abs(revealed.summary["robust_accuracy"] - plain.summary["robust_accuracy"]) < 0.1

    def function(x, training=False):
        return softmax(x, training=training)

    hidden = evaluate(function, *data, **QUICK)
    assert hidden.summary["outputs"] == "probabilities"
    pd.testing.assert_frame_equal(plain.images, hidden.images)


# --- interruption


class Killed(Exception):
    pass


def count_gradients(monkeypatch, kill_at=None):
    """Count gradient calls; raise at one of them, as a kill would end it."""
    calls = []
    plain = CompiledClassifier.loss_gradient

    def counted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed
        return plain(self, *arguments, **named)

    monkeypatch.setattr(CompiledClassifier, "loss_gradient", counted)
    return calls


@pytest.mark.parametrize("labels", ["true", "predicted"])
def test_interrupted_run_resumes_without_repeating_restarts(
    cnn, data, labels, tmp_path, monkeypatch
):
    settings = QUICK | {"labels": labels, "epsilon": 3 / 255, "alpha": 1 / 255}
    partial = tmp_path / "partial.npz"
    per_restart = []
    with monkeypatch.context() as patch:
        calls = count_gradients(patch)
        for restarts in (1, 2, 3):
            before = len(calls)
            whole = evaluate(cnn, *data, **settings | {"restarts": restarts})
            per_restart.append(len(calls) - before)
    assert per_restart[0] < per_restart[1] < per_restart[2]

    with monkeypatch.context() as patch:  # killed in the middle of the third restart
        count_gradients(patch, kill_at=per_restart[1] + 2)
        with pytest.raises(Killed):
            evaluate(cnn, *data, **settings, partial=partial)
    with monkeypatch.context() as patch:
        calls = count_gradients(patch)
        resumed = evaluate(cnn, *data, **settings, partial=partial)
    assert len(calls) == per_restart[2] - per_restart[1]  # the third restart, and nothing else
    assert csv(resumed, tmp_path / "resumed") == csv(whole, tmp_path / "whole")
    np.testing.assert_array_equal(resumed.x_adv, whole.x_adv)


def test_progress_of_another_evaluation_is_not_taken_over(cnn, data, tmp_path, monkeypatch):
    partial = tmp_path / "partial.npz"
    evaluate(cnn, *data, **QUICK, partial=partial, model_sha256="a")
    calls = count_gradients(monkeypatch)
    evaluate(cnn, *data, **QUICK, partial=partial, model_sha256="a")
    assert not calls
    evaluate(cnn, *data, **QUICK, partial=partial, model_sha256="b")
    assert calls
    partial.write_bytes(b"damaged")
    evaluate(cnn, *data, **QUICK, partial=partial, model_sha256="b")


def test_finished_restarts_outlive_an_error(cnn, data, tmp_path, monkeypatch):
    """A full disk, say: whoever gives the same command again loses one restart, not all."""
    settings = QUICK | {"epsilon": 3 / 255, "alpha": 1 / 255, "restarts": 3}
    partial, write, said = tmp_path / "partial.npz", evaluation.write_atomically, []

    def full_disk(path, content):
        if Path(path).exists():
            raise InputError("cannot write: no space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_atomically", full_disk)
        with pytest.raises(InputError, match="no space"):
            evaluate(cnn, *data, **settings, partial=partial)
    resumed = evaluate(cnn, *data, **settings, partial=partial, say=said.append)
    assert said == [f"an interrupted run is resumed from {partial}, 1 restarts done"]
    whole = evaluate(cnn, *data, **settings, say=said.append)
    assert csv(resumed, tmp_path / "resumed") == csv(whole, tmp_path / "whole")
    assert len(said) == 1


def test_progress_ends_at_its_total_and_shows_what_stands(cnn, data):
    seen = []
    result = evaluate(cnn, *data, **QUICK, progress=lambda *now: seen.append(now))
    done, total, standing = seen[-1]
    assert done == total
    assert standing == round(result.summary["robust_accuracy"] * N)
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)


# --- saved models and their files


@pytest.fixture
def saved(cnn, tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    cnn.save(folder / "model.keras")
    return folder


SETTINGS = AttackSettings(steps=3, restarts=2)


def run_saved(folder, data, said=None, **named):
    with open_model(folder) as opened:
        said = [] if said is None else said
        return evaluate_saved(opened, *data, SETTINGS, dataset="toy", say=said.append, **named)


def test_files_say_what_was_done(saved, data):
    result = run_saved(saved, data)
    files = sorted(p.name for p in (saved / "robustness").iterdir())
    assert files == [f"pgd-3-2-true-toy-n60.{end}" for end in ("csv", "json")]
    summary = json.loads((saved / "robustness" / files[1]).read_text())
    assert summary == result.summary
    assert summary["model"] == "net"
    assert len(summary["model_sha256"]) == len(summary["dataset"]["fingerprint"]) == 64
    assert set(summary["versions"]) == {
        "python",
        "tensorflow",
        "keras",
        "adversarial-robustness-toolbox",
        "numpy",
    }
    assert "\n" not in summary["hardware"]


def test_finished_result_is_read_unless_forced(saved, data, monkeypatch):
    first, said = run_saved(saved, data), []
    calls = count_gradients(monkeypatch)
    again = run_saved(saved, data, said)
    assert not calls
    assert "finished before" in said[0]
    assert again.summary == first.summary
    run_saved(saved, data, force=True)
    assert calls


def test_result_of_another_model_is_not_overwritten(saved, cnn, data):
    run_saved(saved, data)
    other = keras.models.clone_model(cnn)
    other.save(saved / "model.keras")
    with pytest.raises(InputError, match="another evaluation"):
        run_saved(saved, data)
    run_saved(saved, data, force=True)


def test_results_of_other_settings_have_other_names():
    names = {
        AttackSettings().stem(1000, "cifar10"): "pgd-50-10-true",
        AttackSettings(labels="predicted").stem(256): "pgd-50-10-predicted-n256",
        AttackSettings(epsilon=4 / 255).stem(1000): "pgd-50-10-true-eps4",
        AttackSettings(epsilon=0.031, alpha=0.003, steps=40, restarts=40).stem(
            1000, "digits"
        ): "pgd-40-40-true-digits-eps7.905-step0.765",
        AttackSettings(seed=3).stem(1000): "pgd-50-10-true-seed3",
    }
    assert list(names) == list(names.values())


# --- refusals


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"epsilon": 300 / 255}, "epsilon"),
        ({"epsilon": -1 / 255}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": -2 / 255}, "alpha"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"labels": "maybe"}, "labels"),
    ],
)
def test_impossible_settings_are_refused(cnn, data, changed, reason):
    with pytest.raises(InputError, match=reason):
        evaluate(cnn, *data, **QUICK | changed)


def test_impossible_images_are_refused(cnn, data):
    x, y = data
    for wrong_x, wrong_y in ((x * 255, y), (x[:0], y[:0]), (x, y[:5]), (x, y / 1), (x[0], y)):
        with pytest.raises(InputError):
            evaluate(cnn, wrong_x, wrong_y, **QUICK)


def test_models_that_do_not_fit_are_refused(data):
    layers = keras.layers

    def model(shape=SHAPE, last=CLASSES):
        return keras.Sequential([layers.Input(shape), layers.Flatten(), layers.Dense(last)])

    x, y = data
    with pytest.raises(InputError, match="takes inputs of shape"):
        evaluate(model((28, 28, 1)), x, y, **QUICK)
    with pytest.raises(InputError, match="3 classes are expected"):
        evaluate(model(last=2), x, y, **QUICK)
    with pytest.raises(InputError, match="10 classes are expected"):
        evaluate(model(last=3), x, y, **QUICK, classes=10)
    with pytest.raises(InputError, match="NaN"):
        evaluate(lambda x, training=False: x[:, :3, 0, 0] * np.nan, x, y, **QUICK)
    with pytest.raises(InputError, match="cannot be compiled"):
        evaluate(lambda x, training=False: x.numpy()[:, :3, 0, 0], x, y, **QUICK)
    with pytest.raises(InputError, match="cannot be called"):
        evaluate(lambda x, training=False: 1 / 0, x, y, **QUICK)


def test_folder_that_cannot_be_written_is_refused_before_the_attack(
    saved, data, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    calls = count_gradients(monkeypatch)
    with pytest.raises(InputError, match="cannot write"):
        run_saved(saved, data, out=tmp_path / "file")
    assert not calls


def test_defaults_are_the_published_attack():
    settings = evaluation.AttackSettings()
    assert settings.epsilon == pytest.approx(8 / 255)
    assert settings.alpha == pytest.approx(2 / 255)
    assert (settings.steps, settings.restarts, settings.labels) == (50, 10, "true")


# --------------------------------------------------------------------------- attacks by name

TEN = 10


@pytest.fixture(scope="module")
def ten_classes():
    """A small CNN of ten classes and 40 images of which it gets most right."""
    keras.utils.set_random_seed(4)
    generator = np.random.default_rng(5)
    y = np.arange(40) % TEN
    centres = generator.uniform(0.2, 0.8, (TEN, *SHAPE))
    x = np.clip(centres[y] + generator.normal(0, 0.1, (40, *SHAPE)), 0, 1).astype("float32")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input(SHAPE),
            layers.Conv2D(8, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(TEN),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(x, y, epochs=12, verbose=0)
    return model, x, y


@pytest.fixture
def short_suite(monkeypatch):
    """The suite's members with fewer steps."""
    short = {
        "apgd-ce": {"alpha": None, "steps": 10, "restarts": 1},
        "apgd-t": {"alpha": None, "steps": 6, "restarts": 9},
        "square": {"alpha": None, "steps": 60, "restarts": 1},
        "pgd": {"alpha": ALPHA, "steps": 10, "restarts": 3},
    }
    for name, defaults in short.items():
        monkeypatch.setitem(results.DEFAULTS, name, defaults)


SUITE_EPSILON = 0.045  # fells some of the images, by more than one member


def test_suite_is_never_above_its_members(ten_classes, short_suite):
    suite = evaluate(*ten_classes, attack="suite", epsilon=SUITE_EPSILON)
    stands = suite.images["label"] == suite.images["adversarial_prediction"]
    assert 0 < stands.sum() < suite.summary["clean_accuracy"] * 40
    for name in results.SUITE:
        alone = evaluate(*ten_classes, attack=name, epsilon=SUITE_EPSILON)
        alone_stands = alone.images["label"] == alone.images["adversarial_prediction"]
        assert not (stands & ~alone_stands).any(), name


def test_suite_can_be_recounted_from_its_csv(ten_classes, short_suite, tmp_path):
    result = evaluate(*ten_classes, attack="suite", epsilon=SUITE_EPSILON)
    result.write(tmp_path)
    rows = pd.read_csv(tmp_path / f"{result.stem}.csv")
    clean = rows.label == rows.clean_prediction
    robust = clean & (rows.label == rows.adversarial_prediction)
    fell = rows.felled_by.value_counts()

    summary = result.summary
    assert summary["robust_accuracy"] == robust.mean()
    assert summary["clean_accuracy"] == clean.mean()
    standing = clean.sum()
    for member in summary["attack"]["members"]:
        assert member["fell"] == fell.get(member["name"], 0)
        assert member["attacked"] == standing
        standing -= member["fell"]
    assert standing == robust.sum()
    assert (rows.felled_by.notna() == (clean & ~robust)).all()


def test_interrupted_suite_repeats_no_finished_work(
    ten_classes, short_suite, tmp_path, monkeypatch
):
    whole = evaluate(*ten_classes, attack="suite", epsilon=SUITE_EPSILON)
    calls = []
    original = evaluation._State.save

    def save(self, path, key):
        original(self, path, key)
        calls.append(self.units_done)
        if self.units_done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation._State, "save", save)
    partial = tmp_path / "partial.npz"
    kwargs = {"attack": "suite", "epsilon": SUITE_EPSILON, "partial": partial}
    with pytest.raises(KeyboardInterrupt):
        evaluate(*ten_classes, **kwargs)
    with np.load(partial) as kept:
        done = int(kept["gradient_calls"])
    monkeypatch.setattr(evaluation._State, "save", original)

    counted = []
    loss_gradient = CompiledClassifier.loss_gradient
    differentiable = CompiledClassifier.differentiable

    def count(self, *args, **kwargs):
        counted.append(1)
        return loss_gradient(self, *args, **kwargs)

    def count_compiled(self, loss):
        compiled = differentiable(self, loss)

        def call(*args):
            counted.append(1)
            return compiled(*args)

        return call

    monkeypatch.setattr(CompiledClassifier, "loss_gradient", count)
    monkeypatch.setattr(CompiledClassifier, "differentiable", count_compiled)
    resumed = evaluate(*ten_classes, **kwargs)
    assert 0 < done and done + len(counted) == whole.summary["gradient_calls"]
    assert csv(resumed, tmp_path / "resumed") == csv(whole, tmp_path / "whole")


@pytest.mark.parametrize("attack", results.ATTACKS)
def test_every_attack_keeps_its_promises(ten_classes, short_suite, attack):
    model, x, y = ten_classes
    kwargs = {"steps": 8} if attack in ("deepfool", "cw") else {}
    result = evaluate(model, x[:20], y[:20], attack=attack, epsilon=0.1, **kwargs)
    assert np.abs(result.x_adv - x[:20]).max() <= 0.1 + 1e-6
    assert result.summary["robust_accuracy"] < result.summary["clean_accuracy"]
    assert result.summary["attack"]["name"] == attack
    again = model.predict(result.x_adv, verbose=0).argmax(axis=-1)
    np.testing.assert_array_equal(again, result.images["adversarial_prediction"])
    unchanged = evaluate(model, x[:20], y[:20], attack=attack, epsilon=0, **kwargs)
    assert unchanged.summary["robust_accuracy"] == unchanged.summary["clean_accuracy"]


def test_fgsm_is_one_signed_step_from_the_clean_image(ten_classes):
    model, x, y = ten_classes
    result = evaluate(model, x, y, attack="fgsm", epsilon=0.02)
    with tf.GradientTape() as tape:
        images = tf.constant(x)
        tape.watch(images)
        loss = keras.losses.sparse_categorical_crossentropy(y, model(images), from_logits=True)
    sign = np.sign(tape.gradient(loss, images))
    attacked = np.clip(x + 0.02 * sign, 0, 1)
    clean = (result.images["label"] == result.images["clean_prediction"]).to_numpy()
    np.testing.assert_allclose(result.x_adv[clean], attacked[clean], atol=1e-6)


def test_a_hidden_adversarial_example_is_found():
    """A gradient of 1e-9 points to one corner of the ball; only there the class changes."""
    generator = np.random.default_rng(7)
    direction = np.sign(generator.normal(size=PIXELS)).astype("float32")
    x = np.full((1, *SHAPE), 0.5, "float32")

    def model(images, training=False):
        along = tf.linalg.matvec(tf.reshape(images - 0.5, (-1, PIXELS)), direction)
        corner = EPSILON * PIXELS
        spike = 100 * tf.nn.relu(along - 0.99 * corner) - 0.1
        return tf.stack([tf.zeros_like(along), spike + 1e-9 * along], axis=-1)

    y = np.array([0])
    for attack in ("pgd", "apgd-ce"):
        found = evaluate(model, x, y, attack=attack, epsilon=EPSILON)
        assert found.summary["robust_accuracy"] == 0, attack
    below = evaluate(model, x, y, epsilon=0.98 * EPSILON)
    assert below.summary["robust_accuracy"] == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attack": "autoattack"}, "must be one of pgd"),
        ({"attack": "suite", "steps": 5}, "chooses its own steps"),
        ({"attack": "square", "alpha": 0.1}, "chooses its own alpha"),
        ({"attack": "fgsm", "steps": 2}, "one step"),
        ({"attack": "deepfool", "restarts": 2}, "nothing random"),
        ({"attack": "suite", "labels": "predicted"}, "labels true"),
        ({"attack": "apgd-t"}, "at least 4 classes"),
    ],
)
def test_impossible_attacks_are_refused(cnn, data, settings, reason):
    with pytest.raises(InputError, match=reason):
        evaluate(cnn, *data, **settings)


def test_more_targets_than_other_classes_are_refused(ten_classes):
    with pytest.raises(InputError, match="allow 9 restarts; got 10"):
        evaluate(*ten_classes, attack="apgd-t", restarts=10)
