"""How robust a classifier is: an attack, a label protocol, and what stands, image by image.

    from kaf_study.evaluation import evaluate
    evaluate(model, x, y).summary["robust_accuracy"]

Two label protocols, never to be confused (`--labels`):

- `true`, the real figure. The attack raises the loss of the true label. An image is robust if it
  is classified correctly when clean and at every iterate of every restart, random starts included.
  That is at least as strong as judging only the last iterates, as ART does. Images that are wrong
  when clean are not robust and are not attacked.
- `predicted`, only for comparison with figures obtained by calling ART without labels. The attack
  raises the loss of the model's own clean prediction, for all images, also those that are wrong
  when clean. As ART judges: a restart succeeds if its last iterate is predicted otherwise than
  the clean image; the first success is kept (ART keeps the last; starts are drawn alike, so
  neither is the stronger). The score counts last predictions that equal the true label, and so
  also wrong images that were pushed onto their true class. It is therefore too
  high, and every key of the summary that holds it ends in `_predicted_labels`. (The published
  evaluation, ART 1.3.3, kept the best whole run of its restarts; this is per image, as ART is now.)
  An image that stands under true labels is attacked alike here, its prediction being its label:
  where a saved model has the result under true labels, `kaf_study.result_files` takes such images
  from there.

Attacks (`kaf_study.attacks.registry`): `pgd` unless told otherwise. Three run several, each on what
the ones before left standing, and an image is robust if it stands under all of them, the worst case
per image: `autoattack`, the standard version (Croce & Hein 2020); `rapid`, which comes near its
verdict at a fraction of its cost and is not it; `suite`, of earlier results, which has PGD where
AutoAttack has FAB, and 1,000 queries of Square where it has 5,000.
"""

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

from kaf_study import InputError
from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.loop import BatchAttack, Run, check_perturbation
from kaf_study.attacks.registry import MOST_IMAGES_TOGETHER, AttackSettings, check_count
from kaf_study.datasets import fingerprint
from kaf_study.files import make_writable, write_atomically
from kaf_study.fused_layers import inference_twin
from kaf_study.records import (
    FORMAT,
    Evaluation,
    counted,
    hardware,
    is_clean,
    read_results,
    versions,
)
from kaf_study.saved_models import LOGITS, logits_of

__all__ = ["AttackSettings", "Evaluation", "evaluate", "read_results"]

HOW_COUNTED = {
    "true": (
        "robust: correct when clean and at every iterate of every restart, random starts included; "
        "the loss of the true label is raised"
    ),
    "predicted": (
        "NOT a robust accuracy; for comparison with figures from ART called without labels: the "
        "loss of the clean prediction is raised for all images, each restart is judged at its last "
        "iterate, and an attacked prediction equal to the true label counts, also of images that "
        "were wrong when clean"
    ),
}


# --------------------------------------------------------------------------- the evaluation


@dataclass(frozen=True)
class Subject:
    """What a record says of model and images that the arrays do not; None: unknown.

    classes: the number of outputs that the model must have.
    """

    dataset: str | None = None
    classes: int | None = None
    model: str | None = None
    model_sha256: str | None = None


@dataclass(frozen=True)
class Execution:
    """How an evaluation is run and watched; nothing here changes its verdicts.

    batch_size: images attacked together.
    progress: called as progress(done, total, standing), done and total in image iterations.
    partial: path of a file that keeps the state after each restart of each attack. If it exists and
        belongs to this evaluation, its restarts are not repeated; it is left for the caller to
        remove.
    say: called with one line about what is re-used, resumed, or special about the model.
    under_true: the result of the same attack on the same model and images under true labels. The
        images that stand in it are not attacked again under predicted ones.
    """

    batch_size: int = 128
    progress: Callable[[int, int, int], None] | None = None
    partial: Path | None = None
    say: Callable[[str], None] = lambda line: None
    under_true: Evaluation | None = None

    def __post_init__(self):
        check_count("batch size", self.batch_size, 1, MOST_IMAGES_TOGETHER)


def evaluate(
    model: Callable,
    x: np.ndarray,
    y: np.ndarray,
    settings: AttackSettings | str = "pgd",
    *,
    subject: Subject = Subject(),
    execution: Execution = Execution(),
) -> Evaluation:
    """Attack a classifier and count what stands; the module's first lines say how.

    Args:
        model: Keras model, or callable f(x, training=False), giving logits or probabilities; or a
            CompiledClassifier, which spares compiling it again.
        x: images (N, H, W, C), float32 in [0, 1]. y: true labels (N,), int.
        settings: or the name of an attack, which is then run with its defaults.

    Returns:
        An Evaluation; the same in every figure for the same model, images, settings and seed.

    Raises:
        InputError: the model or the images cannot be used, or the settings not with them.
    """
    if isinstance(settings, str):
        settings = AttackSettings(settings)
    x, y = checked_images(x, y)
    data = fingerprint(x, y)
    classifier, outputs = compiled(model, x, y, subject.classes, execution.batch_size)
    clean = clean_logits(classifier, x, execution.batch_size).argmax(axis=-1)
    if settings.needs_gradient:
        classifier.check_gradient(x[:8], y[:8])
    settings = settings.fitted(classifier.classes)
    members = settings.members_for(classifier.classes)
    units = _units(members, classifier)

    stood = _standing(execution.under_true, settings, y)
    key = _key(settings, data, subject.model_sha256, clean, stood)
    state = _State.resume(execution, key) or _State.start(key, x, clean, len(members))
    if execution.partial is not None:
        make_writable(Path(execution.partial).parent)  # or a restart would be attacked in vain
    _run_attacks(units, x, y, clean, settings, state, execution, stood)

    linf = check_perturbation(x, state.x_adv, settings.epsilon)
    if execution.under_true is not None:
        linf = np.where(stood, execution.under_true.images["linf"].astype(linf.dtype), linf)
    if fingerprint(x, y) != data:
        raise RuntimeError("the attack changed the images it was given")
    again = classifier.predict_as_given(state.x_adv, execution.batch_size).argmax(axis=-1)

    images = _image_table(y, clean, settings, state, linf)
    summary = _summary(settings, members, images, state, subject, data, execution.batch_size) | {
        "outputs": outputs,
        # Not 0: rounding at a decision boundary; many: a randomised model, or a twin unlike it.
        "attacked_predictions_not_reproduced": int((again != state.prediction).sum()),
        "gradient_calls": state.gradient_calls,  # batches; interrupted restarts not counted
        "seconds": round(float(state.seconds.sum()), 1),
    }
    if stood.any():
        summary["standing_under_true_labels"] = int(stood.sum())  # and not attacked again
    return Evaluation(images, summary, state.x_adv)


def checked_images(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images as float32 and labels as int64, refused with a reason where they are neither."""
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 4 or len(x) == 0 or y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise InputError(
            "expected images (N, H, W, C) with whole-number labels (N,), N at least 1; "
            f"got {x.shape} and {y.shape} of {y.dtype}"
        )
    if y.min() < 0:
        raise InputError(f"labels count from 0, got {y.min()}; leave out images without a class")
    x, y = x.astype("float32", copy=False), y.astype("int64", copy=False)
    if not np.all((x >= 0) & (x <= 1)):
        raise InputError(
            f"images must lie in [0, 1], got {x.min():g} to {x.max():g}; divide pixels by 255"
        )
    return x, y


def compiled(
    model: Callable, x: np.ndarray, y: np.ndarray, classes: int | None, batch_size: int
) -> tuple[CompiledClassifier, str]:
    """What is attacked, and what its outputs are; refused where they do not fit images and labels.

    Args:
        model, x, y: as of `evaluate`. classes: as of `Subject`.
    """
    if isinstance(model, CompiledClassifier):
        classifier, outputs = model, LOGITS
    else:
        classifier, outputs = _compiled(model, x, y, classes, batch_size)
    if y.max() >= classifier.classes:
        raise InputError(
            f"there is a label {y.max()}, the model's classes are 0 to "
            f"{classifier.classes - 1}; choose the data set it was trained on with --dataset"
        )
    return classifier, outputs


def _compiled(model, x, y, classes, batch_size):
    _check_input_shape(model, x.shape[1:])
    some = x[:batch_size]
    with _one_line(f"the model cannot be called on images {x.shape[1:]}"):
        shape = np.shape(model(tf.constant(some), training=False))
    wanted = classes or int(y.max()) + 1
    fits = len(shape) == 2 and (shape[1] == classes if classes else shape[1] >= max(2, wanted))
    if not fits:
        raise InputError(
            f"the model gives outputs of shape {('N', *shape[1:])} where {wanted} classes are "
            "expected; choose the data set it was trained on with --dataset"
        )
    with _one_line("the model cannot be compiled by TensorFlow"):
        logits, outputs = logits_of(model, some)
        twin = inference_twin(logits, some)
        classifier = CompiledClassifier(twin, int(shape[1]), x.shape[1:], given=logits)
        classifier.predict(some, batch_size)
    return classifier, outputs


def clean_logits(classifier: CompiledClassifier, x: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits (N, classes) of the clean images; refused where they are not finite."""
    logits = classifier.predict(x, batch_size)
    if not np.all(np.isfinite(logits)):
        raise InputError("the model gives NaN or infinite outputs on clean images; train it again")
    return logits


@contextlib.contextmanager
def _one_line(what):
    """Whatever a foreign model raises becomes one InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split())[:160]}") from None


def _check_input_shape(model, image_shape):
    try:
        shape = model.input_shape
    except AttributeError:  # a plain function, or a model that was never built
        return
    if not isinstance(shape, (tuple, list)):
        return
    fits = len(shape) == 1 + len(image_shape) and all(
        has is None or has == needs for has, needs in zip(shape, (None, *image_shape), strict=True)
    )
    if not fits:
        raise InputError(
            f"the model takes inputs of shape {tuple(shape)}, the images are "
            f"{(None, *image_shape)}; give a model for such images or another --dataset"
        )


def _standing(under_true: Evaluation | None, settings: AttackSettings, y: np.ndarray) -> np.ndarray:
    """(N,) bool: the images that an evaluation under true labels found standing."""
    if under_true is None or settings.labels == "true":
        return np.zeros(len(y), bool)
    return under_true.is_robust.to_numpy()


def _units(
    members: tuple[AttackSettings, ...], classifier: CompiledClassifier
) -> list[tuple[BatchAttack, int, int]]:
    """What is run, and saved when done: (attack, number of its member, restart), in order."""
    attacks = [member.made_for(classifier) for member in members]
    return [
        (attacks[number], number, restart)
        for number, member in enumerate(members)
        for restart in range(1, int(member.restarts or 0) + 1)
    ]


def _run_attacks(
    units: list[tuple[BatchAttack, int, int]],
    x: np.ndarray,
    y: np.ndarray,
    clean: np.ndarray,
    settings: AttackSettings,
    state: "_State",
    execution: Execution,
    stood: np.ndarray,
) -> None:
    """Run the restarts that `state` does not have yet; it is saved after each one.

    stood (N,): images that need no attack, because it is known that they stand.
    """
    is_true = settings.labels == "true"
    targets = y if is_true else clean
    # True labels: an image that is wrong when clean is lost already.
    standing = (clean == y if is_true else ~stood) & (state.felled_by < 0)
    meter = _Meter(execution.progress, units, standing, state)
    for attack, number, restart in units[state.units_done :]:
        began, calls = time.monotonic(), attack.classifier.gradient_calls
        index = np.flatnonzero(standing)
        run = attack.run(
            x[index],
            targets[index],
            index,
            restart,
            seed=settings.seed,
            batch_size=execution.batch_size,
            judge_every=is_true,
            progress=meter.step,
        )
        state.add(index, run, number, restart)
        state.seconds[number] += time.monotonic() - began
        state.gradient_calls += attack.classifier.gradient_calls - calls
        state.save(execution.partial)
        standing &= state.felled_by < 0


class _Meter:
    """Turns the steps of a run into progress(done, total, standing), over all that is to be run."""

    def __init__(self, progress, units, standing, state):
        self.progress, self.state = progress, state
        self.standing = int(standing.sum())
        self.lengths = [attack.steps + 1 for attack, *_ in units]
        self.total = self.standing * sum(self.lengths[state.units_done :])
        self.done = 0

    def step(self, advanced, fell):
        self.done += advanced + fell * sum(self.lengths[self.state.units_done + 1 :])
        self.standing -= fell
        if self.progress is not None:
            self.progress(self.done, self.total, self.standing)


@dataclass
class _State:
    """Where the attack on N images is, after a number of whole restarts.

    felled_by (N,): number of the member that felled an image, -1 where it stands. restart and
    iteration (N,) tell when; they mean nothing where it stands. seconds (members,).
    """

    key: str  # names the evaluation
    x_adv: np.ndarray
    prediction: np.ndarray
    restart: np.ndarray
    iteration: np.ndarray
    felled_by: np.ndarray
    seconds: np.ndarray
    units_done: int = 0
    gradient_calls: int = 0

    @classmethod
    def start(cls, key: str, x: np.ndarray, clean: np.ndarray, members: int) -> "_State":
        zeros = np.zeros(len(x), int)
        nobody = np.full(len(x), -1)
        return cls(key, x.copy(), clean.copy(), zeros, zeros.copy(), nobody, np.zeros(members))

    def add(self, index: np.ndarray, run: Run, member: int, restart: int) -> None:
        """Take over what a run did to the images at `index`."""
        self.x_adv[index] = run.x_adv
        self.prediction[index] = run.predictions
        self.restart[index] = restart
        self.iteration[index] = run.iterations
        self.felled_by[index[run.fell]] = member
        self.units_done += 1

    def save(self, path: Path | None) -> None:
        if path is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def resume(cls, execution: Execution, key: str) -> "_State | None":
        """The state kept by an interrupted run; None if there is none, or that of something else.

        `key` names the evaluation.
        """
        path = execution.partial
        if path is None or not Path(path).is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                fields = {name: kept[name] for name in cls.__dataclass_fields__}
        except Exception:  # whatever a damaged file raises: begin again
            return None
        if str(fields["key"]) != key:
            return None
        for name, kind in (("key", str), ("units_done", int), ("gradient_calls", int)):
            fields[name] = kind(fields[name])
        execution.say(
            f"an interrupted run is resumed from {path}, {fields['units_done']} restarts done"
        )
        return cls(**fields)


def _key(settings, data, model_sha256, clean, stood):
    """Names an evaluation; the clean predictions tell models apart that come without a hash.

    Format and versions too: a record names one of each, so nothing is resumed from another's.
    """
    named = [FORMAT, versions(), asdict(settings), data, model_sha256]
    named += [clean.tolist(), stood.tolist()]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


# --------------------------------------------------------------------------- figures


def _image_table(y, clean, settings, state, linf):
    fell = state.felled_by >= 0
    images = pd.DataFrame(
        {
            "index": np.arange(len(y)),
            "label": y,
            "clean_prediction": clean,
            "adversarial_prediction": state.prediction,
            "restart": pd.array(state.restart, dtype="Int64"),
            "iteration": pd.array(state.iteration, dtype="Int64"),
            "linf": linf,
        }
    ).assign(
        restart=lambda rows: rows["restart"].where(fell),
        iteration=lambda rows: rows["iteration"].where(fell),
    )
    if len(settings.members) > 1:
        names = np.array([member.attack for member in settings.members])
        images["felled_by"] = pd.Series(names[state.felled_by]).where(fell)
    return images


def _members(
    members: tuple[AttackSettings, ...], images: pd.DataFrame, state: _State
) -> list[dict]:
    """What each member of a suite was, met and felled."""
    standing = int(is_clean(images).sum())
    rows = []
    for number, member in enumerate(members):
        fell = int((state.felled_by == number).sum())
        rows.append(
            {
                "name": member.attack,
                "implementation": member.implementation,
                "alpha": member.alpha,
                "steps": member.steps,
                "restarts": member.restarts,
                "attacked": standing,
                "fell": fell,
                "seconds": round(float(state.seconds[number]), 1),
            }
        )
        standing -= fell
    return rows


def _summary(
    settings: AttackSettings,
    members: tuple[AttackSettings, ...],
    images: pd.DataFrame,
    state: _State,
    subject: Subject,
    data: str,
    batch_size: int,
) -> dict:
    n = len(images)
    attack = {
        "name": settings.attack,
        "implementation": settings.implementation,
        "norm": "inf",
        "epsilon": settings.epsilon,
        "alpha": settings.alpha,
        "steps": settings.steps,
        "restarts": settings.restarts,
        "batch_size": batch_size,
    }
    if len(members) > 1:
        attack["members"] = _members(members, images, state)
    return {
        "format": FORMAT,
        "name": settings.stem(n, subject.dataset),
        "protocol": settings.protocol(n, subject.dataset),
        "attack": attack,
        "labels": settings.labels,
        "how_counted": HOW_COUNTED[settings.labels],
        "dataset": {"name": subject.dataset, "split": "test", "fingerprint": data},
        **counted(images, settings.labels),
        "seed": settings.seed,
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": subject.model,
        "model_sha256": subject.model_sha256,
    }
