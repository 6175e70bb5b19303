"""The result files of a saved model: made by an attack, read instead where they are finished.

A result is two files, `NAME.json` and `NAME.csv` (`kaf_study.records`). NAME is
`ATTACK-STEPS-RESTARTS-LABELS`, e.g. `pgd-50-10-true` or `suite-true`, followed by whatever is not
the default: `-digits` (data set), `-n256` (number of images), `-eps4`, `-step1` (in 255ths),
`-seed1`. Results of other settings thus have other names; a file of the same name that belongs to
another model or to other images is not overwritten unless forced.
"""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kaf_study import InputError
from kaf_study.attacks.registry import AttackSettings
from kaf_study.datasets import fingerprint
from kaf_study.evaluation import Execution, Subject, checked_images, evaluate
from kaf_study.files import locked, write_atomically
from kaf_study.records import Evaluation
from kaf_study.saved_models import HOW_ATTACKED, LOGITS, LoadedModel


class ImageSet(NamedTuple):
    """Images to attack: x (N, H, W, C) in [0, 1], y (N,), of a data set with so many classes."""

    x: np.ndarray
    y: np.ndarray
    dataset: str
    classes: int | None = None


def evaluate_saved(
    opened: LoadedModel,
    images: ImageSet,
    settings: AttackSettings,
    *,
    out: Path | str | None = None,
    force: bool = False,
    keep_images: bool = False,
    execution: Execution = Execution(),
) -> Evaluation:
    """Evaluate a saved model into its result files; finished ones are read instead.

    Args:
        images: already cut to the first n.
        out: folder in which a folder with the model's name gets the files; by default a model
            folder's `robustness/`, and for any other model `robustness/NAME/` beside it.
        force: repeat a finished evaluation, and overwrite that of another model.
        keep_images: the result must have x_adv; a finished one is taken only if they were saved
            beside it (`save_adversarial`), else repeated.
        execution: its `partial` and `under_true` are chosen here.
    """
    x, y = checked_images(images.x, images.y)
    if images.classes is not None:
        settings = settings.fitted(images.classes)  # its files are named by what was run
    directory = result_folder(opened, out)
    path = directory / f"{settings.stem(len(x), images.dataset)}.json"
    partial = path.with_name(f".{path.stem}.partial.npz")

    def say(line):
        execution.say(f"{opened.name}: {line}")

    with locked(directory / f".{path.stem}.lock"):
        if path.exists() and not force:
            finished = _finished(path, opened, settings, x, y, say, keep_images=keep_images)
            if finished is not None:
                partial.unlink(missing_ok=True)  # of a run killed just after it had finished
                return finished
        under_true = None
        if not (force or keep_images):
            under_true = _under_true(directory, opened, settings, images.dataset, x, y, say)
        subject = Subject(images.dataset, images.classes, opened.name, opened.sha256)
        how = replace(execution, partial=partial, say=say, under_true=under_true)
        try:
            result = evaluate(opened.model, x, y, settings, subject=subject, execution=how)
        except InputError as error:
            raise InputError(f"{str(opened.path)!r}: {error}") from None
        if result.summary["outputs"] != LOGITS:
            say(f"attacked {HOW_ATTACKED[result.summary['outputs']]}")
        result.summary["remarks"] = list(opened.remarks)
        for remark in opened.remarks:
            say(remark)
        path.with_suffix(".npz").unlink(missing_ok=True)  # attacked images of an earlier result
        result.write(directory)
        partial.unlink(missing_ok=True)
    return result


def save_adversarial(result: Evaluation, x: np.ndarray, directory: Path | str) -> Path:
    """Keep what the attack added to images x beside a result: STEM.npz with `offset`.

    offset (N, H, W, C), float16, in the units of [0, 1]: x + offset are the attacked images, to
    2^-11 of what was added. Where an image was wrong when clean, or a pixel has moved by all of the
    radius, there is little to keep: 10,000 images of CIFAR-10 took 18 MB after `rapid`.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, offset=(np.asarray(result.x_adv) - x).astype("float16"))
    path = Path(directory) / f"{result.stem}.npz"
    write_atomically(path, buffer.getvalue())
    return path


def read_adversarial(path: Path, x: np.ndarray) -> np.ndarray:
    """The attacked images of `save_adversarial`, (N, H, W, C) in [0, 1]; x: the clean ones."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return np.clip(x + kept["offset"], 0, 1, dtype="float32")
    except Exception as error:  # numpy and zipfile raise several types for a damaged file
        raise InputError(
            f"{str(path)!r} does not hold attacked images ({type(error).__name__}); delete it"
        ) from None


def result_folder(opened: LoadedModel, out: Path | str | None = None) -> Path:
    if out is not None:
        return Path(out) / opened.name
    if opened.folder is not None:
        return opened.folder / "robustness"
    return opened.path.resolve().parent / "robustness" / opened.name


def _finished(
    path: Path,
    opened: LoadedModel,
    settings: AttackSettings,
    x: np.ndarray,
    y: np.ndarray,
    say: Callable[[str], None],
    *,
    keep_images: bool,
) -> Evaluation | None:
    """The result that is there; None where its images are wanted and were not saved."""
    kept, attacked = Evaluation.read(path), path.with_suffix(".npz")
    _refuse_other(path, kept.summary, opened, settings, fingerprint(x, y))
    if keep_images and not attacked.exists():
        say("finished before without its images; attacked again for them")
        return None
    say(f"finished before, read from {path} (--force to repeat)")
    return replace(kept, x_adv=read_adversarial(attacked, x)) if keep_images else kept


def _under_true(
    directory: Path,
    opened: LoadedModel,
    settings: AttackSettings,
    dataset: str,
    x: np.ndarray,
    y: np.ndarray,
    say: Callable[[str], None],
) -> Evaluation | None:
    """Under predicted labels: the finished result of the attack under true ones, if any."""
    true = replace(settings, labels="true")
    path = directory / f"{true.stem(len(x), dataset)}.json"
    if settings.labels == "true" or not path.exists():
        return None
    kept = Evaluation.read(path)
    if _difference(kept.summary, opened, true, fingerprint(x, y)):
        return None
    say(f"the {int(kept.is_robust.sum())} images that stand in {path} are not attacked again")
    return kept


def _refuse_other(
    path: Path, summary: dict, opened: LoadedModel, settings: AttackSettings, data: str
) -> None:
    """A finished result is only re-used for the very same model, images and settings."""
    if difference := _difference(summary, opened, settings, data):
        raise InputError(
            f"{str(path)!r} is the result of another evaluation ({difference}); "
            "give --force to overwrite it, or another --out"
        )


def _difference(
    summary: dict, opened: LoadedModel, settings: AttackSettings, data: str
) -> str | None:
    """How a finished result differs from one of this model, settings and images; None: it does not.

    data: the `fingerprint` of the images.
    """
    attack = summary.get("attack", {})
    expected = {
        "model sha256": (summary.get("model_sha256"), opened.sha256),
        "images": (summary.get("dataset", {}).get("fingerprint"), data),
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
            return f"{name} {has}, here {needs}"
    return None
