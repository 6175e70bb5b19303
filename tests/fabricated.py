"""Records made up for tests: as a training and an evaluation write them, without either."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from kaf_study.attacks.registry import AttackSettings
from kaf_study.records import FORMAT, Evaluation, counted


def training_record(**settings):
    """The content of a training.json of three epochs."""
    return {
        "settings": {
            "dataset": "digits",
            "architecture": "resnet20",
            "activation": "kaf",
            "epochs": 3,
            "epsilon": 8 / 255,
            "seed": 0,
        }
        | settings,
        "results": {"epochs_trained": 3, "parameters": 294922, "probe_n": 512},
        "dataset": {"name": settings.get("dataset", "digits"), "train_n": 1257},
        "seconds": 240.3,
        "model_sha256": "ab",
    }


def write_training(folder, record=None):
    """training.json and history.csv in a folder, which is made; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(record or training_record()))
    history = {"epoch": [0, 1, 2], "loss": [2.3, 2.0, 1.8]}
    history |= {c: [0.1, 0.2, 0.3] for c in ("probe_clean", "probe_fgsm", "probe_pgd")}
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    return folder


def result(
    is_clean, stands, settings=None, *, dataset="cifar10", fingerprint="f", model="net", **changed
):
    """An Evaluation in which label 0 is predicted where `is_clean`, and kept where it `stands`.

    Args:
        is_clean, stands: (N,) bool. settings: AttackSettings; PGD-50-10 unless given.
        changed: entries of the summary that are others.
    """
    settings = settings or AttackSettings()
    is_clean, stands = np.asarray(is_clean), np.asarray(stands)
    n, clean = len(is_clean), np.where(is_clean, 0, 1)
    is_attacked = is_clean if settings.labels == "true" else np.ones(n, bool)
    fell = is_attacked & ~stands
    images = pd.DataFrame(
        {
            "index": np.arange(n),
            "label": 0,
            "clean_prediction": clean,
            "adversarial_prediction": np.where(fell, 1 - clean, clean),
            "restart": pd.array(np.ones(n, int), dtype="Int64"),
            "iteration": pd.array(np.zeros(n, int), dtype="Int64"),
            "linf": np.where(is_attacked, settings.epsilon, 0.0),
        }
    )
    for name in ("restart", "iteration"):
        images[name] = images[name].where(fell)
    attack = {
        name: getattr(settings, name) for name in ("epsilon", "alpha", "steps", "restarts")
    } | {"name": settings.attack}
    if settings.members != (settings,):
        first, *others = (
            {"name": m.attack, "steps": m.steps, "restarts": m.restarts} for m in settings.members
        )
        images["felled_by"] = pd.Series(first["name"], images.index).where(fell)
        left = int((is_clean & stands).sum())
        first |= {"attacked": int(is_clean.sum()), "fell": int(fell.sum())}
        attack["members"] = [first, *(m | {"attacked": left, "fell": 0} for m in others)]
    summary = {
        "format": FORMAT,
        "name": settings.stem(n, dataset),
        "protocol": settings.protocol(n, dataset),
        "attack": attack,
        "labels": settings.labels,
        "outputs": "logits",
        "dataset": {"name": dataset, "fingerprint": fingerprint},
        **counted(images, settings.labels),
        "seed": settings.seed,
        "model": model,
        "model_sha256": "ab",
    }
    return Evaluation(images, summary | changed)
