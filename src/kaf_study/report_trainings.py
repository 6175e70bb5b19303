"""What the report tells of trainings, from their records and histories, and of what KAFs cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS
from kaf_study.cards import NONE, points
from kaf_study.latex import Report, listed, tabular
from kaf_study.mechanism import by_activation, conclusions, curvature_table, shown
from kaf_study.model_folder import TrainedModel
from kaf_study.records import read_json


def first_rate(s: Mapping[str, Any]) -> float:
    return s["lr_min"] + s["lr_start"] * (s["lr_max"] - s["lr_min"])


def validation(model: TrainedModel, what: str) -> float:
    return model.record["results"].get(f"validation_{what}", np.nan)


def trainings(report: Report, models: Sequence[TrainedModel], results: pd.DataFrame) -> None:
    """Every network in models/, and what stands under attacks of the study's radius."""
    radius = results["epsilon"].mode().iloc[0]
    is_told = (results["labels"] == "true") & (results["epsilon"] == radius)
    under = {
        folder: ", ".join(
            f"{Path(row.path).stem.replace('-true', '')} {points(row.robust_accuracy, '')}"
            for row in rows.itertuples()
        )
        for folder, rows in results[is_told].groupby("folder")
    }
    report.tables["all"] = tabular(
        {
            "network": [model.folder.name for model in models],
            "epochs": [model.record["results"]["epochs_trained"] for model in models],
            "clean*": [points(validation(model, "clean"), "") for model in models],
            "PGD-10*": [points(validation(model, "pgd"), "") for model in models],
            "robust, test images": [under.get(str(model.folder), NONE) for model in models],
        },
        "lrrrl",
    )
    report.numbers["NetworksTrained"] = str(len(models))


def over_seeds(report: Report, models: Sequence[TrainedModel]) -> None:
    """Mean and standard deviation over seeds of one recipe, on the validation images."""
    rows = [
        {"activation": m.activation, "clean": validation(m, "clean"), "pgd": validation(m, "pgd")}
        for m in models
    ]
    groups = pd.DataFrame(rows).groupby("activation", sort=False)
    mean, sd, seeds = groups.mean(), groups.std(), groups.size()
    cells = {"activation": [ACTIVATION_LABELS[a] for a in mean.index], "seeds": list(seeds)}
    for what, title in (("clean", "clean"), ("pgd", "PGD-10")):
        cells[f"{title}, mean"] = [points(v, "") for v in mean[what]]
        cells[f"{title}, s.d."] = [points(v, "") for v in sd[what]]
    report.tables["validation"] = tabular(cells)
    df = int((seeds - 1).sum())
    pooled = np.sqrt((sd["pgd"] ** 2 * (seeds - 1)).sum() / df) if df else np.nan
    swish = mean["pgd"].get("swish", np.nan) - mean["pgd"].get("relu", np.nan)
    report.numbers |= {
        "NetworksAlike": str(len(models)),
        "ValidationSwishOverReLU": points(swish),
        "ValidationSpread": points(pooled, ""),
        "ValidationFreedom": str(df),
        "ValidationSeveral": str(int((seeds > 1).sum())),
        "ValidationActivations": str(len(seeds)),
    }


def mechanism(report: Report, models: Sequence[TrainedModel]) -> None:
    """Curvature before and after training, and what `mechanism` says of it."""
    networks = curvature_table(models)
    cells = shown(by_activation(networks))
    del cells["kind"]
    report.tables["curvature"] = tabular(cells)
    shapes, verdict = conclusions(networks)
    report.numbers |= {
        "CurvatureNetworks": str(len(networks)),
        "CurvatureShapes": shapes,
        "CurvatureVerdict": verdict,
    }


MOVED = 0.1  # less than this is told as no change of the curvature


def curvature_by_epoch(report: Report, models: Sequence[TrainedModel]) -> None:
    """The median curvature over the layers, epoch by epoch, where it was recorded."""
    rows = []
    for model in models:
        layers = model.history.filter(like="curvature_")
        if layers.empty:
            continue
        median, last = layers.median(axis=1), layers.iloc[-1]
        epochs = (0, len(median) // 2, len(median) - 1)
        rows.append(
            {"activation": ACTIVATION_LABELS[model.activation]}
            | {f"epoch {epoch + 1}": median[epoch] for epoch in epochs}
            | {
                "lowest layer": last.min(),
                "highest": last.max(),
                "moved": last.median() - median[0],
            }
        )
    if not rows:
        raise InputError("no history has a curvature_1; train a network with this version")
    groups = pd.DataFrame(rows).groupby("activation", sort=False)
    mean = groups.mean()
    moved = mean.pop("moved")
    cells: dict[str, Sequence[object]] = {"activation": list(mean.index)}
    cells["networks"] = list(groups.size())
    cells |= {name: [f"{value:.2f}" for value in mean[name]] for name in mean}
    report.tables["curvature_by_epoch"] = tabular(cells)
    report.numbers |= {
        "CurvatureTrainings": str(len(rows)),
        "CurvatureRose": listed(list(moved.index[moved >= MOVED])) or "none",
        "CurvatureFell": listed(list(moved.index[moved <= -MOVED])) or "none",
        "CurvatureStayed": listed(list(moved.index[moved.abs() < MOVED])) or "none",
        "CurvatureMoved": f"{MOVED:g}",
    }


def pilots(report: Report, models: Sequence[TrainedModel]) -> None:
    """The short trainings that the recipe was chosen by, and those that overfitted."""
    stopped = [m.record["results"]["catastrophic_overfitting_in_epoch"] for m in models]
    cells = {
        "pilot": [model.folder.name for model in models],
        "activation": [ACTIVATION_LABELS[model.activation] for model in models],
        "first rate": [f"{first_rate(model.settings):.2g}" for model in models],
        "peak": [f"{model.settings['lr_max']:g}" for model in models],
        "epochs": [model.record["results"]["epochs_trained"] for model in models],
    }
    for what, name in (("clean", "clean"), ("pgd", "PGD-10")):
        cells[name] = [points(validation(model, what), "") for model in models]
    last = [model.history.iloc[-1] for model in models]
    cells["own attack"] = [points(row["accuracy"], "") for row in last]
    cells["PGD-10, last"] = [points(row["probe_pgd"], "") for row in last]
    cells["stopped"] = [NONE if epoch is None else f"epoch {epoch + 1}" for epoch in stopped]
    report.tables["pilots"] = tabular(cells, "ll" + "r" * (len(cells) - 2))
    report.numbers["PilotsStopped"] = str(sum(epoch is not None for epoch in stopped))


LAYER = ("layer", "shapes", "128x32x32x16", "forward and gradients", "to kaf")
STEP = ("step", "resnet20", "to swish")
COSTS = {  # macro: (what it is, where it lies in benchmarks/results.json)
    "CostKaf": ("a ResNet20's training step, KAF / Swish", *STEP, "kaf"),
    "CostKafFree": ("a ResNet20's training step, KAF_Free / Swish", *STEP, "kaf_free"),
    "CostReLU": ("a ResNet20's training step, ReLU / Swish", *STEP, "relu"),
    "CostPlain": ("one layer and its gradients, plain / factored", *LAYER, "kaf plain"),
    "CostCompiled": ("the same, plain formula compiled", *LAYER, "kaf plain compiled"),
}


def cost(report: Report, path: Path, wide: Path) -> None:
    """Ratios measured within one run, of the benchmarks; `wide`: on a processor with AVX-512."""
    rows: dict[str, list[str]] = {"ratio": [], "median": [], "quartiles": [], "AVX-512": []}
    for macro, (title, *keys) in COSTS.items():
        value, on_wide = (_ratio(file, keys) for file in (path, wide))
        report.numbers[macro] = f"{value['median']:.3g}"
        rows["ratio"].append(title)
        rows["median"].append(report.numbers[macro])
        rows["quartiles"].append(" to ".join(f"{end:.3g}" for end in value["quartiles"]))
        rows["AVX-512"].append(f"{on_wide['median']:.3g}")
    report.tables["cost"] = tabular(rows)


def _ratio(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What lies under keys in a file of benchmarks: the median and the quartiles of a ratio."""
    value: Any = read_json(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not {"median", "quartiles"} <= value.keys():
        raise InputError(f"{str(path)!r} lacks {'/'.join(keys)}; run benchmarks/run.py all")
    return value


def held(report: Report, path: Path) -> None:
    """What AutoAttack as written here was held against, of benchmarks/against_autoattack.py."""
    verdicts = [
        network["verdicts"] for network in read_json(path).values() if "verdicts" in network
    ]
    for macro, key in (("HeldImages", "images"), ("HeldSame", "same verdict")):
        report.numbers[macro] = f"{sum(found[key] for found in verdicts):,}"
    report.numbers["HeldNetworks"] = (
        "one network" if len(verdicts) == 1 else f"{len(verdicts)} networks"
    )
