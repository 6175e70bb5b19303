"""The evaluator reports what is true: on models whose robust accuracy is known, it is that."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from kaf_study import InputError, evaluation, result_files
from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.registry import ATTACKS, AttackSettings
from kaf_study.evaluation import Execution, Subject, evaluate
from kaf_study.files import locked
from kaf_study.result_files import ImageSet, evaluate_saved
from kaf_study.saved_models import open_model

EPSILON, ALPHA = 8 / 255, 2 / 255
SHAPE, CLASSES, N = (6, 6, 3), 3, 60
PIXELS = 6 * 6 * 3
QUICK = AttackSettings("pgd", EPSILON, ALPHA, steps=6, restarts=3)
WEAK = replace(QUICK, epsilon=3 / 255, alpha=1 / 255)


def predicted(settings):
    return replace(settings, labels="predicted")


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

    result = evaluate(model, x, y, AttackSettings("pgd", radius, 2 * radius, 2, 2))
    assert result.summary["clean_accuracy"] == (margin > 0).mean() == 0.9
    assert result.summary["robust_accuracy"] == (worst > 0).mean()
    assert 0.1 < result.summary["robust_accuracy"] < 0.8
    rows = result.images
    np.testing.assert_array_equal(rows["label"] == rows["adversarial_prediction"], worst > 0)


@pytest.fixture(scope="module")
def true_result(cnn, data):
    return evaluate(cnn, *data, QUICK)


@pytest.fixture(scope="module")
def predicted_result(cnn, data):
    return evaluate(cnn, *data, predicted(QUICK))


def test_three_lines_recount_the_summary(true_result, predicted_result):
    rows, summary = true_result.images, true_result.summary
    clean, kept = rows.label == rows.clean_prediction, rows.label == rows.adversarial_prediction
    assert 0 < (clean & kept).mean() == summary["robust_accuracy"] < clean.mean()
    assert summary["clean_accuracy"] == clean.mean() and summary["n"] == N
    assert (rows.restart.notna() == (clean & ~kept)).all()
    assert (rows["index"] == np.arange(N)).all()
    np.testing.assert_array_equal(true_result.is_robust, clean & kept)
    assert summary["robust_standard_error"] == pytest.approx(
        np.sqrt((clean & kept).var() / N, dtype=float), rel=0.01
    )

    rows, summary = predicted_result.images, predicted_result.summary
    kept = rows.label == rows.adversarial_prediction
    assert kept.mean() == summary["accuracy_under_attack_predicted_labels"]
    wrong = rows.label != rows.clean_prediction
    assert summary["pushed_onto_true_class_predicted_labels"] == (wrong & kept).sum()


def test_attack_stays_within_what_it_is_allowed(cnn, data):
    x, y = data
    before = x.copy()
    result = evaluate(cnn, x, y, QUICK)
    assert 0.9 * EPSILON < result.images["linf"].max() <= EPSILON + 1e-6
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    np.testing.assert_allclose(
        np.abs(result.x_adv - x).reshape(N, -1).max(axis=1), result.images["linf"]
    )
    np.testing.assert_array_equal(x, before)
    assert result.summary["attacked_predictions_not_reproduced"] == 0


def test_attacked_predictions_are_held_against_the_model_that_was_given(cnn, data, monkeypatch):
    """Planted: a twin that is another function, whose verdicts the model itself never repeats."""

    def another(model, some):
        return lambda x, training=False: tf.roll(model(x, training=training), 1, axis=1)

    monkeypatch.setattr(evaluation, "inference_twin", another)
    summary = evaluate(cnn, *data, QUICK).summary
    assert summary["attacked_predictions_not_reproduced"] == N


def test_images_wrong_when_clean_are_not_attacked(true_result):
    rows = true_result.images
    wrong = rows[rows.label != rows.clean_prediction]
    assert len(wrong) > 0
    assert wrong.linf.max() == 0
    assert wrong.restart.isna().all()
    assert (wrong.clean_prediction == wrong.adversarial_prediction).all()


@pytest.mark.parametrize("protocol", ["true", "predicted"])
def test_csv_depends_on_the_seed_alone(cnn, data, protocol, tmp_path):
    settings = replace(QUICK, labels=protocol)

    def written(name, batch_size=16, seed=0):
        execution = Execution(batch_size=batch_size)
        return csv(
            evaluate(cnn, *data, replace(settings, seed=seed), execution=execution), tmp_path / name
        )

    once = written("once")
    assert written("again") == once
    assert written("other batch size", batch_size=25) == once
    assert written("other seed", seed=1) != once


def test_more_restarts_only_lower_it(cnn, data):
    settings = replace(QUICK, epsilon=4 / 255)
    one, many = (evaluate(cnn, *data, replace(settings, restarts=r)).images for r in (1, 5))
    stood_one, stood_many = one.restart.isna(), many.restart.isna()
    assert not (stood_many & ~stood_one).any()
    assert (many.restart[~stood_one] == 1).all()
    np.testing.assert_array_equal(many.iteration[~stood_one], one.iteration[~stood_one])


def passing_through(z_in, z_out):
    """Predicted 1 while the mean pixel lies between, else 0; the gradient always leads upwards."""

    def model(x, training=False):
        mean = tf.reduce_mean(x, axis=(1, 2, 3))
        inside = tf.where((mean > z_in) & (mean < z_out), 1.0, -1.0)
        upwards = 1e-3 * mean
        z = tf.stop_gradient(inside - upwards) + upwards
        return tf.stack([-z, z], axis=-1)

    return model


def test_true_labels_are_judged_at_every_iterate_predicted_ones_at_the_last():
    """Planted: images that are wrong half way up, and right again where the attack ends."""
    model, x = passing_through(0.52, 0.56), np.full((4, *SHAPE), 0.5, "float32")
    y = np.zeros(4, int)
    settings = AttackSettings("pgd", 0.1, 0.02, steps=10, restarts=2)
    true = evaluate(model, x, y, settings)
    assert true.summary["robust_accuracy"] == 0
    assert (true.images["iteration"] < 5).all() and (true.images["restart"] == 1).all()
    last = evaluate(model, x, y, predicted(settings))
    assert last.summary["accuracy_under_attack_predicted_labels"] == 1
    assert last.images["iteration"].isna().all()


def test_of_predicted_labels_the_first_success_is_kept():
    model, x = passing_through(0.55, 1), np.full((4, *SHAPE), 0.5, "float32")
    settings = AttackSettings("pgd", 0.1, 0.02, steps=10, restarts=3, labels="predicted")
    result = evaluate(model, x, np.zeros(4, int), settings)
    assert result.summary["accuracy_under_attack_predicted_labels"] == 0
    assert (result.images["restart"] == 1).all() and (result.images["iteration"] == 10).all()


def test_predicted_labels_count_wrong_images_pushed_onto_their_true_class():
    """Planted: two classes, so that every image moved off a wrong prediction is called robust."""

    def model(x, training=False):
        z = tf.reduce_mean(x, axis=(1, 2, 3)) - 0.5
        return tf.stack([-z, z], axis=-1)

    x = np.full((10, *SHAPE), 0.51, "float32")  # all predicted as 1, all within reach of 0
    y = np.array([1] * 6 + [0] * 4)
    true, pushed = (evaluate(model, x, y, s).summary for s in (QUICK, predicted(QUICK)))
    assert true["clean_accuracy"] == 0.6
    assert true["robust_accuracy"] == 0
    assert pushed["accuracy_under_attack_predicted_labels"] == 0.4
    assert pushed["pushed_onto_true_class_predicted_labels"] == 4
    assert "robust_accuracy" not in pushed


def test_probabilities_are_attacked_as_their_logits(cnn, data, true_result):
    softmax = keras.Sequential([*cnn.layers, keras.layers.Softmax()])
    saturated = keras.Sequential(
        [cnn, keras.layers.Lambda(lambda z: 60 * z), keras.layers.Softmax()]
    )
    plain = true_result
    removed = evaluate(softmax, *data, QUICK)
    assert plain.summary["outputs"] == "logits"
    assert removed.summary["outputs"] == "softmax removed"
    pd.testing.assert_frame_equal(plain.images, removed.images)
    # Behind a saturated softmax nothing would fall; the logits behind it tell the truth.
    revealed = evaluate(saturated, *data, QUICK)
    assert abs(revealed.summary["robust_accuracy"] - plain.summary["robust_accuracy"]) < 0.1

    def function(x, training=False):
        return softmax(x, training=training)

    def spelled_out(x, training=False):
        e = tf.exp(cnn(x, training=training))
        return e / tf.reduce_sum(e, axis=-1, keepdims=True)

    for model, outputs in ((function, "softmax removed"), (spelled_out, "probabilities")):
        hidden = evaluate(model, *data, QUICK)
        assert hidden.summary["outputs"] == outputs
        pd.testing.assert_frame_equal(plain.images, hidden.images)


# --- interruption


class Killed(Exception):
    pass


class Watch:
    """Takes notes of what an evaluation does; dies at one of its steps, if told so."""

    def __init__(self, kill_at=None):
        self.kill_at, self.steps, self.said = kill_at, [], []

    def progress(self, *now):
        self.steps.append(now)
        if len(self.steps) == self.kill_at:
            raise Killed

    def execution(self, partial=None):
        return Execution(16, self.progress, partial, self.said.append)


def watched(model, x, y, settings, partial=None, kill_at=None, **kwargs):
    watch = Watch(kill_at)
    try:
        return evaluate(model, x, y, settings, execution=watch.execution(partial), **kwargs), watch
    except Killed:
        return None, watch


@pytest.mark.parametrize("protocol", ["true", "predicted"])
def test_interrupted_run_resumes_without_repeating_restarts(cnn, data, protocol, tmp_path):
    settings = replace(WEAK, labels=protocol)
    classifier = CompiledClassifier(cnn, CLASSES, SHAPE)
    partial = tmp_path / "partial.npz"
    steps = []  # of 1, 2 and 3 restarts
    for restarts in (1, 2, 3):
        whole, watch = watched(classifier, *data, replace(settings, restarts=restarts))
        steps.append(len(watch.steps))
    assert steps[0] < steps[1] < steps[2]

    killed, _ = watched(classifier, *data, settings, partial, kill_at=steps[1] + 2)
    assert killed is None
    resumed, watch = watched(classifier, *data, settings, partial)
    assert len(watch.steps) == steps[2] - steps[1]  # the third restart, and nothing else
    assert watch.said == [f"an interrupted run is resumed from {partial}, 2 restarts done"]
    assert csv(resumed, tmp_path / "resumed") == csv(whole, tmp_path / "whole")
    np.testing.assert_array_equal(resumed.x_adv, whole.x_adv)
    assert resumed.summary["gradient_calls"] == whole.summary["gradient_calls"] == steps[2]


def test_progress_of_another_evaluation_is_not_taken_over(cnn, data, tmp_path, monkeypatch):
    partial = tmp_path / "partial.npz"
    classifier = CompiledClassifier(cnn, CLASSES, SHAPE)

    def restarts_resumed(settings=WEAK, sha256="a", of=data):
        subject = Subject(model_sha256=sha256)
        _, watch = watched(classifier, *of, settings, partial, subject=subject)
        return not watch.steps

    x, y = data
    assert not restarts_resumed() and restarts_resumed()
    assert not restarts_resumed(sha256="b") and restarts_resumed(sha256="b")
    assert not restarts_resumed(replace(WEAK, seed=1)) and restarts_resumed(replace(WEAK, seed=1))
    assert not restarts_resumed(of=(x[::-1], y[::-1])) and not restarts_resumed()
    for of_the_code in ({"FORMAT": "robustness-2"}, {"versions": lambda: {"tensorflow": "1.0"}}):
        assert restarts_resumed()
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, *of_the_code.popitem())
            assert not restarts_resumed()
        assert not restarts_resumed()
    partial.write_bytes(b"damaged")
    assert not restarts_resumed()
    ran = tmp_path / "ran"
    np.savez(partial, **dict.fromkeys(evaluation._State.__dataclass_fields__, pickled(ran)))
    assert not restarts_resumed() and not ran.exists()


def pickled(path):
    """An array that, where pickles are let in, makes a file as it is read."""

    class Touch:
        def __reduce__(self):
            return Path.touch, (path,)

    return np.array([Touch()], dtype=object)


def test_kept_images_are_no_programs(data, tmp_path):
    ran = tmp_path / "ran"
    np.savez(tmp_path / "images.npz", offset=pickled(ran))
    with pytest.raises(InputError, match="does not hold attacked images"):
        result_files.read_adversarial(tmp_path / "images.npz", data[0])
    assert not ran.exists()
    np.load(tmp_path / "images.npz", allow_pickle=True)["offset"]
    assert ran.exists()


def test_finished_restarts_outlive_an_error(cnn, data, tmp_path, monkeypatch):
    """A full disk, say: whoever gives the same command again loses one restart, not all."""
    partial, write = tmp_path / "partial.npz", evaluation.write_atomically

    def full_disk(path, content):
        if Path(path).exists():
            raise InputError("cannot write: no space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_atomically", full_disk)
        with pytest.raises(InputError, match="no space"):
            watched(cnn, *data, WEAK, partial)
    resumed, watch = watched(cnn, *data, WEAK, partial)
    assert watch.said == [f"an interrupted run is resumed from {partial}, 1 restarts done"]
    whole, watch = watched(cnn, *data, WEAK)
    assert csv(resumed, tmp_path / "resumed") == csv(whole, tmp_path / "whole")
    assert not watch.said


def test_progress_ends_at_its_total_and_shows_what_stands(cnn, data):
    result, watch = watched(cnn, *data, WEAK)
    done, total, standing = watch.steps[-1]
    assert done == total == result.images["clean_prediction"].eq(data[1]).sum() * 3 * 7
    assert 0 < standing == result.is_robust.sum()
    assert [d for d, _, _ in watch.steps] == sorted(d for d, _, _ in watch.steps)


# --- saved models and their files


@pytest.fixture
def saved(cnn, tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    cnn.save(folder / "model.keras")
    return folder


SETTINGS = AttackSettings(steps=3, restarts=2)


def run_saved(folder, data, watch=None, settings=SETTINGS, **named):
    execution = (watch or Watch()).execution()
    with open_model(folder) as opened:
        images = ImageSet(*data, "toy")
        return evaluate_saved(opened, images, settings, execution=execution, **named)


def test_files_say_what_was_done(saved, data):
    result = run_saved(saved, data)
    files = sorted(p.name for p in (saved / "robustness").iterdir())
    assert files == [f"pgd-3-2-true-toy-n60.{end}" for end in ("csv", "json")]
    summary = json.loads((saved / "robustness" / files[1]).read_text())
    assert summary == result.summary
    assert summary["model"] == "net" and summary["dataset"]["name"] == "toy"
    assert len(summary["model_sha256"]) == len(summary["dataset"]["fingerprint"]) == 64
    assert {"python", "tensorflow", "keras", "numpy"} <= set(summary["versions"])
    assert "\n" not in summary["hardware"]
    attack = summary["attack"]
    assert (attack["name"], attack["steps"], attack["restarts"]) == ("pgd", 3, 2)
    assert (attack["epsilon"], attack["alpha"], attack["batch_size"]) == (8 / 255, 2 / 255, 16)


def test_finished_result_is_read_unless_forced(saved, data):
    first, again, forced = Watch(), Watch(), Watch()
    result = run_saved(saved, data, first)
    assert run_saved(saved, data, again).summary == result.summary
    assert first.steps and not again.steps
    assert "net: finished before" in again.said[0]
    run_saved(saved, data, forced, force=True)
    assert len(forced.steps) == len(first.steps)


def test_a_finished_result_that_is_being_repeated_is_left_alone(saved, data):
    """Its partial state is the other process', whatever was finished before."""
    result = run_saved(saved, data)
    partial = saved / "robustness" / f".{result.stem}.partial.npz"
    with locked(partial.with_name(f".{result.stem}.lock")):
        partial.write_bytes(b"of the other process")
        with pytest.raises(InputError, match="in use by process"):
            run_saved(saved, data)
        assert partial.exists()
    run_saved(saved, data)
    assert not partial.exists()  # of nobody


def test_a_result_that_finishes_meanwhile_is_not_attacked_anew(saved, data, monkeypatch):
    path = saved / "robustness" / f"{run_saved(saved, data).stem}.json"
    hidden = path.rename(path.with_suffix(".hidden"))

    @contextmanager
    def locked_late(lock):
        with locked(lock):
            hidden.rename(path)  # the other process finished just before it let go
            yield

    monkeypatch.setattr(result_files, "locked", locked_late)
    watch = Watch()
    run_saved(saved, data, watch)
    assert not watch.steps and "finished before" in watch.said[0]


def test_result_of_another_model_is_not_overwritten(saved, cnn, data):
    run_saved(saved, data)
    x, y = data
    with pytest.raises(InputError, match=r"another evaluation \(images "):
        run_saved(saved, (x[::-1].copy(), y))
    other = keras.models.clone_model(cnn)
    other.save(saved / "model.keras")
    with pytest.raises(InputError, match=r"another evaluation \(model sha256 "):
        run_saved(saved, data)
    run_saved(saved, data, force=True)


def test_attacked_images_are_kept_when_asked_for(saved, data):
    assert run_saved(saved, data).x_adv is not None
    assert run_saved(saved, data).x_adv is None  # read; its images were not saved
    again = Watch()
    result = run_saved(saved, data, again, keep_images=True)
    assert again.steps and "attacked again" in again.said[0]
    path = result_files.save_adversarial(result, data[0], saved / "robustness")
    read = Watch()
    kept = run_saved(saved, data, read, keep_images=True)
    assert not read.steps
    assert np.abs(kept.x_adv - result.x_adv).max() <= QUICK.epsilon * 2**-11
    assert np.abs(kept.x_adv - data[0]).max() > 0.99 * QUICK.epsilon
    run_saved(saved, data, force=True)
    assert not path.exists()  # images of an earlier result
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="does not hold attacked images"):
        run_saved(saved, data, keep_images=True)


# --- images that stand under true labels, and so under predicted ones


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_what_stands_under_true_labels_need_not_be_attacked_again(cnn, data, attack, tmp_path):
    settings = WEAK if attack == "pgd" else AttackSettings(attack, 3 / 255)
    classifier = CompiledClassifier(cnn, CLASSES, SHAPE)
    true = evaluate(classifier, *data, settings)
    whole = evaluate(classifier, *data, predicted(settings))
    spared = evaluate(classifier, *data, predicted(settings), execution=Execution(under_true=true))
    assert csv(spared, tmp_path / "spared") == csv(whole, tmp_path / "whole")
    stands = true.is_robust
    assert 0 < spared.summary["standing_under_true_labels"] == stands.sum() < N
    np.testing.assert_array_equal(spared.x_adv[~stands], whole.x_adv[~stands])
    np.testing.assert_array_equal(spared.x_adv[stands], data[0][stands])  # nothing was done to them
    assert "standing_under_true_labels" not in whole.summary | true.summary


def test_a_run_that_spared_images_is_not_resumed_without_that(cnn, data, tmp_path):
    partial, true = tmp_path / "partial.npz", evaluate(cnn, *data, WEAK)

    def sparing(watch):
        execution = replace(watch.execution(partial), under_true=true)
        return evaluate(cnn, *data, predicted(WEAK), execution=execution)

    whole = Watch()
    sparing(whole)
    partial.unlink()
    with pytest.raises(Killed):
        sparing(Watch(kill_at=len(whole.steps)))
    kept, watch = partial.read_bytes(), Watch()
    sparing(watch)
    assert "resumed" in watch.said[0]
    partial.write_bytes(kept)
    _, watch = watched(cnn, *data, predicted(WEAK), partial)
    assert not watch.said


def test_saved_models_spare_what_stands_in_their_result(saved, data, tmp_path):
    folder, settings = saved / "robustness", predicted(SETTINGS)
    whole = run_saved(saved, data, settings=settings, out=tmp_path)
    assert "standing_under_true_labels" not in whole.summary

    true, watch = run_saved(saved, data), Watch()
    spared = run_saved(saved, data, watch, settings)
    stands = int(true.is_robust.sum())
    assert spared.summary["standing_under_true_labels"] == stands > 0
    path = folder / "pgd-3-2-true-toy-n60.json"
    assert watch.said == [f"net: the {stands} images that stand in {path} are not attacked again"]
    pd.testing.assert_frame_equal(spared.images, whole.images)
    again = Watch()
    assert run_saved(saved, data, again, settings).summary == spared.summary
    assert "finished before" in again.said[0]

    for named in ({"force": True}, {"force": True, "keep_images": True}):
        repeated = run_saved(saved, data, settings=settings, **named)
        assert "standing_under_true_labels" not in repeated.summary


def test_the_result_of_another_model_spares_nothing(saved, cnn, data):
    run_saved(saved, data)
    keras.models.clone_model(cnn).save(saved / "model.keras")
    watch = Watch()
    result = run_saved(saved, data, watch, predicted(SETTINGS))
    assert "standing_under_true_labels" not in result.summary and not watch.said


# --- refusals


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, 10**12])
def test_impossible_batches_are_refused(batch_size):
    with pytest.raises(InputError, match="batch size must be a whole number from 1 to"):
        Execution(batch_size=batch_size)


def test_impossible_images_are_refused(cnn, data):
    x, y = data
    for wrong_x, wrong_y in ((x * 255, y), (x[:0], y[:0]), (x, y[:5]), (x, y / 1), (x[0], y)):
        with pytest.raises(InputError):
            evaluate(cnn, wrong_x, wrong_y, QUICK)
    with pytest.raises(InputError, match="labels count from 0, got -1"):
        evaluate(cnn, x, y - 1, QUICK)


def test_models_that_do_not_fit_are_refused(data):
    layers = keras.layers

    def model(shape=SHAPE, last=CLASSES):
        return keras.Sequential([layers.Input(shape), layers.Flatten(), layers.Dense(last)])

    x, y = data
    with pytest.raises(InputError, match="takes inputs of shape"):
        evaluate(model((28, 28, 1)), x, y, QUICK)
    with pytest.raises(InputError, match="3 classes are expected"):
        evaluate(model(last=2), x, y, QUICK)
    with pytest.raises(InputError, match="10 classes are expected"):
        evaluate(model(last=3), x, y, QUICK, subject=Subject(classes=10))
    with pytest.raises(InputError, match="NaN"):
        evaluate(lambda x, training=False: x[:, :3, 0, 0] * np.nan, x, y, QUICK)
    with pytest.raises(InputError, match="cannot be compiled"):
        evaluate(lambda x, training=False: x.numpy()[:, :3, 0, 0], x, y, QUICK)
    with pytest.raises(InputError, match="cannot be called"):
        evaluate(lambda x, training=False: 1 / 0, x, y, QUICK)


def test_labels_that_the_model_has_no_class_for_are_refused(cnn, data):
    x, y = data[0][:20], data[1][:20].copy()
    y[-1] = CLASSES
    compiled = {"model": CompiledClassifier(cnn, CLASSES, SHAPE)}
    for known in (compiled, {"model": cnn, "subject": Subject(classes=CLASSES)}):
        with pytest.raises(InputError, match="a label 3, the model's classes are 0 to 2"):
            evaluate(x=x, y=y, settings=QUICK, **known)
    with pytest.raises(InputError, match="4 classes are expected"):
        evaluate(cnn, x, y, QUICK)


def test_folder_that_cannot_be_written_is_refused_before_the_attack(saved, data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    watch = Watch()
    with pytest.raises(InputError, match="cannot write"):
        run_saved(saved, data, watch, out=tmp_path / "file")
    assert not watch.steps


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
    short = {"apgd-ce": 10, "apgd-t": 6, "square": 60, "pgd": 10}
    for name, steps in short.items():
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], steps=steps))
    monkeypatch.setitem(ATTACKS, "pgd", replace(ATTACKS["pgd"], restarts=3))
    return AttackSettings("suite", SUITE_EPSILON)


SUITE_EPSILON = 0.045  # fells some of the images, by more than one member


def test_suite_is_never_above_its_members_and_can_be_recounted(ten_classes, short_suite, tmp_path):
    model, x, y = ten_classes
    classifier = CompiledClassifier(model, TEN, SHAPE)
    suite = evaluate(classifier, x, y, short_suite)
    stands = np.asarray(suite.is_robust)
    assert 0 < stands.sum() < suite.summary["clean_accuracy"] * len(x)
    for member in short_suite.members:
        assert not (stands & ~np.asarray(evaluate(classifier, x, y, member).is_robust)).any()

    suite.write(tmp_path)
    rows = pd.read_csv(tmp_path / f"{suite.stem}.csv")
    clean = rows.label == rows.clean_prediction
    robust = clean & (rows.label == rows.adversarial_prediction)
    fell = rows.felled_by.value_counts()
    assert suite.summary["robust_accuracy"] == robust.mean()
    standing = clean.sum()
    for settings, member in zip(
        short_suite.members, suite.summary["attack"]["members"], strict=True
    ):
        assert member["name"] == settings.attack and member["steps"] == settings.steps
        assert member["fell"] == fell.get(member["name"], 0)
        assert member["attacked"] == standing
        standing -= member["fell"]
    assert standing == robust.sum() and len(fell) > 1
    assert (rows.felled_by.notna() == (clean & ~robust)).all()


def test_with_four_classes_targeted_attacks_aim_at_three(ten_classes, short_suite):
    model, x, y = ten_classes
    x, y = x[y < 4], y[y < 4]

    def four(x, training=False):
        return model(x, training=training)[:, :4]

    members = evaluate(four, x, y, short_suite).summary["attack"]["members"]
    assert {m["name"]: m["restarts"] for m in members} == {
        "apgd-ce": 1,
        "apgd-t": 3,
        "square": 1,
        "pgd": 3,
    }
    assert evaluate(four, x[:2], y[:2], "apgd-t").summary["attack"]["restarts"] == 3


def test_interrupted_suite_repeats_no_finished_work(ten_classes, short_suite, tmp_path):
    model, x, y = ten_classes
    classifier, partial = CompiledClassifier(model, TEN, SHAPE), tmp_path / "partial.npz"
    whole, watch = watched(classifier, x, y, short_suite)
    watched(classifier, x, y, short_suite, partial, kill_at=len(watch.steps) * 2 // 3)
    with np.load(partial) as kept:
        done, calls = int(kept["units_done"]), int(kept["gradient_calls"])
    assert 2 < done < 14
    before = classifier.gradient_calls
    resumed, after = watched(classifier, x, y, short_suite, partial)
    assert after.said == [f"an interrupted run is resumed from {partial}, {done} restarts done"]
    # One more looks whether there is a gradient at all.
    assert classifier.gradient_calls - before == whole.summary["gradient_calls"] - calls + 1
    assert resumed.summary["gradient_calls"] == whole.summary["gradient_calls"]
    assert csv(resumed, tmp_path / "resumed") == csv(whole, tmp_path / "whole")


def test_at_radius_0_nothing_falls(ten_classes):
    model, x, y = ten_classes
    classifier = CompiledClassifier(model, TEN, SHAPE)
    for name, own in ATTACKS.items():
        if not own.members:
            settings = AttackSettings(name, 0.0, steps=min(own.steps, 4), restarts=1)
            result = evaluate(classifier, x[:20], y[:20], settings)
            np.testing.assert_array_equal(result.is_robust, result.is_clean, err_msg=name)
            np.testing.assert_array_equal(result.x_adv, x[:20], err_msg=name)


def test_an_attack_can_be_named_instead_of_its_settings(ten_classes):
    model, x, y = ten_classes
    assert evaluate(model, x[:3], y[:3], "fgsm").summary["attack"]["name"] == "fgsm"


def test_a_model_without_a_gradient_is_attacked_by_what_sees_its_logits_alone(ten_classes):
    model, x, y = ten_classes

    def steps_of_grey(images, training=False):
        return model(tf.round(64 * images) / 64)  # no gradient passes through a rounding

    classifier = CompiledClassifier(steps_of_grey, TEN, SHAPE)
    square = evaluate(classifier, x, y, AttackSettings("square", 0.2, steps=60))
    assert square.summary["robust_accuracy"] < square.summary["clean_accuracy"]
    assert square.summary["gradient_calls"] == classifier.gradient_calls == 0
    for attack in ("pgd", "suite"):
        with pytest.raises(InputError, match="no gradient passes"):
            evaluate(classifier, x, y, attack)


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
        found = evaluate(model, x, y, attack)
        assert found.summary["robust_accuracy"] == 0, attack
    below = evaluate(model, x, y, AttackSettings(epsilon=0.98 * EPSILON))
    assert below.summary["robust_accuracy"] == 1
