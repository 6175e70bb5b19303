"""The tests of the report: of networks on the same images, of activations over seeds, in words.

The statistics are those of `paired` and `seeds`, by way of `tables` and `claims`.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS, is_trained_kaf
from kaf_study.cards import points, shown_claims, shown_means, shown_pairs, told_apart
from kaf_study.claims import Study, beside_originals, claims_table, means
from kaf_study.latex import Report, listed, span, tabular
from kaf_study.model_folder import common_training
from kaf_study.paired import LEVEL
from kaf_study.seeds import UNDECIDED, difference, verdicts_of
from kaf_study.tables import paired_tests

WORDS, CLEAN_WORDS = ("more robust", "less robust"), ("more accurate", "less accurate")


def paired(report: Report, table: pd.DataFrame, kind: str, name: str) -> None:
    """The paired tests against ReLU and Swish of a table whose models bear the report's names."""
    known = table.drop_duplicates("activation").set_index("activation")["model"]
    activations = table.set_index("model")["activation"]
    named = partial(_named, of=activations)
    not_excluded = 0.0
    for reference in ("relu", "swish"):
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
        alike = pairs.loc[pairs["p_holm"] >= LEVEL, ["low", "high"]].abs()
        not_excluded = max(not_excluded, alike.to_numpy().max(initial=0))
        for row in pairs[pairs["model"] == known.get("swish")].itertuples():
            interval = f"{points(row.low)} to {points(row.high)}"
            report.numbers[f"{name}SwishOverReLU"] = f"{points(row.robust_difference)} ({interval})"
    report.numbers[f"{name}NotExcluded"] = points(not_excluded, "")


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


def verdicts(report: Report, study: Study, originals: pd.DataFrame) -> None:
    """Means and verdicts over seeds, beside differences of `tables.original_table`."""
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
        "SeedsAnswer": "; ".join(decided(claims)) or "no pair is told apart",
        "ShortAnswer": short_answer(claims),
        "PairsOnce": of_every_pair_once(study, claims),
        "SeedSpread": f"The standard deviation between seeds, pooled over the activations, is "
        f"{sd['clean']} points of clean and {sd['robust']} points of robust accuracy."
        if several
        else "As there is one seed of each activation, the variance between trainings is unknown, "
        "and every verdict over seeds is undecided.",
    }


def short_answer(claims: pd.DataFrame) -> str:
    """What is more robust than ReLU; which KAFs are above Swish, and which more accurate than ReLU.

    claims: a `claims_table`.
    """
    wins: dict[tuple[str, str], dict[str, float]] = {}  # (measure, worse): {better: by how much}
    for row in claims.itertuples():
        if row.verdict in (WORDS[0], CLEAN_WORDS[0]):
            wins.setdefault((row.measure, row.second), {})[row.first] = row.difference
        elif row.verdict in (WORDS[1], CLEAN_WORDS[1]):
            wins.setdefault((row.measure, row.first), {})[row.second] = -row.difference

    def shown_above(kind, measure, of, reference):
        better = [
            name
            for name in wins.get((measure, of), {})
            if kind == "activation" or is_trained_kaf(name)
        ]
        if not better:
            return f"no {kind} is shown to be {reference}"
        by = f"{span(wins[measure, of][name] for name in better)} points "
        names = listed([ACTIVATION_LABELS[name] for name in better])
        return f"{names} {'are' if better[1:] else 'is'} {by}{reference}"

    return (
        f"{shown_above('activation', 'robust', 'relu', 'more robust than ReLU')}; "
        f"{shown_above('KAF', 'robust', 'swish', 'more robust than Swish')}, and "
        f"{shown_above('KAF', 'clean', 'relu', 'more accurate than ReLU')}"
    )


def of_every_pair_once(study: Study, claims: pd.DataFrame) -> str:
    """What becomes of a `claims_table` whose pairs are counted once and corrected all together."""
    rows: dict[Any, Any] = {}  # {(measure, the two activations): its last row}
    said: dict[Any, set[str]] = {}  # its verdicts
    for row in claims.itertuples():
        key = row.measure, frozenset((row.first, row.second))
        rows[key] = row
        said.setdefault(key, set()).add(row.verdict)
    found = [
        difference(study.results[row.measure], row.first, row.second, study.noise[row.measure])
        for row in rows.values()
    ]
    together, *_ = verdicts_of(found)

    def names(some):
        return listed(
            [
                f"{ACTIVATION_LABELS[rows[key].first]} and {ACTIVATION_LABELS[rows[key].second]}"
                for key in some
            ]
        )

    sentences = []
    for what in ("difference", "equality"):
        sure = {
            key: word
            for key, word in zip(rows, together, strict=True)
            if any(
                v != UNDECIDED and v.startswith("equal") == (what == "equality") for v in said[key]
            )
        }
        lost = [key for key, word in sure.items() if word == UNDECIDED]
        left = "no" if len(lost) == len(sure) else "every"
        but = f" but that of {names(lost)}" if left == "every" and lost else ""
        sentences.append(f"{left} {what} stays{but}")
    mixed = [key for key, words in said.items() if len(words) > 1]
    return (
        f"These rows hold {len(rows)} different comparisons, of which "
        f"{sum(words == {UNDECIDED} for words in said.values())} are undecided in every claim"
        + f"; {names(mixed)} are told equal among fewer comparisons and not among more"
        * bool(mixed)
        + f". Corrected for all {len(rows)} at once, {' and '.join(sentences)}."
    )


def elsewhere(report: Report, others: Sequence[Study]) -> None:
    """The verdicts of other studies, which have one seed of each activation; sentences on each."""
    said = []
    for study in others:
        if not study.has_claims:
            continue
        robust = [
            f"{ACTIVATION_LABELS[name]} {points(x.mean(), '')}"
            for name, x in study.results["robust"].items()
        ]
        rate = study.models[0].settings["lr_max"]
        parameters = min(model.record["results"]["parameters"] for model in study.models)
        told = "; ".join(decided(claims_table(study))) or "No pair is told apart"
        lent = ", with the spread between seeds of the networks above" * (study.lender is not None)
        said.append(
            f"{common_training(study.models)}, peak rate {rate:g}, {parameters:,} parameters or "
            f"more, {study.n:,} images: {listed(robust)} % are robust. {told}{lent}."
        )
    report.numbers["Elsewhere"] = " ".join(said)


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
