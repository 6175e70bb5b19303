"""The trained models of the study as their folders tell: settings, history, name and order.

Read from training.json and history.csv; saved_models.py opens the network itself.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS

DATASET_LABELS = {"cifar10": "CIFAR-10"}
# Fingerprints of validation splits of images that are not quite those of the data set's authors
COPIES = {"909fb79bbfc4a2d02387c3bdd0731a0d093337eabb6fb8324fd791fa5913bac7": "a JPEG copy"}


@dataclass(frozen=True)
class TrainedModel:
    """A finished model folder: its training.json, and its history when it is asked for."""

    folder: Path
    record: dict

    @property
    def settings(self):
        return self.record["settings"]

    @property
    def activation(self):
        return self.settings["activation"]

    @property
    def dataset_label(self):
        """The data set for people: "CIFAR-10", "a JPEG copy of CIFAR-10", "digits"."""
        name = self.settings.get("dataset", "")
        label = DATASET_LABELS.get(name, name)
        record = self.record.get("dataset")
        print_of_data = record.get("validation_fingerprint") if isinstance(record, dict) else None
        return f"{COPIES[print_of_data]} of {label}" if print_of_data in COPIES else label

    @cached_property
    def history(self):
        try:
            return pd.read_csv(self.folder / "history.csv")
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}/history.csv cannot be read ({error})") from None


def trained_models(*folders):
    """The finished model folders among and below `folders`, in the order of the activations."""
    models = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{str(folder)!r} is not a folder; give model folders, or models/")
        for path in Path(folder).rglob("training.json"):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                record["settings"]["activation"]
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(f"{str(path)!r} cannot be read as a training record") from None
            models.append(TrainedModel(path.parent, record))
    models = {model.folder.resolve(): model for model in models}.values()
    return sorted(models, key=model_order)


def model_order(model):
    """Sorts models by data set, architecture, activation as in the tables, and name."""
    known = list(ACTIVATION_LABELS)
    place = known.index(model.activation) if model.activation in known else len(known)
    s = model.settings
    return (str(s.get("dataset")), str(s.get("architecture")), place, model.folder.name)


def model_labels(models):
    """A short name for each model, {folder: name}: its activation, and whatever else differs."""
    labels = {}
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


def with_training(results):
    """`read_results` with three more columns: label, activation, training (a TrainedModel or None).

    Refuses results that belong to other weights than the folder now holds.
    """
    models = {}
    for folder in dict.fromkeys(results["folder"]):
        if (Path(folder) / "training.json").exists():
            models[folder] = trained_models(folder)[0]
    for row in results.itertuples():
        model = models.get(row.folder)
        expected = model and model.record.get("model_sha256")
        if expected and row.model_sha256 and row.model_sha256 != expected:
            raise InputError(
                f"{row.path} was made with other weights than {row.folder} holds now; "
                "evaluate the model again with --force"
            )
    labels = model_labels(list(models.values()))
    return results.assign(
        label=[
            labels[models[r.folder].folder] if r.folder in models else r.model or r.folder
            for r in results.itertuples()
        ],
        activation=[models[f].activation if f in models else None for f in results["folder"]],
        training=[models.get(folder) for folder in results["folder"]],
    )
