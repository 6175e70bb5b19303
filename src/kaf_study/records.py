"""The files an evaluation leaves, and the tables drawn from them.

A result is two files, `NAME.json` (settings, figures, versions) and `NAME.csv` (one row per
image); `kaf_study.evaluation` says how NAME is made. Files appear complete or not at all, the
.json last: where it is, the evaluation was finished. Nothing here needs a model or TensorFlow.
"""

import contextlib
import json
import math
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd

from kaf_study import InputError

FORMAT = "robustness-1"

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
    "outputs",
    "seconds",
    "model_sha256",
    "folder",
    "path",
]


@dataclass(frozen=True)
class Evaluation:
    """The result of one attack on one model.

    images: DataFrame, one row per image: index, label, clean_prediction, adversarial_prediction,
        restart (from 1) and iteration (0 is the random start) at which it fell, empty if it stood
        or was not attacked, linf = |x_adv - x|_inf as measured; of a suite also felled_by, the
        member that felled it.
        Recount, true labels: robust = (label == clean_prediction) & (label ==
        adversarial_prediction); predicted labels: label == adversarial_prediction.
    summary: dict, as in the JSON file. Accuracies are fractions.
    x_adv: the attacked images (N, H, W, C), or None if read from files.
    """

    images: pd.DataFrame
    summary: dict
    x_adv: np.ndarray | None = None

    @property
    def stem(self):
        return self.summary["name"]

    @property
    def is_clean(self) -> pd.Series:
        """Which images are classified correctly before the attack: bool, by position."""
        return self.images["label"] == self.images["clean_prediction"]

    @property
    def is_robust(self) -> pd.Series:
        """Which are so before and after it, under true labels: bool, by position."""
        return self.is_clean & (self.images["label"] == self.images["adversarial_prediction"])

    def write(self, directory):
        """Write the .csv and then the .json (whose presence means: finished); return its path."""
        directory = Path(directory)
        make_writable(directory)
        csv = self.images.to_csv(index=False, lineterminator="\n", float_format="%.9g")
        write_atomically(directory / f"{self.stem}.csv", csv.encode())
        path = directory / f"{self.stem}.json"
        write_atomically(path, (json.dumps(self.summary, indent=2) + "\n").encode())
        return path

    @classmethod
    def read(cls, path):
        """The result whose .json is at `path`."""
        path = Path(path)
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            images = pd.read_csv(
                path.with_suffix(".csv"), dtype={"restart": "Int64", "iteration": "Int64"}
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{str(path)!r} cannot be read as a result ({error})") from None
        if not isinstance(summary, dict) or summary.get("format") != FORMAT:
            raise InputError(f"{str(path)!r} is not a result file of this program")
        return cls(images, summary)


def standard_error(accuracy, n):
    """Binomial standard error of an accuracy (a fraction) over n images."""
    return float(math.sqrt(accuracy * (1 - accuracy) / n))


def versions():
    found = {"python": platform.python_version()}
    for name in ("tensorflow", "keras", "adversarial-robustness-toolbox", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # e.g. tensorflow-cpu under its own name
            found[name] = "unknown"
    return found


def hardware():
    """The machine in one line: processor, cores, GPUs."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    import tensorflow as tf

    gpus = len(tf.config.list_physical_devices("GPU"))
    return f"{processor}, {os.cpu_count()} cores, {gpus or 'no'} GPU{'s' if gpus > 1 else ''}"


def make_writable(directory):
    """Create a folder, or say in one line why nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {str(directory)!r} ({error.strerror}); choose another --out"
        ) from None


def write_atomically(path, content):
    """The file is there complete or not at all, also if the process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {str(path)!r} ({error.strerror})") from None


def read_results(*folders):
    """All results below the given folders, one row each: what tables and figures are drawn from.

    Columns: see `COLUMNS`. robust_accuracy and its error are empty unless labels are true, the
    columns that end in `_predicted_labels` unless labels are predicted; folder is the model folder
    or, for other models, the folder of results; path is the .json file.
    """
    paths = sorted({p for folder in folders for p in Path(folder).rglob("*.json")})
    rows = []
    for path in {p.resolve(): p for p in paths}.values():  # each file once, however it is named
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if not isinstance(summary, dict) or summary.get("format") != FORMAT:
            continue
        attack, data = summary["attack"], summary["dataset"]
        in_model_folder = path.parent.name == "robustness"
        rows.append(
            {column: summary.get(column) for column in COLUMNS}
            | {name: attack.get(name) for name in ("epsilon", "alpha", "steps", "restarts")}
            | {
                "attack": attack["name"],
                "dataset": data["name"],
                "folder": str(path.parent.parent if in_model_folder else path.parent),
                "path": str(path),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def results_table(summaries):
    """The table of a command: one line per result, standard errors beside each figure.

    `±` is one binomial standard error. Figures with predicted labels are starred, with the reason.
    """
    rows = [("model", "labels", "clean", "under attack", "protocol")]
    for s in summaries:
        if s["labels"] == "true":
            shown = f"{_percent(s['robust_accuracy'], s['robust_standard_error'])} "
        else:
            value = s["accuracy_under_attack_predicted_labels"]
            shown = f"{_percent(value, s['standard_error_predicted_labels'])}*"
        clean = _percent(s["clean_accuracy"], s["clean_standard_error"])
        rows.append((s["model"] or "", s["labels"], clean, shown, s["protocol"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append("+- is one binomial standard error.")
    if any(s["labels"] != "true" for s in summaries):
        lines.append(
            "* predicted labels: only for comparison with figures from attacks called without "
            "labels; not a robust accuracy."
        )
    return "\n".join(lines)


def _percent(accuracy, error):
    return f"{100 * accuracy:5.1f} +- {100 * error:.1f} %"
