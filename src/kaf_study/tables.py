"""Which results belong beside each other: one row per model, and the paired tests between them.

Read from result files alone. `cards` puts these tables into words.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kaf_study import InputError
from kaf_study.activations import STUDIED
from kaf_study.model_folder import model_order, with_training
from kaf_study.paired import differences, outcomes
from kaf_study.records import Evaluation, is_kept

KINDS = {  # column -> which results are meant
    "pgd_true": {"attack": "pgd", "labels": "true"},
    "pgd_predicted": {"attack": "pgd", "labels": "predicted"},
    "suite": {"attack": "suite", "labels": "true"},
    "rapid": {"attack": "rapid", "labels": "true"},
    "autoattack": {"attack": "autoattack", "labels": "true"},
}
TRUE_LABELS = tuple(kind for kind, wanted in KINDS.items() if wanted["labels"] == "true")
SETTINGS = [
    "dataset", "fingerprint", "attack", "labels", "epsilon", "alpha", "steps", "restarts", "seed",
    "n",
]  # fmt: skip
SAME_FOR_ALL = ("dataset", "epsilon")
SAME_PGD = ("alpha", "steps", "restarts", "seed")

# --------------------------------------------------------------------------- one row per model


def chosen_results(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each of `KINDS` the results of one protocol: {kind: DataFrame, one row per model}.

    Where there are several protocols (other images, say, or more of them) the one that most models
    have is taken, and of those the one of most images: figures of different protocols do not mix.
    All kinds are of the data set and radius of the first one found, those of as many images of the
    same ones, and PGD is the same under both labels.
    """
    chosen: dict[str, pd.DataFrame] = {}
    for kind, wanted in KINDS.items():
        wanted = dict(wanted)
        if chosen:
            first = next(iter(chosen.values())).iloc[0]
            same = [*SAME_FOR_ALL, *(SAME_PGD if kind == "pgd_predicted" else ())]
            wanted |= {name: first[name] for name in same}
        rows = results[np.logical_and.reduce([results[k] == v for k, v in wanted.items()])]
        for other in (found.iloc[0] for found in chosen.values()):
            is_same = rows["fingerprint"] == other["fingerprint"]
            rows = rows[is_same | (rows["n"] != other["n"])]
        if rows.empty:
            continue
        groups = rows.groupby(SETTINGS, dropna=False, sort=True)
        chosen[kind] = max(
            (group for _, group in groups),
            key=lambda group: (group["folder"].nunique(), group["n"].iloc[0]),
        )
        _refuse_twins(chosen[kind], "folder", "path")
        chosen[kind] = chosen[kind].set_index("folder")
    if not chosen.keys() - {"pgd_predicted"}:
        raise InputError("no results with true labels there; make them with robustness_eval.py")
    return chosen


def _refuse_twins(rows: pd.DataFrame, column: str, places: str) -> None:
    """Two rows of one name cannot be told apart in a table, nor which of them is meant."""
    twins = rows[rows.duplicated(column, keep=False)]
    if len(twins):
        name = twins[column].iloc[0]
        where = " and ".join(twins.loc[twins[column] == name, places].iloc[:2])
        raise InputError(
            f"{where} both claim to be {name!r} under one protocol; leave one out, or rename it"
        )


def model_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per model, fractions; columns as in the CSV. `.attrs["n"]`: {kind: images}.

    The standard errors are binomial. Clean accuracy is that of `.attrs["clean_kind"]`, the kind
    that most models have (of several the one of most images), and empty for a model that lacks it:
    no column mixes sizes.

    Args:
        results: of `kaf_study.records.read_results`.
    """
    chosen = chosen_results(with_training(results))
    folders = dict.fromkeys(folder for rows in chosen.values() for folder in rows.index)
    n = {kind: int(rows["n"].iloc[0]) for kind, rows in chosen.items()}
    clean_kind = max(chosen, key=lambda kind: (len(chosen[kind]), n[kind]))
    table = []
    for folder in folders:
        found = {kind: rows.loc[folder] for kind, rows in chosen.items() if folder in rows.index}
        training = next(iter(found.values()))["training"]
        table.append((model_order(training), _row(folder, found, clean_kind)))
    frame = pd.DataFrame([row for _, row in sorted(table, key=lambda item: item[0])])
    _refuse_twins(frame, "model", "folder")
    frame.attrs |= {"n": n, "chosen": chosen, "clean_kind": clean_kind}
    return frame


def _row(folder: str, found: Mapping[str, pd.Series], clean_kind: str) -> dict:
    """One model's, from its results {kind: row of `read_results`}."""
    result = next(iter(found.values()))
    training, activation = result["training"], result["activation"]
    settings = training.settings if training else {}
    record = training.record if training else {"results": {}}
    epochs = record["results"].get("epochs_trained")
    row = {
        "model": result["model"] or Path(folder).name,
        "activation": activation,
        "architecture": settings.get("architecture"),
    }
    for name in ("clean_accuracy", "clean_standard_error"):
        row[name] = found[clean_kind][name] if clean_kind in found else np.nan
    for kind in KINDS:
        value, error = "robust_accuracy", "robust_standard_error"
        if kind == "pgd_predicted":
            value, error = (
                "accuracy_under_attack_predicted_labels",
                "standard_error_predicted_labels",
            )
        row[kind] = found[kind][value] if kind in found else np.nan
        row[f"{kind}_standard_error"] = found[kind][error] if kind in found else np.nan
    published = (np.nan, np.nan)
    if settings.get("dataset") == "cifar10" and activation in STUDIED:
        published = STUDIED[activation].published.get(settings["architecture"], published)
    return row | {
        "published_accuracy": published[0],
        "published_robustness": published[1],
        "epochs": epochs,
        "seconds_per_epoch": record["seconds"] / epochs if epochs else None,
        "parameters": record["results"].get("parameters"),
        "model_sha256": result["model_sha256"],
        "folder": folder,
    }


def original_table(results: pd.DataFrame) -> pd.DataFrame:
    """`model_table` of the networks of the original work, attacked by rapid.

    Their files, named architecture_activation_..., have no record of their training: activation,
    architecture and what was published of them come from the name, where `kafs` is a KAF and
    `kafs_freedict...` one with moving dictionaries. Column failed: fewer images stand than are
    right by guessing among ten classes. Such a training overfitted catastrophically, and says
    nothing of its activation.

    Returns:
        Rows of `model_table`, the most robust first.
    """
    table = model_table(results)
    known = {name.replace("_", ""): name for name in STUDIED} | {"kafs": "kaf"}
    names = table["model"].str.replace("_kafs_freedict", "_kaffree_")
    parts = [f"{name}_".split("_") for name in names]
    if "rapid" not in table.attrs["chosen"] or not all(part[1] in known for part in parts):
        raise InputError("original networks need results of rapid and names as resnet20_kafswish_x")
    table["architecture"] = [part[0] for part in parts]
    table["activation"] = [known[part[1]] for part in parts]
    figures = [STUDIED[known[part[1]]].published.get(part[0]) for part in parts]
    published = [figure or (np.nan, np.nan) for figure in figures]
    table[["published_accuracy", "published_robustness"]] = published
    table["failed"] = table["rapid"] < 1 / 10
    return table.sort_values("rapid", ascending=False)


def pgd_name(rows: pd.DataFrame) -> str:
    """PGD-S-R, of results of one protocol."""
    return f"PGD-{rows['steps'].iloc[0]:.0f}-{rows['restarts'].iloc[0]:.0f}"


# --------------------------------------------------------------------------- paired tests


def paired_tests(
    table: pd.DataFrame, names: Sequence[str] = (), kind: str = "pgd_true"
) -> list[pd.DataFrame]:
    """The paired tests of a table: what `against` returns, for several references.

    Args:
        names: of models, each compared with all others. None given: what the published claims
            compare with, within each architecture: "Swish is the most robust", "KAFs improve on
            ReLU"; where there is neither, the first model.
        kind: of `KINDS`, but "pgd_predicted".
    """
    if names:
        return [pairs for name in names if len(pairs := against(name, table, kind))]
    table = _with_results(table, kind)
    found = []
    for _, group in table.groupby("architecture", dropna=False, sort=False):
        if len(group) > 1:
            first = group.drop_duplicates("activation").set_index("activation")["model"]
            claimed = [first[name] for name in ("swish", "relu") if name in first]
            references = claimed or [group["model"].iloc[0]]
            found += [against(name, group, kind) for name in references]
    return found


def against(reference: str, table: pd.DataFrame, kind: str = "pgd_true") -> pd.DataFrame:
    """Each model of a table against a reference on the same images.

    Args:
        reference: name of a model. table: of `model_table`. kind: as in `paired_tests`.

    Returns:
        `paired.differences`, and a column attack.

    Raises:
        InputError: if the reference is not there, or results are not of the same images.
    """
    table = _with_results(table, kind)
    names = list(table["model"])
    if reference not in names:
        raise InputError(
            f"--reference {reference!r} is not among {', '.join(names) or 'the models'} with "
            f"results of {kind}"
        )
    rows = table.attrs["chosen"][kind]
    paths = {
        name: rows.loc[folder, "path"] for name, folder in zip(names, table["folder"], strict=True)
    }
    frame = differences(read_outcomes(paths, reference), reference)
    if len(frame):
        frame.insert(2, "attack", pgd_name(rows) if kind == "pgd_true" else kind)
    return frame


def read_outcomes(paths: Mapping[str, str], reference: str) -> dict[str, pd.DataFrame]:
    """What became of each image: {name: `paired.outcomes`} of results {name: .json}.

    Refuses data of another fingerprint, or other images, than the reference's.
    """
    found = {name: Evaluation.read(path) for name, path in paths.items()}
    data = {name: result.summary["dataset"].get("fingerprint") for name, result in found.items()}
    for name in found:
        if data[name] != data[reference]:
            raise InputError(
                f"{name} and {reference} were attacked on different images; evaluate both alike"
            )
    return {
        name: outcomes(result.images["index"], result.is_clean, result.is_robust)
        for name, result in found.items()
    }


def _with_results(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a table whose models have results of a kind."""
    rows = table.attrs["chosen"].get(kind)
    return table[table["folder"].isin(rows.index)] if rows is not None else table[:0]


# --------------------------------------------------------------------------- attacks and protocols


def below_pgd(chosen: Mapping[str, pd.DataFrame], kind: str) -> dict[str, float]:
    """{folder: how far a model's figure under an attack lies below PGD's, on the images of both}.

    Args:
        chosen: of `chosen_results`. kind: of `KINDS`, with true labels.
    """
    pgd, other = (chosen.get(name, pd.DataFrame()) for name in ("pgd_true", kind))
    return {folder: float(a.mean() - b.mean()) for folder, a, b in _stand_under_both(pgd, other)}


def _stand_under_both(
    first: pd.DataFrame, second: pd.DataFrame
) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[np.bool_]]]:
    """(folder, which images stand under one attack, and the other), on the images of both."""
    for folder in second.index.intersection(first.index):
        stand = [Evaluation.read(rows.loc[folder, "path"]).is_robust for rows in (first, second)]
        n = min(map(len, stand))
        yield folder, stand[0][:n], stand[1][:n]


def rapid_beside_stronger(results: pd.DataFrame) -> pd.DataFrame:
    """`rapid`'s verdicts and those of the suite and of AutoAttack, on the images of both.

    Image by image, so that networks may have been attacked on different numbers of images; of
    several results of a network that of most images counts.

    Args:
        results: of `kaf_study.records.read_results`.

    Returns:
        DataFrame, a row for each network and stronger attack: model, attack (of `KINDS`), n
        (images), stronger and rapid (how many stand), only_stronger and only_rapid (how many that
        attack alone felled). Empty where no network has both.
    """
    rows = []
    rapid = chosen_results(results).get("rapid", pd.DataFrame())
    for kind in ("suite", "autoattack"):
        is_it = results["attack"] == kind
        for name in SAME_FOR_ALL if len(rapid) else ():
            is_it &= results[name] == rapid[name].iloc[0]
        other = results[is_it].sort_values(["folder", "n"]).drop_duplicates("folder", keep="last")
        for folder, stronger, quick in _stand_under_both(other.set_index("folder"), rapid):
            rows.append(
                {
                    "model": rapid.loc[folder, "model"] or Path(folder).name,
                    "attack": kind,
                    "n": len(quick),
                    "stronger": int(stronger.sum()),
                    "rapid": int(quick.sum()),
                    "only_stronger": int((quick & ~stronger).sum()),
                    "only_rapid": int((stronger & ~quick).sum()),
                }
            )
    return pd.DataFrame(rows)


def label_protocols(chosen: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What an attack without labels adds to PGD's figure, image by image; one row per model.

    Returns:
        Indexed by folder, fractions: true, predicted, the figures under both label protocols;
        added = predicted - true = wrong + counting, where wrong is the share of images that are
        wrong when clean and were pushed onto their class, and counting what judging each restart at
        its last iterate adds among the others; pushed, the share of the wrong images that were
        pushed so; later, the share of images that the first restart, with true labels, left
        standing and another felled: more than that the worst of whole runs cannot hide.
    """
    rows = {}
    pgd, other = (chosen.get(name, pd.DataFrame()) for name in ("pgd_true", "pgd_predicted"))
    for folder in pgd.index.intersection(other.index):
        true, predicted = (Evaluation.read(found.loc[folder, "path"]) for found in (pgd, other))
        kept, clean = is_kept(predicted.images), true.is_clean
        rows[folder] = {
            "true": true.is_robust.mean(),
            "predicted": kept.mean(),
            "added": kept.mean() - true.is_robust.mean(),
            "wrong": (~clean & kept).mean(),
            "counting": (clean & kept).mean() - true.is_robust.mean(),
            "pushed": kept[~clean].mean(),
            "later": (true.images["restart"].fillna(0) > 1).mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
