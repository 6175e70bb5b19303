"""The folder of a trained model, `models/NAME/`: what lies where in it, and how it comes to be.

    model.keras      the plain network
    training.json    settings, results, versions; written last: it says finished
    history.csv      one row per epoch
    robustness/      results and sanity checks (`kaf_study.records`)
    curvature.json   how curved its activations are (`kaf_study.mechanism`)
    unfinished/      settings and checkpoint of a training that is not finished

`kaf_study.saved_models` opens the network; nothing here needs TensorFlow.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS
from kaf_study.config import TrainConfig
from kaf_study.files import (
    file_sha256,
    locked,
    make_writable,
    replacing,
    write_atomically,
)
from kaf_study.records import (
    CurvatureRecord,
    completed,
    read_history,
    read_json,
    read_training,
    write_json,
)

DATASET_LABELS = {"cifar10": "CIFAR-10"}
# Fingerprints of validation splits of images that are not quite those of the data set's authors
COPIES = {"909fb79bbfc4a2d02387c3bdd0731a0d093337eabb6fb8324fd791fa5913bac7": "a JPEG copy"}


def dataset_label(name: str, validation_fingerprint: str | None) -> str:
    """The data set for people: "CIFAR-10", "a JPEG copy of CIFAR-10", "digits".

    Args:
        validation_fingerprint: of `datasets.fingerprint`, of the validation split.
    """
    label, copy = DATASET_LABELS.get(name, name), COPIES.get(validation_fingerprint or "")
    return f"{copy} of {label}" if copy else label


class ModelFolder:
    """A folder that is empty, holds an unfinished training, or a finished one (training.json)."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.record = self.path / "training.json"
        self.model = self.path / "model.keras"
        self.history = self.path / "history.csv"
        self.robustness = self.path / "robustness"
        self.curvature = self.path / "curvature.json"
        self.unfinished = self.path / "unfinished"
        self.settings = self.unfinished / "settings.json"
        self.checkpoint = self.unfinished / "checkpoint.npz"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out must be a folder; {self.path} is a file. Name another.")

    def locked(self) -> AbstractContextManager[None]:
        """Holds the folder for one training; a second one gets an InputError."""
        return locked(self.path / ".training.lock")

    def finished_run(self, config: TrainConfig) -> dict[str, Any] | None:
        """The record of a finished run of these settings, or None when there is work to do."""
        if self.record.exists():
            finished = read_training(self.record)
            self._refuse_other_settings(finished["settings"], config)
            return finished
        if self.settings.exists():
            begun = read_json(self.settings, TrainConfig)
            self._refuse_other_settings(completed(begun), config)
        elif self.model.exists():
            raise InputError(
                f"{self.path} holds a model.keras without training.json. "
                "Name another --out, or --force to replace it."
            )
        return None

    def _refuse_other_settings(self, settings: dict[str, Any], config: TrainConfig) -> None:
        asked = asdict(config)
        differing = [
            f"{name}: there {settings.get(name)!r}, asked {asked.get(name)!r}"
            for name in sorted(settings | asked)
            if settings.get(name) != asked.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.path} belongs to a run of other settings ({'; '.join(differing)}). "
                "Name another --out, or --force to start anew."
            )

    def start(self, config: TrainConfig, *, force: bool) -> None:
        """Makes the folder, which is locked, ready for a run of these settings, new or resumed."""
        if force:
            for lock in self.robustness.glob(".*.lock"):
                with locked(lock):
                    pass  # no evaluation is under way
            # robustness/ holds figures of the old weights: it must not outlive them.
            for folder in (self.robustness, self.unfinished):
                if folder.exists():
                    shutil.rmtree(folder)
            for path in (self.record, self.model, self.history, self.curvature):
                path.unlink(missing_ok=True)
        elif self.record.exists():
            raise InputError(f"{self.path} was finished by another process in the meantime.")
        make_writable(self.unfinished)
        write_json(self.settings, asdict(config))

    def finish(
        self,
        save: Callable[[Path], None],
        history: list[dict[str, float]],
        record: dict[str, Any],
    ) -> dict[str, Any]:
        """Writes everything; training.json, whose presence says finished, comes last.

        Args:
            save: writes the network to the path it is given.
            history: one row per epoch. record: as in training.json, but for the model's hash.
        """
        with replacing(self.model) as temporary:
            save(temporary)
        write_atomically(self.history, pd.DataFrame(history).to_csv(index=False).encode())
        record |= {"model_sha256": file_sha256(self.model)}
        write_json(self.record, record)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return record

    def tidy(self) -> None:
        """Removes what a run left that was killed just after it had finished."""
        if self.unfinished.exists():
            with self.locked():
                if self.record.exists():  # else it is of a run that has begun since
                    shutil.rmtree(self.unfinished, ignore_errors=True)


@dataclass(frozen=True)
class TrainedModel:
    """A finished model folder: its training.json, and its history when it is asked for."""

    folder: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path | str) -> "TrainedModel":
        return cls(Path(folder), read_training(ModelFolder(folder).record))

    @property
    def settings(self) -> dict[str, Any]:
        return self.record["settings"]

    @property
    def activation(self) -> str:
        return self.settings["activation"]

    @property
    def dataset_label(self) -> str:
        """As of the function `dataset_label`."""
        fingerprint = self.record.get("dataset", {}).get("validation_fingerprint")
        return dataset_label(self.settings["dataset"], fingerprint)

    @property
    def curvature(self) -> dict[str, Any] | None:
        """`records.CurvatureRecord`, or None where it was not measured, or of other weights."""
        path = ModelFolder(self.folder).curvature
        record = read_json(path, CurvatureRecord) if path.exists() else {}
        return record if record.get("model_sha256") == self.record.get("model_sha256") else None

    @cached_property
    def history(self) -> pd.DataFrame:
        epochs = self.record["results"]["epochs_trained"]
        return read_history(ModelFolder(self.folder).history, epochs)


def trained_models(*folders: Path | str) -> list[TrainedModel]:
    """The finished model folders among and below `folders`, in the order of the activations."""
    models = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{str(folder)!r} is not a folder; give model folders, or models/")
        for path in Path(folder).rglob("training.json"):
            models[path.parent.resolve()] = TrainedModel.read(path.parent)
    return sorted(models.values(), key=model_order)


def model_order(model: TrainedModel | None) -> tuple[bool, str, str, int, str]:
    """Sorts models by data set, architecture, activation as in the tables, and name; None last."""
    if model is None:
        return (True, "", "", 0, "")
    known = list(ACTIVATION_LABELS)
    place = known.index(model.activation) if model.activation in known else len(known)
    s = model.settings
    return (False, str(s.get("dataset")), str(s.get("architecture")), place, model.folder.name)


def model_labels(models: Iterable[TrainedModel]) -> dict[Path, str]:
    """A short name for each model, {folder: name}: its activation, and whatever else differs."""
    models, labels = list(models), {}
    for model in models:
        label = ACTIVATION_LABELS.get(model.activation, model.activation)
        for setting in ("dataset", "architecture", "epochs", "seed"):
            values = {str(other.settings.get(setting)) for other in models}
            if len(values) > 1:
                value = model.settings.get(setting)
                label += f", {value}" if isinstance(value, str) else f", {setting} {value}"
        labels[model.folder] = label
    given = list(labels.values())
    return {
        folder: f"{label}, {folder.name}" if given.count(label) > 1 else label
        for folder, label in labels.items()
    }


def common_training(models: Iterable[TrainedModel]) -> str:
    """What the models have in common, in words: "ResNet20 on CIFAR-10 (15 epochs of ...)"."""
    models = list(models)

    def shared(values):
        values = set(values)
        return values.pop() if len(values) == 1 else None

    architecture = shared(model.settings.get("architecture") for model in models)
    names = {"light_cnn": "light CNN", "vgg": "VGG", None: "accuracy and robustness"}
    words = [names.get(architecture) or re.sub(r"^resnet", "ResNet", architecture)]
    if dataset := shared(model.dataset_label for model in models):
        words.append(f"on {dataset}")
    if epochs := shared(model.settings.get("epochs") for model in models):
        kinds = {True: "ordinary ", False: "fast adversarial ", None: ""}
        kind = kinds[shared(model.settings.get("epsilon") == 0 for model in models)]
        words.append(f"({epochs} epochs of {kind}training)")
    return " ".join(words)


def with_training(results: pd.DataFrame) -> pd.DataFrame:
    """`read_results` with three more columns: label, activation, training (a TrainedModel or None).

    Refuses results that belong to other weights than the folder now holds.
    """
    models = {}
    for folder in dict.fromkeys(results["folder"]):
        if ModelFolder(folder).record.exists():
            models[folder] = TrainedModel.read(folder)
    for row in results.itertuples():
        model = models.get(row.folder)
        expected = model and model.record.get("model_sha256")
        if expected and row.model_sha256 and row.model_sha256 != expected:
            raise InputError(
                f"{row.path} was made with other weights than {row.folder} holds now; "
                "evaluate the model again with --force"
            )
    labels = model_labels(list(models.values()))
    columns: dict[str, list[Any]] = {"label": [], "activation": [], "training": []}
    for row in results.itertuples():
        model = models.get(row.folder)
        columns["label"].append(labels[model.folder] if model else row.model or row.folder)
        columns["activation"].append(model.activation if model else None)
        columns["training"].append(model)
    return results.assign(**columns)
