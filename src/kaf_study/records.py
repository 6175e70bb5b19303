"""The records of trainings and evaluations: typed, recounted when read, and the tables from them.

A result is two files, `NAME.json` (settings, figures, versions) and its rows, one per image, in
`NAME.csv` or, of more than 1,000 images, `NAME.csv.gz`; `kaf_study.evaluation` says how NAME is
made. Files appear complete or not at all, the .json last: where it is, the evaluation was finished.

Whatever is read is checked against a type, in one place (`read_json`), and the figures of a result
are counted again from its rows. That finds what was damaged, mixed up, or edited in one place. It
cannot find rows and figures that were made up together: who doubts a result attacks the model
again. Nothing here needs a model or TensorFlow.
"""

import contextlib
import gzip
import io
import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pandas as pd
from msgspec import UNSET, Meta, Struct, UnsetType

from kaf_study import InputError
from kaf_study.attacks.registry import ATTACKS
from kaf_study.config import TrainConfig
from kaf_study.files import MAX_RECORD_BYTES, make_writable, read_bytes, write_atomically

FORMAT = "robustness-1"
ROWS_IN_PLAIN_TEXT = 1000  # more are compressed
PERTURBATION_TOLERANCE = 1e-6  # of linf above epsilon: float32 rounding
CLASSES = {"cifar10": 10, "digits": 10}  # where a data set is known, labels are below

COLUMNS = [
    "model",
    "labels",
    "protocol",
    "n",
    "clean_accuracy",
    "clean_standard_error",
    "robust_accuracy",
    "robust_standard_error",
    "accuracy_under_attack_predicted_labels",
    "standard_error_predicted_labels",
    "pushed_onto_true_class_predicted_labels",
    "attack",
    "epsilon",
    "alpha",
    "steps",
    "restarts",
    "seed",
    "dataset",
    "fingerprint",
    "outputs",
    "seconds",
    "model_sha256",
    "folder",
    "path",
]
FIGURES = COLUMNS[3:11]  # of a summary, counted from its rows
HISTORY_COLUMNS = ("epoch", "loss", "probe_clean", "probe_fgsm", "probe_pgd")  # and others

# --------------------------------------------------------------------------- types

Fraction = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Kappa = Annotated[float, Meta(ge=0)]  # see kaf_study.curvature


class DataRecord(Struct):
    """The images of a training."""

    name: str
    train_n: Positive | UnsetType = UNSET
    train_fingerprint: str | UnsetType = UNSET
    validation_fingerprint: str | UnsetType = UNSET


class ProcessRecord(Struct):
    """One of the processes of a training that was interrupted and resumed; replicas, if several."""

    first_epoch: Count
    versions: dict[str, str]
    hardware: str
    replicas: Positive | UnsetType = UNSET  # 1


class TrainingResults(Struct):
    epochs_trained: Positive
    parameters: Positive
    validation_clean: Fraction | UnsetType = UNSET
    validation_fgsm: Fraction | UnsetType = UNSET
    validation_pgd: Fraction | UnsetType = UNSET
    validation_n: Positive | UnsetType = UNSET
    probe_clean: Fraction | UnsetType = UNSET
    probe_fgsm: Fraction | UnsetType = UNSET
    probe_pgd: Fraction | UnsetType = UNSET
    probe_n: Positive | UnsetType = UNSET
    catastrophic_overfitting_in_epoch: Count | None = None


class TrainingRecord(Struct):
    """training.json"""

    settings: TrainConfig
    results: TrainingResults
    seconds: Seconds
    dataset: DataRecord | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    hardware: str | UnsetType = UNSET
    model_sha256: str | UnsetType = UNSET
    shapes_sha256: str | UnsetType = UNSET  # of the model.keras in settings.shapes_of
    processes: list[ProcessRecord] | UnsetType = UNSET


class CheckpointState(Struct):
    """What a checkpoint holds beside the variables; earlier versions kept the first two."""

    history: list[dict[str, float]]
    stopped: Count | None
    dataset: DataRecord | UnsetType = UNSET
    processes: list[ProcessRecord] | UnsetType = UNSET
    shapes_sha256: str | UnsetType | None = UNSET  # as in training.json


class CurvatureRecord(Struct):
    """curvature.json: kappa of each activation layer, the median over channels, on n images."""

    model_sha256: str
    dataset: DataRecord
    n: Positive
    before_training: Annotated[list[Kappa], Meta(min_length=1)]
    after_training: Annotated[list[Kappa], Meta(min_length=1)]


class MemberRecord(Struct):
    """One attack of a suite: it met `attacked` images and felled `fell` of them."""

    name: str
    attacked: Count
    fell: Count
    alpha: Fraction | None = None
    steps: Positive | None = None
    restarts: Positive | None = None
    implementation: str | UnsetType = UNSET
    seconds: Seconds | UnsetType = UNSET


class AttackRecord(Struct):
    name: str
    epsilon: Fraction
    alpha: Fraction | None = None
    steps: Positive | None = None
    restarts: Positive | None = None
    members: Annotated[list[MemberRecord], Meta(min_length=1)] | UnsetType = UNSET
    implementation: str | UnsetType = UNSET
    norm: str | UnsetType = UNSET
    batch_size: Positive | UnsetType = UNSET


class AttackedImages(Struct):
    name: str | None
    fingerprint: str
    split: str | UnsetType = UNSET


class ResultRecord(Struct):
    """The .json of a result. Accuracies are fractions."""

    format: Literal["robustness-1"]
    name: str
    protocol: str
    attack: AttackRecord
    labels: Literal["true", "predicted"]
    dataset: AttackedImages
    n: Positive
    clean_accuracy: Fraction
    clean_standard_error: Fraction
    seed: Count
    robust_accuracy: Fraction | UnsetType = UNSET
    robust_standard_error: Fraction | UnsetType = UNSET
    accuracy_under_attack_predicted_labels: Fraction | UnsetType = UNSET
    standard_error_predicted_labels: Fraction | UnsetType = UNSET
    pushed_onto_true_class_predicted_labels: Count | UnsetType = UNSET
    model: str | None = None
    model_sha256: str | None = None
    outputs: str | UnsetType = UNSET
    how_counted: str | UnsetType = UNSET
    seconds: Seconds | UnsetType = UNSET
    attacked_predictions_not_reproduced: Count | UnsetType = UNSET
    gradient_calls: Count | UnsetType = UNSET
    standing_under_true_labels: Count | UnsetType = UNSET  # taken from that result, not attacked
    versions: dict[str, str] | UnsetType = UNSET
    hardware: str | UnsetType = UNSET
    date: str | UnsetType = UNSET


# Without one of these a training is not told from another; the other settings, some of which came
# later, have their defaults where a record lacks them.
NEEDED_SETTINGS = {"dataset", "architecture", "activation", "epochs", "seed"}

# --------------------------------------------------------------------------- reading


def read_json(path: Path, schema: type | None = None) -> Any:
    """The content of a JSON file; with a schema (a Struct or dataclass) it is refused if unlike it.

    What the schema does not name is kept and not looked at.
    """
    return checked(read_bytes(path), schema, path)


def checked(text: bytes, schema: type | None, path: Path) -> Any:
    """JSON text as Python has it, once it is known to be of the schema's types."""
    try:
        content = msgspec.json.decode(text)
        if schema is not None:
            msgspec.convert(content, schema)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(path, error) from None
    return content


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{str(path)!r} cannot be read: {' '.join(str(error).split())[:160]}; "
        "restore the file, or make it anew with --force"
    )


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run; one that did not exist yet has its default."""
    return asdict(TrainConfig()) | settings


def with_defaults(content: dict[str, Any], schema: type[Struct]) -> dict[str, Any]:
    """What a schema describes, with its defaults where an entry is missing; UNSET is none."""
    fields = msgspec.structs.fields(schema)
    given = {field.name: field.default for field in fields if not field.required}
    return {name: value for name, value in given.items() if value is not UNSET} | content


def read_training(path: Path) -> dict[str, Any]:
    """A training.json, as `TrainingRecord` has it, with all settings, and defaults of results."""
    record = read_json(path, TrainingRecord)
    given = record["settings"].keys()
    missing, unknown = NEEDED_SETTINGS - given, given - TrainConfig.__dataclass_fields__.keys()
    if missing or unknown:
        lacks, has = (", ".join(sorted(names)) or "nothing" for names in (missing, unknown))
        raise InputError(
            f"{str(path)!r} cannot be read: its settings lack {lacks}, and name {has} that is not "
            "known here; restore the file, or train anew with --force"
        )
    return record | {
        "settings": completed(record["settings"]),
        "results": with_defaults(record["results"], TrainingResults),
    }


def read_history(path: Path, epochs: int | None = None) -> pd.DataFrame:
    """A history.csv: one row per epoch, `epoch` from 0, numbers only; `epochs` rows if given."""
    rows, fault = _table(path), None
    numbers = rows.select_dtypes("number")
    if missing := [name for name in HISTORY_COLUMNS if name not in rows]:
        fault = f"there is no column {', '.join(missing)}"
    elif list(rows["epoch"]) != list(range(len(rows))) or not len(rows):
        fault = "its column epoch does not count from 0"
    elif len(numbers.columns) < len(rows.columns) or not np.isfinite(numbers).all(axis=None):
        fault = "there are cells that hold no number"
    elif epochs is not None and len(rows) != epochs:
        fault = f"it has {len(rows)} epochs where training.json says {epochs}"
    if fault:
        raise InputError(f"{str(path)!r} cannot be read: {fault}; restore the file, or train anew")
    return rows


def _table(path: Path, **types: str) -> pd.DataFrame:
    """A .csv or .csv.gz file, whole."""
    text = read_bytes(path)
    try:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(text)) as file:
                text = file.read(MAX_RECORD_BYTES + 1)
        if len(text) > MAX_RECORD_BYTES or not text.endswith(b"\n"):
            raise ValueError("it is cut off, or far too long")
        with np.errstate(invalid="raise"):  # a number too large for a whole one
            return pd.read_csv(io.BytesIO(text), dtype=types)
    except Exception as error:  # pandas, gzip and zlib raise a dozen types for a damaged file
        raise _unreadable(path, error) from None


# --------------------------------------------------------------------------- a result


@dataclass(frozen=True)
class Evaluation:
    """The result of one attack on one model.

    images: DataFrame, one row per image: index, label, clean_prediction, adversarial_prediction,
        restart (from 1) and iteration (0 is the random start) at which it fell, empty if it stood
        or was not attacked, linf = |x_adv - x|_inf as measured; of a suite also felled_by, the
        member that felled it.
    summary: dict, as in the JSON file (`ResultRecord`). Accuracies are fractions.
    x_adv: the attacked images (N, H, W, C), or None if read from files.
    """

    images: pd.DataFrame
    summary: dict[str, Any]
    x_adv: np.ndarray | None = None

    @property
    def stem(self) -> str:
        return self.summary["name"]

    @property
    def is_clean(self) -> pd.Series:
        """(N,) bool: classified correctly without an attack."""
        return is_clean(self.images)

    @property
    def is_robust(self) -> pd.Series:
        """(N,) bool: the attack failed, and there was something to lose. Of true labels only."""
        if self.summary.get("labels", "true") != "true":
            raise InputError(f"{self.stem}: attacked under predicted labels, no image is robust")
        return is_clean(self.images) & is_kept(self.images)

    def write(self, directory: Path | str) -> Path:
        """Write the rows and then the .json (whose presence means: finished); return its path."""
        directory = Path(directory)
        make_writable(directory)
        path, plain, packed = (
            directory / f"{self.stem}{suffix}" for suffix in (".json", ".csv", ".csv.gz")
        )
        path.unlink(missing_ok=True)  # of an earlier result, whose rows now go
        rows = self.images.to_csv(index=False, lineterminator="\n", float_format="%.9g").encode()
        if len(self.images) > ROWS_IN_PLAIN_TEXT:
            write_atomically(packed, gzip.compress(rows, mtime=0))
            plain.unlink(missing_ok=True)
        else:
            write_atomically(plain, rows)
            packed.unlink(missing_ok=True)
        write_json(path, self.summary, indent=2)
        return path

    @classmethod
    def read(cls, path: Path | str) -> "Evaluation":
        """The result whose .json is at `path`, its figures counted again from its rows."""
        path = Path(path)
        summary = with_defaults(read_json(path, ResultRecord), ResultRecord)
        rows = [path.with_suffix(suffix) for suffix in (".csv", ".csv.gz")]
        there = [file for file in rows if file.exists()] or rows[:1]
        if len(there) > 1:
            raise InputError(f"{str(path)!r} has rows twice; delete {there[0]} or {there[1]}")
        images = _table(there[0], restart="Int64", iteration="Int64")
        if fault := _fault_of_rows(images, summary):
            raise InputError(f"{str(there[0])!r} is no result: {fault}; {REPEAT}")
        if fault := _fault_of_figures(images, summary):
            raise InputError(f"{str(path)!r} is not what its rows give: {fault}; {REPEAT}")
        return cls(images, summary)


REPEAT = "restore the files, or repeat the evaluation with --force"


def is_clean(images: pd.DataFrame) -> pd.Series:
    return images["label"] == images["clean_prediction"]


def is_kept(images: pd.DataFrame) -> pd.Series:
    return images["label"] == images["adversarial_prediction"]


def has_fallen(images: pd.DataFrame, labels: str) -> pd.Series:
    """(N,) bool: the attack succeeded. Under true labels, images wrong when clean are spared."""
    if labels == "true":
        return is_clean(images) & ~is_kept(images)
    return images["clean_prediction"] != images["adversarial_prediction"]


def counted(images: pd.DataFrame, labels: str) -> dict[str, Any]:
    """The figures of a summary: `FIGURES`, those of the one label protocol."""
    n = len(images)
    clean, kept = is_clean(images), is_kept(images)
    accuracy, under_attack = float(clean.mean()), float(kept.mean())
    figures = {
        "n": n,
        "clean_accuracy": accuracy,
        "clean_standard_error": standard_error(accuracy, n),
    }
    if labels == "true":
        robust = float((clean & kept).mean())
        return figures | {
            "robust_accuracy": robust,
            "robust_standard_error": standard_error(robust, n),
        }
    return figures | {
        "accuracy_under_attack_predicted_labels": under_attack,
        "standard_error_predicted_labels": standard_error(under_attack, n),
        "pushed_onto_true_class_predicted_labels": int((~clean & kept).sum()),
    }


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of an accuracy (a fraction) over n images."""
    return float(math.sqrt(accuracy * (1 - accuracy) / n))


def _fault_of_rows(images: pd.DataFrame, summary: dict[str, Any]) -> str | None:
    """What makes the rows impossible as those of this attack, or None."""
    n, attack = summary["n"], summary["attack"]
    predictions = ["label", "clean_prediction", "adversarial_prediction"]
    needed = ["index", *predictions, "restart", "iteration", "linf"]
    if missing := [name for name in needed if name not in images]:
        return f"there is no column {', '.join(missing)}"
    if ("felled_by" in images) != ("members" in attack):
        return "a column felled_by and attack.members in the .json belong together"
    if len(images) != n:
        return f"it has {len(images)} rows where the .json says n = {n}"
    for name in ("index", *predictions):
        if images[name].dtype.kind != "i":
            return f"{name} is not a whole number in every row"
    if not np.array_equal(images["index"], np.arange(n)):
        return "index does not count from 0 to n - 1, row by row"
    classes = CLASSES.get(summary["dataset"]["name"], np.inf)
    for name in predictions:
        if not images[name].between(0, classes - 1).all():
            return f"{name} is not a class in every row"
    linf, epsilon = images["linf"], attack["epsilon"]
    if linf.dtype.kind not in "fi" or not linf.between(0, epsilon + PERTURBATION_TOLERANCE).all():
        return f"linf does not lie in 0 to {epsilon:.9g} in every row"
    return _fault_of_falls(images, summary)


def _fault_of_falls(images: pd.DataFrame, summary: dict[str, Any]) -> str | None:
    """Where and by what the images fell must be told of those that fell, and of no other."""
    attack, fell = summary["attack"], has_fallen(images, summary["labels"])
    for name in ("restart", "iteration"):
        if not np.array_equal(images[name].notna(), fell):
            return f"{name} is not given for the images that fell, and for them alone"
    if summary["labels"] == "true":
        spared = images[~is_clean(images)]
        if not (spared["clean_prediction"] == spared["adversarial_prediction"]).all():
            return "adversarial_prediction changes where a wrong image was not attacked"
    felled = {attack["name"]: images[fell]}
    if "members" in attack:
        names = [member["name"] for member in attack["members"]]
        if not np.array_equal(images["felled_by"].isin(names), fell):
            return "felled_by does not name a member for the images that fell, and for them alone"
        felled = {name: images[images["felled_by"] == name] for name in names}
    for member in attack.get("members", [attack]):
        rows = felled[member["name"]]
        for name, least, setting in (("restart", 1, "restarts"), ("iteration", 0, "steps")):
            most = member.get(setting) or np.inf
            if name == "iteration" and member["name"] in ATTACKS:
                most += ATTACKS[member["name"]].points_after
            if not rows[name].between(least, most).all():
                return f"{name} lies outside {least} to {most} for {member['name']}"
    return None


def _fault_of_figures(images: pd.DataFrame, summary: dict[str, Any]) -> str | None:
    """The first figure of a summary that its rows do not give, or None."""
    expected = counted(images, summary["labels"])
    for name in FIGURES:
        told, found = summary.get(name, np.nan), expected.get(name, np.nan)
        if not np.isclose(told, found, rtol=1e-9, atol=1e-12, equal_nan=True):
            return f"{name} is {told}, the rows give {found}"
    standing = int(is_clean(images).sum())
    for member in summary["attack"].get("members", ()):
        fell = int((images["felled_by"] == member["name"]).sum())
        for name, found in (("attacked", standing), ("fell", fell)):
            if member[name] != found:
                return f"{name} of {member['name']} is {member[name]}, the rows give {found}"
        standing -= fell
    return None


# --------------------------------------------------------------------------- where it ran


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("tensorflow", "keras", "adversarial-robustness-toolbox", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # e.g. tensorflow-cpu under its own name
            found[name] = "unknown"
    return found


def hardware() -> str:
    """The machine in one line: processor, cores, GPUs."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    import tensorflow as tf

    gpus = len(tf.config.list_physical_devices("GPU"))
    return f"{processor}, {os.cpu_count()} cores, {gpus or 'no'} GPU{'s' if gpus > 1 else ''}"


# --------------------------------------------------------------------------- tables


def read_results(*folders: Path | str) -> pd.DataFrame:
    """All results below the given folders, one row each: what tables and figures are drawn from.

    Each is read as `Evaluation.read` does; a .json file that cannot be read is an error, one of
    another format is passed over.

    Columns: see `COLUMNS`. robust_accuracy and its error are empty unless labels are true, the
    columns that end in `_predicted_labels` unless labels are predicted; folder is the model folder
    or, for other models, the folder of results; path is the .json file.
    """
    # Hidden ones are what a killed process had not finished writing.
    paths = sorted({p for folder in folders for p in Path(folder).rglob("[!.]*.json")})
    rows = []
    for path in {p.resolve(): p for p in paths}.values():  # each file once, however it is named
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            continue
        summary = Evaluation.read(path).summary
        attack, data = summary["attack"], summary["dataset"]
        in_model_folder = path.parent.name == "robustness"
        rows.append(
            {column: summary.get(column) for column in COLUMNS}
            | {name: attack.get(name) for name in ("epsilon", "alpha", "steps", "restarts")}
            | {
                "attack": attack["name"],
                "dataset": data["name"],
                "fingerprint": data["fingerprint"],
                "folder": str(path.parent.parent if in_model_folder else path.parent),
                "path": str(path),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def results_table(summaries: list[dict[str, Any]]) -> str:
    """The table of a command: one line per result, standard errors beside each figure.

    `±` is one binomial standard error. Figures with predicted labels are starred, with the reason.
    """
    rows = [("model", "labels", "clean", "under attack", "protocol")]
    for s in summaries:
        if s["labels"] == "true":
            shown = f"{_percent(s['robust_accuracy'], s['n'])} "
        else:
            shown = f"{_percent(s['accuracy_under_attack_predicted_labels'], s['n'])}*"
        clean = _percent(s["clean_accuracy"], s["n"])
        rows.append((s["model"] or "", s["labels"], clean, shown, s["protocol"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    bounds = "; < and >: of none or of all images, the bound at 95 %"
    is_bounded = any(sign in row[i] for row in rows for i in (2, 3) for sign in "<>")
    lines.append(f"+- is one binomial standard error{bounds * is_bounded}.")
    if any(s["labels"] != "true" for s in summaries):
        lines.append(
            "* predicted labels: only for comparison with figures from attacks called without "
            "labels; not a robust accuracy."
        )
    return "\n".join(lines)


def _percent(accuracy: float, n: int) -> str:
    return f"{percent(accuracy, n, '+-'):>11} %"


def percent(accuracy: float, n: int, sign: str = "±") -> str:
    """A share of n images in percent, with one binomial standard error: "37.7 ± 1.5".

    Of none and of all images that error is 0, which would say too much. There it is the bound that
    the share lies within at 95 % (Clopper & Pearson 1934, one-sided): "< 0.6", "> 99.4".
    """
    bound = 100 * (1 - 0.05 ** (1 / n))
    if accuracy in (0, 1):
        digits = 1 if bound >= 0.1 else 2  # "< 0.03", not "< 0.0"
        return f"> {100 - bound:.{digits}f}" if accuracy else f"< {bound:.{digits}f}"
    return f"{100 * accuracy:.1f} {sign} {100 * standard_error(accuracy, n):.1f}"
