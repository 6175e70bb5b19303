"""The tests of the report: of networks on the same images, of activations over seeds, in words.

The statistics are those of `paired` and `seeds`, by way of `tables` and `claims`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS, STUDIED, is_trained_kaf
from kaf_study.cards import points, shown_claims, shown_means, shown_pairs, told_apart
from kaf_study.claims import Study, beside_originals, claims_table, means
from kaf_study.latex import Report, listed, span, tabular
from kaf_study.model_folder import common_training
from kaf_study.paired import LEVEL
from kaf_study.seeds import UNDECIDED
from kaf_study.tables import paired_tests

MOST_ROBUST, KAFS_ROBUST = "Swish is the most robust", "KAFs are more robust than ReLU"
WORDS, CLEAN_WORDS = ("more robust", "less robust"), ("more accurate", "less accurate")


def paired(report: Report, table: pd.DataFrame, kind: str, name: str) -> None:
    """The paired tests against ReLU and Swish of a table whose models bear the report's names."""
    known = table.drop_duplicates("activation").set_index("activation")["model"]
    activations = table.set_index("model")["activation"]
    named = partial(_named, of=activations)
    above: dict[str, list[str]] = {}
    reaches: list[float] = []
    for reference, sign in (("relu", 1), ("swish", -1)):
        tests = paired_tests(table, [known[reference]], kind) if reference in known else []
        if not tests:
            raise InputError(f"no networks of ReLU and Swish with results of {kind} to compare")
        (pairs,) = tests
        key = name + ACTIVATION_LABELS[reference]
        report.tables[f"paired_{key}"] = tabular(shown_pairs(pairs))
        report.numbers |= {
            f"{key}Robust": told_apart(pairs, "p_holm", "robust_difference", WORDS, named),
            f"{key}Clean": told_apart(
                pairs, "clean_p_holm", "clean_difference", CLEAN_WORDS, named
            ),
        }
        reaches += list((pairs["high"] - pairs["low"]) / 2)
        found = pairs[(pairs["p_holm"] < LEVEL) & (sign * pairs["robust_difference"] > 0)]
        above[reference] = list(activations[found["model"]])
        for row in pairs[pairs["model"] == known.get("swish")].itertuples():
            interval = f"{points(row.low)} to {points(row.high)}"
            report.numbers[f"{name}SwishOverReLU"] = f"{points(row.robust_difference)} ({interval})"
    report.numbers[f"{name}HalfWidth"] = span(reaches)
    answers(report, name, above, sorted(set(activations), key=list(STUDIED).index))


def _named(models: Iterable[str], of: pd.Series) -> str:
    """ "Swish, both of KAF, one of two of ELU": models by their activation, which is `of` them."""
    counts = of[list(models)].value_counts(sort=False)
    return ", ".join(
        (f"{_count(n, total)} of " if (total := int((of == name).sum())) > 1 else "")
        + ACTIVATION_LABELS[name]
        for name, n in counts.items()
    )


def _count(n: int, total: int) -> str:
    if n < total:
        return f"{n} of {total}"
    return "both" if n == 2 else f"all {n}"


def answers(
    report: Report, name: str, above: Mapping[str, Sequence[str]], tested: Sequence[str]
) -> None:
    """Two sentences, of above: {"relu": what is above ReLU, "swish": what Swish is above}."""
    kafs = [a for a in tested if is_trained_kaf(a)]
    better = [ACTIVATION_LABELS[a] for a in kafs if a in above["relu"]]
    worse = [ACTIVATION_LABELS[a] for a in tested if a in above["swish"]]
    report.numbers |= {
        f"{name}KafAnswer": f"of {len(kafs)} kinds of trainable activation "
        f"{listed(better) or 'none'} {'are' if better[1:] else 'is'} shown to be more robust than "
        "ReLU",
        f"{name}SwishAnswer": f"of {len(tested) - 1} other activations "
        f"{listed(worse) or 'none'} {'are' if worse[1:] else 'is'} shown to be less robust than "
        "Swish",
    }


def verdicts(report: Report, study: Study, originals: pd.DataFrame, *, answers_all: bool) -> None:
    """Means and verdicts over seeds, beside differences of `tables.original_table`.

    Where there are several, the answers come from these, if the study has all activations.
    """
    if not study.has_claims:
        raise InputError(
            "no claim is of two activations that were attacked alike; there are "
            f"{listed([ACTIVATION_LABELS[name] for name in study.seeds])}"
        )
    averages = means(study)
    claims = beside_originals(claims_table(study), originals, study.architecture)
    report.tables["means"] = tabular(shown_means(averages))
    cells = shown_claims(claims.assign(why=""))
    heads = cells.pop("claim")
    report.tables["claims"] = tabular(cells, "ll" + "r" * (len(cells) - 2), heads)
    rows: dict[str, list[Any]] = {}
    for text, pairs in claims.groupby("claim", sort=False):
        said = [str(verdict).split(" ")[0] for verdict in pairs["verdict"]]
        row = {
            "claim": text,
            "pairs": len(pairs),
            "published": (pairs["published"] > 0).sum(),
            "here": (pairs["difference"] > 0).sum(),
        } | {word: said.count(word) for word in ("more", "less", "equal", "undecided")}
        for column, value in row.items():
            rows.setdefault(column, []).append(value)
    report.tables["verdicts"] = tabular(rows)
    several, undecided = study.has_several_seeds, sum(rows["undecided"])
    sd = {measure: points(value, "") for measure, value in averages.attrs["sd"].items()}
    report.numbers |= {
        "PairsTested": str(len(claims)),
        "PairsUndecided": str(undecided),
        "WhatRemains": (
            f"{'All' if undecided == len(claims) else undecided or 'None'} of the {len(claims)} "
            f"comparisons over seeds {'is' if undecided < 2 else 'are'} undecided"
            + ", and with them the question of how much of any difference is the activation and "
            "how much the training that happened to be run" * (undecided == len(claims))
        ),
        "TestedOver": "over seeds and images"
        if several and answers_all
        else "on the images, one network of each",
        "SeedsAnswer": "; ".join(decided(claims)) or "no pair is told apart",
        "SeedSpread": f"The standard deviation between seeds, pooled over the activations, is "
        f"{sd['clean']} points of clean and {sd['robust']} points of robust accuracy."
        if several
        else "As there is one seed of each activation, the variance between trainings is unknown, "
        "and every verdict over seeds is undecided.",
    }
    if several and answers_all:
        sure = claims[claims["verdict"] == WORDS[0]]
        seen = {
            "relu": list(sure["first"][sure["claim"] == KAFS_ROBUST]),
            "swish": list(sure["second"][sure["claim"] == MOST_ROBUST]),
        }
        answers(report, "Study", seen, list(study.seeds))


def elsewhere(report: Report, others: Sequence[Study]) -> None:
    """The verdicts of other studies, which have one seed of each activation; a sentence each."""
    report.numbers["Elsewhere"] = " ".join(
        f"{common_training(study.models)}, {len(study.seeds)} activations, {study.n:,} images: "
        f"{'; '.join(decided(claims_table(study))) or 'no pair is told apart'}"
        + ", with the spread between seeds of the networks above" * (study.lender is not None)
        + "."
        for study in others
        if study.has_claims
    )


def decided(claims: pd.DataFrame) -> list[str]:
    """The pairs with a verdict, each once: "Swish (+1.5 points, ...) is more robust than ReLU".

    Several against the same activation stand together, of the others those of the same activation
    against several. Intervals are of each pair alone, at 95 %.
    """
    sure = claims[claims["verdict"] != UNDECIDED].drop_duplicates(["measure", "first", "second"])
    said = []
    for (measure, verdict), pairs in sure.groupby(["measure", "verdict"], sort=False):
        is_shared = pairs["second"].duplicated(keep=False)
        for one, of in (("second", pairs[is_shared]), ("first", pairs[~is_shared])):
            for name, rows in of.groupby(one, sort=False):
                said.append(_sentence(rows, one, ACTIVATION_LABELS[name], verdict, measure))
    return said


def _sentence(rows: pd.DataFrame, one: str, name: str, verdict: str, measure: str) -> str:
    """Of pairs whose `one`, "first" or "second", is the same."""
    others = [
        f"{ACTIVATION_LABELS[row.second if one == 'first' else row.first]} "
        f"({points(row.difference)} points, {points(row.low)} to {points(row.high)})"
        for row in rows.itertuples()
    ]
    is_equal = verdict.startswith("equal")
    joined = f"{verdict} {'to' if is_equal else 'than'}"
    where = {"robust": " under attack", "clean": " on clean images"}[measure] * is_equal
    if one == "first":
        return f"{name} is {joined} {listed(others)}{where}"
    return f"{listed(others)} are {joined} {name}{where}"
