"""What the report tells of the networks that the author of the thesis published."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS, RIDGE_KAF, STUDIED, kind_of
from kaf_study.cards import points, shown
from kaf_study.claims import WORDS, Study
from kaf_study.latex import Report, listed, networks_stand, span, tabular
from kaf_study.records import Evaluation, percent
from kaf_study.report_tests import paired
from kaf_study.seeds import UNDECIDED, difference, verdicts_of
from kaf_study.tables import below_pgd, pgd_name


def original(report: Report, table: pd.DataFrame, study: Study) -> None:
    """The networks of the original work, a `tables.original_table`.

    study: of networks trained here, whose spread between seeds is lent to them.
    """
    failed, table = table[table["failed"]], table[~table["failed"]]
    n = table.attrs["n"]["rapid"]
    left_out = [
        f"another one of {ACTIVATION_LABELS[row.activation]} "
        f"({percent(row.clean_accuracy, n)} % clean, {percent(row.rapid, n)} % under attack)"
        for row in failed.itertuples()
    ]
    activation = table["activation"].map(ACTIVATION_LABELS)
    label = activation.where(~activation.duplicated(keep=False), table["model"])
    fall = table["published_robustness"] - table["rapid"]
    files = {"file": list(table["model"])}
    cells = files | shown(table.assign(model=activation))
    cells |= {"fall": [points(value, "") for value in fall]}
    table = table.assign(model=label)
    report.tables["original"] = tabular(cells, "ll" + "r" * (len(cells) - 2))
    report.numbers |= {
        "OriginalNetworks": str(len(table)),
        "OriginalEach": "one of each activation"
        if table["activation"].is_unique
        else f"1 to {table['activation'].value_counts().max()} of each activation",
        "OriginalLeftOut": "Left out, since the training overfitted catastrophically: "
        f"{listed(left_out)}."
        if left_out
        else "None had to be left out.",
        "OriginalImages": f"{n:,}",
        "OriginalSizes": f"{n:,} images"
        + (f" (PGD: {table.attrs['n']['pgd_true']:,})" if "pgd_true" in table.attrs["n"] else ""),
        "OriginalSpan": span(table["rapid"]),
        "OriginalCleanSpan": span(table["clean_accuracy"]),
        "OriginalPublishedSpan": span(table["published_robustness"]),
        "OriginalFall": span(fall),
        "OriginalCleanFall": span(table["published_accuracy"] - table["clean_accuracy"]),
        "OriginalWithoutLabels": _without_labels(table),
    }
    evaluations = _evaluations(table)
    report.numbers["OriginalTwins"] = _twins(table, evaluations, study)
    report.numbers["OriginalOverSeeds"] = _over_seeds(table, evaluations, study)
    paired(report, table, "rapid", "Original")


def _evaluations(table: pd.DataFrame) -> dict[str, Evaluation]:
    """{folder: what `rapid` left of a network}."""
    paths = table.attrs["chosen"]["rapid"]["path"]
    return {folder: Evaluation.read(paths[folder]) for folder in table["folder"]}


def _without_labels(table: pd.DataFrame) -> str:
    """What comes of the published protocol on networks of a `tables.original_table`."""
    found = table[table["pgd_predicted"].notna() & table["pgd_true"].notna()]
    if found.empty:
        return (
            "The attack without labels was not repeated on these networks, so the fall is not "
            "taken apart."
        )
    name = pgd_name(table.attrs["chosen"]["pgd_predicted"])
    labels = found["pgd_predicted"] - found["pgd_true"]
    fall = found["published_robustness"] - found["rapid"]
    stronger = found["folder"].map(below_pgd(table.attrs["chosen"], "rapid"))
    rest = fall - labels - stronger
    return (
        f"Attacked as published, by {name} without labels on {table.attrs['n']['pgd_predicted']:,} "
        f"images, {networks_stand(len(found))} at {span(found['pgd_predicted'])} %, where "
        f"{span(found['published_robustness'])} % were published. Of the {span(fall)} points by "
        f"which these fall under rapid, the labels make {span(labels)}, the stronger attack "
        f"{span(stronger)}; {span(rest)} remain."
    )


# --------------------------------------------------------------------------- seeds


def training_named(file: str) -> str:
    """Files that differ in a last `_tmp` or `_last` are states of one training."""
    return file.removesuffix("_tmp").removesuffix("_last")


def _pairs(table: pd.DataFrame) -> Iterator[tuple[str, str, str, bool]]:
    """(activation, folder, folder, whether their names are of one training) of one activation."""
    for name, rows in table.groupby("activation", sort=False):
        for a, b in combinations(rows["folder"], 2):
            yield name, a, b, training_named(Path(a).name) == training_named(Path(b).name)


def _twins(table: pd.DataFrame, evaluations: dict[str, Evaluation], study: Study) -> str:
    """How alike two files of one activation are: as two seeds, or as two states of a training?"""
    shares: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for name, a, b, is_one_training in _pairs(table):
        share = np.mean(evaluations[a].is_clean == evaluations[b].is_clean)
        shares[is_one_training][ACTIVATION_LABELS[name]] = share
    if not shares[True]:
        return "No two files are states of one training by their names."
    here = [
        np.mean(a == b)
        for of_seeds in study.results["clean"].values()
        for a, b in combinations(of_seeds, 2)
    ]
    states, others = (" and of ".join(found) for found in shares.values())
    return (
        f"The two files of {states} are right or wrong together on {span(shares[True].values())} % "
        f"of the clean images, and their names speak of one training; those of {others} on "
        f"{span(shares[False].values())} %, two seeds of an activation trained here on "
        f"{span(here)} %."
    )


def of_each_training(table: pd.DataFrame) -> pd.DataFrame:
    """The first of the files of each training, of a `tables.original_table`."""
    return table[
        ~table["folder"].map(lambda folder: training_named(Path(folder).name)).duplicated()
    ]


def _over_seeds(table: pd.DataFrame, evaluations: dict[str, Evaluation], study: Study) -> str:
    """Verdicts of activations, not networks, with the spread between seeds of `study`."""
    results = {
        name: np.stack([evaluations[folder].is_robust for folder in rows["folder"]])
        for name, rows in of_each_training(table).groupby("activation")
    }
    noise = study.noise["robust"]
    said = []
    for reference in ("relu", "swish"):
        others = [name for name in STUDIED if name in results and name != reference]
        found = [difference(results, name, reference, noise) for name in others]
        words, *_ = verdicts_of(found)
        for word in dict.fromkeys(words):
            names = [ACTIVATION_LABELS[a] for a, w in zip(others, words, strict=True) if w == word]
            verdict = "undecided against" if word == UNDECIDED else WORDS["robust", word]
            joint = "" if word == UNDECIDED else " than" if "robust" in verdict else " to"
            verb = "is" if len(names) == 1 else "are"
            said.append(f"{listed(names)} {verb} {verdict}{joint} {ACTIVATION_LABELS[reference]}")
    return "; ".join(said)


# --------------------------------------------------------------------------- half precision


def in_half_precision(report: Report, table: pd.DataFrame, path: Path) -> None:
    """How many images get another class in float16, in which the networks were saved.

    path: a CSV of columns file, images, other_class.
    """
    counts = pd.read_csv(path).set_index("file")
    kinds = table.set_index("model")["activation"].map(kind_of).reindex(counts.index)
    if kinds.isna().any() or counts["images"].nunique() != 1:
        raise InputError(
            f"{str(path)!r} is to have one row for each original network, of as many images"
        )
    share = counts["other_class"] / counts["images"]
    is_ridge = kinds == RIDGE_KAF
    report.numbers |= {
        "HalfImages": f"{counts['images'].iloc[0]:,}",
        "HalfRidge": span(share[is_ridge]),
        "HalfOthers": points(share[~is_ridge].max(), ""),
    }
