"""How robust a classifier is: attack, label protocol, and the result files that record it.

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

Attacks (`kaf_study.records.ATTACKS`): `pgd` unless told otherwise; `suite` runs several, each on
what the ones before left standing, and an image is robust if it stands under all of them: the worst
case per image, never above the figure of any of its members. It is not the standard AutoAttack
(Croce & Hein 2020), which has FAB where this has PGD, and 5,000 queries of Square.

A result is two files, `NAME.json` and `NAME.csv` (`kaf_study.records`). NAME is
`ATTACK-STEPS-RESTARTS-LABELS`, e.g. `pgd-50-10-true` or `suite-true`, followed by whatever is not
the default: `-digits` (data set), `-n256` (number of images), `-eps4`, `-step1` (in 255ths),
`-seed1`. Results of other settings thus have other names; a file of the same name that belongs to
another model or to other images is not overwritten unless forced.
"""

import contextlib
import hashlib
import io
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

from kaf_study import InputError
from kaf_study.attacks.apgd import APGD
from kaf_study.attacks.pgd import (
    FGSM,
    PGD,
    CarliniWagner,
    CompiledClassifier,
    DeepFool,
    check_perturbation,
)
from kaf_study.attacks.registry import AttackSettings, check_count
from kaf_study.attacks.square import Square
from kaf_study.datasets import fingerprint
from kaf_study.files import locked
from kaf_study.records import (
    FORMAT,
    Evaluation,
    counted,
    hardware,
    make_writable,
    read_results,
    versions,
    write_atomically,
)
from kaf_study.saved_models import LOGITS, logits_of

__all__ = ["AttackSettings", "Evaluation", "evaluate", "evaluate_saved", "read_results"]

IMPLEMENTATIONS = {
    "pgd": "IBM ART ProjectedGradientDescentTensorFlowV2, own outer loop",
    "fgsm": "IBM ART ProjectedGradientDescentTensorFlowV2, one step from the clean image",
    "apgd-ce": "kaf_study.attacks.apgd",
    "apgd-dlr": "kaf_study.attacks.apgd",
    "apgd-t": "kaf_study.attacks.apgd, targeted DLR",
    "square": "kaf_study.attacks.square",
    "deepfool": "IBM ART DeepFool (L2), its result cut to the L-inf ball",
    "cw": "IBM ART CarliniLInfMethod at tau = epsilon, its result cut to the L-inf ball",
    "suite": "each member on what the ones before left standing",
}

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


def evaluate(
    model,
    x,
    y,
    *,
    attack="pgd",
    epsilon=8 / 255,
    alpha=None,
    steps=None,
    restarts=None,
    labels="true",
    seed=0,
    batch_size=128,
    progress=None,
    dataset=None,
    classes=None,
    model_name=None,
    model_sha256=None,
    partial=None,
    say=lambda line: None,
):
    """Attack a classifier and count what stands; the module's first lines say how.

    Args:
        model: Keras model, or callable f(x, training=False), giving logits or probabilities; or a
            CompiledClassifier, which spares compiling it again.
        x: images (N, H, W, C), float32 in [0, 1]. y: true labels (N,), int.
        attack: one of `kaf_study.records.ATTACKS`.
        epsilon: L-inf radius in the units of x.
        alpha, steps, restarts: None for the attack's own (`AttackSettings`).
        labels: "true" or "predicted".
        seed: of the random starts, each drawn from (seed, index of the image, restart).
        batch_size: images attacked together; does not change what is drawn.
        progress: called as progress(done, total, standing), done and total in image iterations.
        dataset, model_name, model_sha256: for the record.
        classes: the number of outputs that is expected, where known.
        partial: path of a file that keeps the state after each restart of each attack. If it exists
            and belongs to this evaluation, its restarts are not repeated; it is left for the caller
            to remove.
        say: called with one line if an interrupted run is resumed.

    Returns:
        An Evaluation; the same in every figure for the same model, images, settings and seed.
    """
    settings = AttackSettings(attack, epsilon, alpha, steps, restarts, labels, seed)
    check_count("batch_size", batch_size, 1)
    x, y = _check_images(x, y)
    print_of_data = fingerprint(x, y)
    classifier, outputs, clean = _classifier(model, x, y, classes, batch_size)
    attacks = _attacks(settings, classifier)

    key = _key(settings, print_of_data, model_sha256, clean)
    state = _State.resume(partial, key)
    if state is not None:
        say(f"an interrupted run is resumed from {partial}, {state.units_done} restarts done")
    else:
        state = _State.start(x, clean, len(settings.members))
    if partial is not None:
        make_writable(Path(partial).parent)  # or the first restart would be attacked in vain
    _run_attacks(
        attacks, classifier, x, y, clean, settings, state, batch_size, progress, partial, key
    )

    linf = check_perturbation(x, state.x_adv, epsilon)
    if fingerprint(x, y) != print_of_data:
        raise RuntimeError("the attack changed the images it was given")
    again = classifier.predict(state.x_adv, batch_size).argmax(axis=-1)

    images = _image_table(y, clean, settings, state, linf)
    summary = _summary(settings, images, dataset, print_of_data, batch_size, outputs)
    if attack == "suite":
        summary["attack"]["members"] = _members(settings, images, state)
    summary |= {
        "model": model_name,
        "model_sha256": model_sha256,
        # Not 0: float rounding at a decision boundary, or (if many) a randomised model.
        "attacked_predictions_not_reproduced": int((again != state.prediction).sum()),
        "gradient_calls": int(state.gradient_calls),  # batches; interrupted restarts not counted
        "seconds": round(float(state.seconds.sum()), 1),
    }
    return Evaluation(images, summary, state.x_adv)


def _check_images(x, y):
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 4 or len(x) == 0 or y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise InputError(
            "expected images (N, H, W, C) with whole-number labels (N,), N at least 1; "
            f"got {x.shape} and {y.shape} of {y.dtype}"
        )
    x, y = x.astype("float32", copy=False), y.astype("int64", copy=False)
    if not np.all((x >= 0) & (x <= 1)):
        raise InputError(
            f"images must lie in [0, 1], got {x.min():g} to {x.max():g}; divide pixels by 255"
        )
    return x, y


def _classifier(model, x, y, classes, batch_size):
    """ART's classifier, what its outputs are, and clean predictions (N,); refused with a reason."""
    if isinstance(model, CompiledClassifier):
        classifier, outputs = model, LOGITS
    else:
        classifier, outputs = _compiled(model, x, y, classes, batch_size)
    clean = classifier.predict(x, batch_size)
    if not np.all(np.isfinite(clean)):
        raise InputError("the model gives NaN or infinite outputs on clean images; train it again")
    classifier.check_gradient(x[:8], y[:8])
    return classifier, outputs, clean.argmax(axis=-1)


def _compiled(model, x, y, classes, batch_size):
    """A model's `CompiledClassifier`, and what its outputs are."""
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
        classifier = CompiledClassifier(logits, int(shape[1]), x.shape[1:])
        classifier.predict(some, batch_size)
    return classifier, outputs


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


def _attack_named(settings, classifier):
    """The attack of one member, with `run`; refused if the model has too few classes for it."""
    kwargs = {"epsilon": settings.epsilon, "steps": settings.steps}
    match settings.attack:
        case "pgd":
            return PGD(classifier, alpha=settings.alpha, **kwargs)
        case "fgsm":
            return FGSM(classifier, epsilon=settings.epsilon)
        case "square":
            return Square(classifier, **kwargs)
        case "deepfool":
            return DeepFool(classifier, **kwargs)
        case "cw":
            return CarliniWagner(classifier, **kwargs)
        case name:
            return APGD(classifier, name, **kwargs)


def _attacks(settings, classifier):
    """The attacks of `settings.members`, or why this model cannot be attacked so."""
    attacks = [_attack_named(member, classifier) for member in settings.members]
    for member in settings.members:
        if member.attack == "apgd-t" and member.restarts > classifier.nb_classes - 1:
            raise InputError(
                "apgd-t aims at one other class per restart, so the model's "
                f"{classifier.nb_classes} classes allow {classifier.nb_classes - 1} restarts; "
                f"got {member.restarts}"
            )
    return attacks


def _units(settings):
    """What is run, and saved when done: (member, its number, restart), in order."""
    return [
        (member, number, restart)
        for number, member in enumerate(settings.members)
        for restart in range(1, member.restarts + 1)
    ]


def _run_attacks(
    attacks, classifier, x, y, clean, settings, state, batch_size, progress, partial, key
):
    """Run the restarts that `state` does not have yet; it is saved after each one."""
    is_true = settings.labels == "true"
    targets = y if is_true else clean
    # True labels: an image that is wrong when clean is lost already.
    standing = (clean == y if is_true else np.ones(len(x), bool)) & (state.felled_by < 0)
    units = _units(settings)
    meter = _Meter(progress, units, standing, state)
    while state.units_done < len(units):
        began, calls = time.monotonic(), classifier.gradient_calls
        _, number, restart = units[state.units_done]
        index = np.flatnonzero(standing)
        run = attacks[number].run(
            x[index],
            targets[index],
            index,
            restart,
            seed=settings.seed,
            batch_size=batch_size,
            judge_every=is_true,
            progress=meter.step,
        )
        state.add(index, run, number, restart)
        state.seconds[number] += time.monotonic() - began
        state.gradient_calls += classifier.gradient_calls - calls
        state.save(partial, key)
        standing &= state.felled_by < 0


class _Meter:
    """Turns the steps of a run into progress(done, total, standing), over all that is to be run."""

    def __init__(self, progress, units, standing, state):
        self.progress, self.state = progress, state
        self.standing = int(standing.sum())
        self.lengths = [member.steps + 1 for member, *_ in units]
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

    x_adv: np.ndarray
    prediction: np.ndarray
    restart: np.ndarray
    iteration: np.ndarray
    felled_by: np.ndarray
    seconds: np.ndarray
    units_done: int = 0
    gradient_calls: int = 0

    @classmethod
    def start(cls, x, clean, members):
        zeros = np.zeros(len(x), int)
        nobody = np.full(len(x), -1)
        return cls(x.copy(), clean.copy(), zeros, zeros.copy(), nobody, np.zeros(members))

    def add(self, index, run, member, restart):
        """Take over what a run did to the images at `index`."""
        self.x_adv[index] = run.x_adv
        self.prediction[index] = run.predictions
        self.restart[index] = restart
        self.iteration[index] = run.iterations
        self.felled_by[index[run.fell]] = member
        self.units_done += 1

    def save(self, path, key):
        if path is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, key=key, **vars(self))
        write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def resume(cls, path, key):
        """The state kept at `path`, or None if there is none or it belongs to something else."""
        if path is None or not Path(path).is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                if str(kept["key"]) != key:
                    return None
                fields = {name: kept[name] for name in cls.__dataclass_fields__}
        except Exception:  # whatever a damaged file raises: begin again
            return None
        for name in ("units_done", "gradient_calls"):
            fields[name] = int(fields[name])
        return cls(**fields)


def _key(settings, print_of_data, model_sha256, clean):
    """Names an evaluation; the clean predictions tell models apart that come without a hash."""
    named = [asdict(settings), print_of_data, model_sha256, clean.tolist()]
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
    if settings.attack == "suite":
        names = np.array([member.attack for member in settings.members])
        images["felled_by"] = pd.Series(names[state.felled_by]).where(fell)
    return images


def _members(settings, images, state):
    """What each member of a suite was, met and felled."""
    standing = int((images["label"] == images["clean_prediction"]).sum())
    rows = []
    for member, seconds in zip(settings.members, state.seconds, strict=True):
        fell = int((images["felled_by"] == member.attack).sum())
        rows.append(
            {
                "name": member.attack,
                "implementation": IMPLEMENTATIONS[member.attack],
                "alpha": member.alpha,
                "steps": member.steps,
                "restarts": member.restarts,
                "attacked": standing,
                "fell": fell,
                "seconds": round(float(seconds), 1),
            }
        )
        standing -= fell
    return rows


def _summary(settings, images, dataset, print_of_data, batch_size, outputs):
    n = len(images)
    return {
        "format": FORMAT,
        "name": settings.stem(n, dataset),
        "protocol": settings.protocol(n, dataset),
        "attack": {
            "name": settings.attack,
            "implementation": IMPLEMENTATIONS[settings.attack],
            "norm": "inf",
            "epsilon": settings.epsilon,
            "alpha": settings.alpha,
            "steps": settings.steps,
            "restarts": settings.restarts,
            "batch_size": batch_size,
        },
        "labels": settings.labels,
        "how_counted": HOW_COUNTED[settings.labels],
        "outputs": outputs,
        "dataset": {"name": dataset, "split": "test", "fingerprint": print_of_data},
        **counted(images, settings.labels),
        "seed": settings.seed,
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# --------------------------------------------------------------------------- saved models


def evaluate_saved(
    opened,
    x,
    y,
    settings,
    *,
    dataset,
    classes=None,
    out=None,
    batch_size=128,
    force=False,
    keep_images=False,
    progress=None,
    say=lambda line: None,
):
    """Evaluate a saved model into its result files; finished ones are read instead.

    Args:
        opened: a `LoadedModel`.
        x, y: the images to attack, already cut to the first n.
        out: folder in which a folder with the model's name gets the files; by default a model
            folder's `robustness/`, and for any other model `robustness/NAME/` beside it.
        force: repeat a finished evaluation, and overwrite that of another model.
        keep_images: the result must have x_adv; a finished one is taken only if they were saved
            beside it (`save_adversarial`), else repeated.
        say: called with one line about what is re-used, resumed, or special about the model.
    """
    directory = result_folder(opened, out)
    stem = settings.stem(len(x), dataset)
    path, partial = directory / f"{stem}.json", directory / f".{stem}.partial.npz"
    if path.exists() and not force:
        kept = Evaluation.read(path)
        _refuse_other(path, kept.summary, opened, settings, fingerprint(*_check_images(x, y)))
        images = path.with_suffix(".npz")
        if not keep_images or images.exists():
            partial.unlink(missing_ok=True)  # of a run that was killed just after it had finished
            say(f"{opened.name}: finished before, read from {path} (--force to repeat)")
            return replace(kept, x_adv=read_adversarial(images)) if keep_images else kept
        say(f"{opened.name}: finished before without its images; attacked again for them")
    with locked(directory / f".{stem}.lock"):
        try:
            result = evaluate(
                opened.model,
                x,
                y,
                attack=settings.attack,
                epsilon=settings.epsilon,
                alpha=settings.alpha,
                steps=settings.steps,
                restarts=settings.restarts,
                labels=settings.labels,
                seed=settings.seed,
                batch_size=batch_size,
                progress=progress,
                dataset=dataset,
                classes=classes,
                model_name=opened.name,
                model_sha256=opened.sha256,
                partial=partial,
                say=lambda line: say(f"{opened.name}: {line}"),
            )
        except InputError as error:
            raise InputError(f"{str(opened.path)!r}: {error}") from None
        if result.summary["outputs"] != "logits":
            say(
                f"{opened.name}: ends in a softmax; attacked {_ATTACKED[result.summary['outputs']]}"
            )
        path.with_suffix(".npz").unlink(missing_ok=True)  # images of an earlier result
        result.write(directory)
        partial.unlink(missing_ok=True)
    return result


_ATTACKED = {
    "softmax removed": "at its logits (softmax removed)",
    "probabilities": "through the logarithm of its probabilities (its logits are out of reach)",
}


def save_adversarial(result, directory):
    """Keep the attacked images beside a result: STEM.npz with x_adv (N, H, W, C), in [0, 1]."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x_adv=result.x_adv)
    path = Path(directory) / f"{result.stem}.npz"
    write_atomically(path, buffer.getvalue())
    return path


def read_adversarial(path):
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["x_adv"]
    except Exception as error:  # numpy and zipfile raise several types for a damaged file
        raise InputError(
            f"{str(path)!r} does not hold attacked images ({type(error).__name__}); delete it"
        ) from None


def result_folder(opened, out=None):
    if out is not None:
        return Path(out) / opened.name
    if opened.folder is not None:
        return opened.folder / "robustness"
    return opened.path.resolve().parent / "robustness" / opened.name


def _refuse_other(path, summary, opened, settings, print_of_data):
    """A finished result is only re-used for the very same model, images and settings."""
    attack = summary.get("attack", {})
    expected = {
        "model sha256": (summary.get("model_sha256"), opened.sha256),
        "images": (summary.get("dataset", {}).get("fingerprint"), print_of_data),
        "labels": (summary.get("labels"), settings.labels),
        "seed": (summary.get("seed"), settings.seed),
    } | {
        name: (attack.get(name), getattr(settings, name))
        for name in ("epsilon", "alpha", "steps", "restarts")
    }
    for name, (has, needs) in expected.items():
        floats = isinstance(has, float) and isinstance(needs, float)
        same = math.isclose(has, needs) if floats else has == needs
        if not same:
            has, needs = (v[:12] + "..." if isinstance(v, str) else v for v in (has, needs))
            raise InputError(
                f"{str(path)!r} is the result of another evaluation ({name} {has}, here {needs}); "
                "give --force to overwrite it, or another --out"
            )
