"""What the study claims of activations, as data, and the verdict on each from several seeds.

The claims are those of the thesis (Sapienza, 2020) and of this repository. Each is a list of pairs
of which the first is said to be above the second. A pair's verdict is of `seeds`: an interval over
images and seeds, corrected within the claim.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from kaf_study import InputError
from kaf_study.activations import (
    FROZEN_KAF,
    KAF_ON_BASE,
    KWTA,
    RIDGE_KAF,
    STUDIED,
    is_trained_kaf,
)
from kaf_study.config import TrainConfig
from kaf_study.model_folder import TrainedModel, with_training
from kaf_study.paired import LEVEL
from kaf_study.seeds import (
    EQUAL,
    LESS,
    MARGIN,
    MORE,
    UNDECIDED,
    Estimate,
    Outcomes,
    Spread,
    difference,
    estimate,
    spread,
    verdicts_of,
)
from kaf_study.tables import chosen_results, read_outcomes

MEASURES = ("clean", "robust")
WORDS = {
    ("robust", MORE): "more robust",
    ("robust", LESS): "less robust",
    ("clean", MORE): "more accurate",
    ("clean", LESS): "less accurate",
} | {
    (measure, said): word
    for measure in MEASURES
    for said, word in (
        (EQUAL, f"equal within {100 * MARGIN:g} point"),
        (UNDECIDED, "undecided"),
    )
}
# Networks of one study differ in these settings: seed, activation, and what is its own.
MAY_DIFFER = {
    "activation", "seed", "deterministic",
    "dictionary_size", "shapes_of", "kwta_anneal_from", "kwta_anneal_every",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """measure: "clean" or "robust", the accuracy in which each pair's first is above its second."""

    text: str
    measure: str
    pairs: tuple[tuple[str, str], ...]


def _against(second: str, firsts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((first, second) for first in firsts)


def _against_base(kind: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, row.base) for name, row in STUDIED.items() if row.kind == kind and row.base)


KAFS = [name for name in STUDIED if is_trained_kaf(name)]
# k-WTA is no defence, frozen shapes have a claim of their own.
COMPARED = [name for name, row in STUDIED.items() if row.kind not in (KWTA, FROZEN_KAF)]
SMOOTH = [name for name in COMPARED if name not in ("relu", "kaf_on_relu")]  # no kink
CLAIMS = (
    Claim(
        "Swish is the most robust",
        "robust",
        tuple(("swish", other) for other in COMPARED if other != "swish"),
    ),
    Claim("KAFs are more accurate than ReLU", "clean", _against("relu", KAFS)),
    Claim("KAFs are more robust than ReLU", "robust", _against("relu", KAFS)),
    Claim("Smooth activations are more robust than ReLU", "robust", _against("relu", SMOOTH)),
    Claim("A KAF that starts as X is more robust than X", "robust", _against_base(RIDGE_KAF)),
    Claim("A moving dictionary is more robust than a fixed one", "robust", (("kaf_free", "kaf"),)),
    Claim("A KAF on X is more robust than X", "robust", _against_base(KAF_ON_BASE)),
    Claim(
        "Learned shapes, frozen, are more robust than Swish", "robust", (("kaf_frozen", "swish"),)
    ),
    Claim(
        "A KAF that trains is more robust than its shapes frozen",
        "robust",
        (("kaf_swish", "kaf_frozen"),),
    ),
)


# --------------------------------------------------------------------------- networks of one study


def training_of(model: TrainedModel) -> dict[str, Any]:
    """What networks of one study have in common: {setting: value}, and the training images."""
    names = [field.name for field in fields(TrainConfig) if field.name not in MAY_DIFFER]
    return {name: model.settings[name] for name in names} | {
        "train_fingerprint": model.record.get("dataset", {}).get("train_fingerprint")
    }


@dataclass(frozen=True)
class Study:
    """Networks trained alike but for activation and seed, attacked on the same n images.

    results: {"clean": {activation: bool (seeds, n)}, "robust": the same}. lender: of one seed of
    each activation, the study whose spread between seeds is taken to be this one's too. kind: of
    attack, of `kaf_study.tables.TRUE_LABELS`.
    """

    kind: str
    models: tuple[TrainedModel, ...]
    n: int
    results: Mapping[str, Outcomes]
    lender: "Study | None" = None

    @property
    def architecture(self) -> str:
        return self.models[0].settings["architecture"]

    @property
    def seeds(self) -> dict[str, int]:
        """How many of each activation."""
        return {name: len(x) for name, x in self.results["robust"].items()}

    @property
    def has_several_seeds(self) -> bool:
        """Whether any activation has."""
        return max(self.seeds.values()) > 1

    @property
    def has_claims(self) -> bool:
        """Whether both activations of any pair of `CLAIMS` are there."""
        return any(self.seeds.keys() >= set(pair) for claim in CLAIMS for pair in claim.pairs)

    @property
    def size(self) -> tuple[int, int, int]:
        """How many activations, networks and images."""
        return len(self.seeds), len(self.models), self.n

    @property
    def noise(self) -> dict[str, Spread]:
        """{measure: how networks differ from seed to seed}, its own or the lender's."""
        return {measure: spread(x) for measure, x in (self.lender or self).results.items()}


def studies(results: pd.DataFrame, kind: str = "pgd_true") -> list[Study]:
    """The studies among results; models without a training record are in none.

    Args:
        results: of `kaf_study.records.read_results`. kind: of `kaf_study.tables.TRUE_LABELS`.
    """
    rows = chosen_results(with_training(results)).get(kind)
    groups: dict[tuple, list[tuple[TrainedModel, str]]] = {}
    if rows is not None:
        for model, path in zip(rows["training"], rows["path"], strict=True):
            if model is not None:
                alike = tuple(training_of(model).values())
                groups.setdefault(alike, []).append((model, path))
    found = [_study(kind, group) for group in groups.values()]
    return [study if study.has_several_seeds else _with_lender(study, found) for study in found]


def main_study(found: Iterable[Study]) -> Study:
    """The study by which the claims are tested, and thus the kind of attack.

    Of those that have claims and several seeds: of most activations, then networks, then images,
    and of equals the first. Where there is none: one that has claims and a lender, or claims alone.
    """
    return max(
        found,
        key=lambda study: (
            study.has_claims,
            study.has_several_seeds,
            study.lender is not None,
            *study.size,
        ),
    )


def _with_lender(study: Study, others: Iterable[Study]) -> Study:
    """The lender is the largest that was attacked alike: as many images, of the same data."""

    def attacked(one):
        return one.n, *(one.models[0].settings.get(name) for name in ("dataset", "epsilon"))

    lenders = [x for x in others if x.has_several_seeds and attacked(x) == attacked(study)]
    return replace(study, lender=max(lenders, key=lambda one: len(one.models), default=None))


def _study(kind: str, group: list[tuple[TrainedModel, str]]) -> Study:
    """Of models that were trained alike, each with its result."""
    models: dict[tuple[str, int], TrainedModel] = {}
    for model, _ in group:
        name, seed = place = model.activation, model.settings["seed"]
        if place in models:
            raise InputError(
                f"{models[place].folder} and {model.folder} are both {name}, seed {seed}, trained "
                "alike; leave one out"
            )
        models[place] = model
    paths = {str(model.folder): path for model, path in group}
    found = read_outcomes(paths, next(iter(paths)))
    stacked: dict[str, dict] = {measure: {} for measure in MEASURES}
    order = {name: place for place, name in enumerate(STUDIED)}
    for name in sorted({name for name, _ in models}, key=lambda a: order.get(a, len(order))):
        frames = [found[str(models[key].folder)] for key in sorted(models) if key[0] == name]
        for measure in MEASURES:
            stacked[measure][name] = np.stack([frame[measure].to_numpy() for frame in frames])
    return Study(kind, tuple(models.values()), len(next(iter(found.values()))), stacked)


# --------------------------------------------------------------------------- tables


def means(study: Study) -> pd.DataFrame:
    """One row per activation: seeds, and of clean and robust accuracy mean, low and high (95 %).

    Fractions. `.attrs["sd"]`: {measure: standard deviation between seeds, pooled}, NaN of one seed
    each without a lender; then low and high are infinite.
    """
    noise = study.noise
    rows = []
    for name, count in study.seeds.items():
        row: dict[str, object] = {"activation": name, "seeds": count}
        for measure in MEASURES:
            found = estimate(study.results[measure], {name: 1.0}, noise[measure])
            low, high = found.interval()
            row |= {measure: float(found.value), f"{measure}_low": low, f"{measure}_high": high}
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.attrs["sd"] = {measure: float(one.sd) for measure, one in noise.items()}
    return frame


def claims_table(study: Study, claims: Iterable[Claim] = CLAIMS) -> pd.DataFrame:
    """The verdicts: one row for each pair of a claim of which both activations are there.

    Returns:
        Columns claim, measure, first, second, seeds ("3 / 3"), published (difference of the
        thesis' figures; robust: of the predicted-label kind), difference, low, high (95 %, this
        pair alone; fractions), p_different and p_equal (corrected within the claim), verdict (of
        `WORDS`), why (of an undecided one).
    """
    noise = study.noise
    tables = [_verdicts(claim, study, noise[claim.measure]) for claim in claims]
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def beside_originals(
    table: pd.DataFrame, originals: pd.DataFrame, architecture: str
) -> pd.DataFrame:
    """A `claims_table` with a column original: the difference between networks of that work.

    Args:
        originals: of `tables.original_table`. Of several networks of an activation the mean counts,
            without those that failed.
        architecture: of the study.
    """
    alike = originals[(originals["architecture"] == architecture) & ~originals["failed"]]
    of_each = alike.groupby("activation")[["clean_accuracy", "rapid"]].mean()
    figures = {"clean": of_each["clean_accuracy"], "robust": of_each["rapid"]}
    differences = [
        figures[row.measure].get(row.first, np.nan) - figures[row.measure].get(row.second, np.nan)
        for row in table.itertuples()
    ]
    return table.assign(original=differences)


def _verdicts(claim: Claim, study: Study, noise: Spread) -> pd.DataFrame:
    results, seeds = study.results[claim.measure], study.seeds
    pairs = [pair for pair in claim.pairs if seeds.keys() >= set(pair)]
    found = [difference(results, *pair, noise) for pair in pairs]
    said, p_different, p_equal = verdicts_of(found)
    rows = []
    for (first, second), one, verdict in zip(pairs, found, said, strict=True):
        low, high = one.interval()
        rows.append(
            {
                "claim": claim.text,
                "measure": claim.measure,
                "first": first,
                "second": second,
                "seeds": f"{seeds[first]} / {seeds[second]}",
                "published": _published(first, second, study.architecture, claim.measure),
                "difference": float(one.value),
                "low": float(low),
                "high": float(high),
                "verdict": WORDS[claim.measure, verdict],
                "why": _why(one, noise, len(pairs)) if verdict == UNDECIDED else "",
            }
        )
    return pd.DataFrame(rows).assign(p_different=p_different, p_equal=p_equal)


def _published(first: str, second: str, architecture: str, measure: str) -> float:
    figures = [STUDIED[name].published.get(architecture) for name in (first, second)]
    above, below = (f[MEASURES.index(measure)] if f else np.nan for f in figures)
    return above - below


def _why(found: Estimate, noise: Spread, comparisons: int) -> str:
    """Why nothing is said of a pair."""
    if noise.df == 0:
        return "one seed each: how far trainings of one activation differ is not known"
    low, high = found.interval()
    if found.p_different < LEVEL or found.p_equal() < LEVEL:
        return f"not after the correction for {comparisons} comparisons"
    return f"± {100 * (high - low) / 2:.1f} points are too wide"
