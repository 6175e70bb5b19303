"""Generated text: tables, tests, claims and model cards, for a terminal and in Markdown.

Figures come from `tables` and `claims`; here they get their words, and their place between two
markers of a text. A table, as text, is {header: cells}.
"""

import itertools
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kaf_study import InputError
from kaf_study.activations import ACTIVATION_LABELS, STUDIED
from kaf_study.attacks import registry
from kaf_study.claims import MEASURES, Study, training_of
from kaf_study.files import write_atomically
from kaf_study.model_folder import TrainedModel, common_training, dataset_label, trained_models
from kaf_study.paired import LEVEL
from kaf_study.records import percent
from kaf_study.seeds import MARGIN
from kaf_study.tables import KINDS, model_table, pgd_name

Columns = Mapping[Any, Sequence[object]]
NONE = "–"  # in place of a figure

# Kinds of results of several attacks: what they are, and their name in a text.
WHAT_COMBINED = {
    "suite": "Suite: apgd-ce, apgd-t, square, pgd, each on what the ones before left.",
    "rapid": "Rapid: PGD-10, then the margin towards the three likeliest classes; not AutoAttack.",
    "autoattack": "AutoAttack: the standard version, as written here.",
}
COMBINED = {kind: registry.ATTACKS[kind].label for kind in WHAT_COMBINED}

ATTACKS = ("pgd", *COMBINED)  # as commands name them


def kind_of_attack(name: str) -> str:
    """Of `ATTACKS` -> of `tables.KINDS`, true labels."""
    return "pgd_true" if name == "pgd" else name


def points(value: float, sign: str = "+") -> str:
    """A fraction in percent or points; z: no "-0.0"."""
    return NONE if pd.isna(value) else f"{100 * value:{sign}z.1f}"


def all_points(values: Iterable[float]) -> list[str]:
    return [points(value) for value in values]


# --------------------------------------------------------------------------- the table of models


def shown(table: pd.DataFrame) -> dict[str, list[str]]:
    """A table of `tables.model_table` as text, percent with standard errors."""
    chosen, n = table.attrs["chosen"], table.attrs["n"]

    def accuracy(column, kind):
        return [NONE if pd.isna(v) else percent(v, n[kind]) for v in table[column]]

    def plain(column, pattern, factor=1):
        return [NONE if pd.isna(v) else pattern.format(factor * v) for v in table[column]]

    cells = {
        "model": list(table["model"]),
        "clean": accuracy("clean_accuracy", table.attrs["clean_kind"]),
    }
    for kind, name in (("pgd_true", "true labels"), ("pgd_predicted", "predicted labels*")):
        if kind in chosen:
            cells[f"{pgd_name(chosen[kind])}, {name}"] = accuracy(kind, kind)
    for kind in COMBINED:
        if kind in chosen:
            cells[COMBINED[kind]] = accuracy(kind, kind)
    if table["published_accuracy"].notna().any():
        cells["published clean"] = plain("published_accuracy", "{:.2f}", 100)
        cells["published robust*"] = plain("published_robustness", "{:.2f}", 100)
    if table["epochs"].notna().any():  # of a training of ours
        cells["epochs"] = plain("epochs", "{:.0f}")
        cells["parameters"] = plain("parameters", "{:,.0f}")
    return cells


def notes(
    table: pd.DataFrame, kinds: Sequence[str] = tuple(KINDS), *, errors: bool = True
) -> list[str]:
    """What the figures of `kinds` in a table are, in sentences; errors: they stand beside them."""
    chosen = table.attrs["chosen"]
    n = {kind: size for kind, size in table.attrs["n"].items() if kind in kinds}
    row = next(iter(chosen.values())).iloc[0]
    step = chosen["pgd_true"].iloc[0]["alpha"] if "pgd_true" in chosen else None
    counts = {"pgd_true": "PGD", "pgd_predicted": "PGD with predicted labels"} | COMBINED
    clean = table.attrs["n"][table.attrs["clean_kind"]]
    sizes = ", ".join(
        [f"clean {clean:,}", *(f"{counts[kind]} {size:,}" for kind, size in n.items())]
    )
    lines = [
        f"Percent of the first test images of {_dataset(chosen)} (n: {sizes})"
        + " ± one binomial standard error" * errors
        + f"; L-inf, eps {255 * row['epsilon']:g}/255"
        + (f", step {255 * step:g}/255" if step else "")
        + ". "
        + ("PGD-S-R: S steps, R random restarts; the" if step else "The")
        + " worst counts, image by image."
    ]
    lines += [sentence for kind, sentence in WHAT_COMBINED.items() if kind in n]
    if "pgd_predicted" in n:
        lines.append(
            "\\* Only for comparison with figures from attacks called without labels; not a "
            "robust accuracy."
        )
    return lines


def _dataset(chosen: Mapping[str, pd.DataFrame]) -> str:
    """What was attacked, whatever the models were trained on: "CIFAR-10", or several of such."""
    first = [rows.iloc[0] for rows in chosen.values()]
    labels = dict.fromkeys(f"{dataset_label(r['dataset'], r['fingerprint'])}" for r in first)
    return " and ".join(labels)


# --------------------------------------------------------------------------- paired tests


def shown_pairs(pairs: pd.DataFrame) -> dict[str, list[str]]:
    """Differences of `tables.against` as text, in points."""
    return {
        f"against {pairs['reference'].iloc[0]}": list(pairs["model"]),
        "robust, points": all_points(pairs["robust_difference"]),
        "95 %": _intervals(pairs["low"], pairs["high"], "+"),
        "stand under this / the reference alone": [
            f"{b} / {c}" for b, c in zip(pairs["only_model"], pairs["only_reference"], strict=True)
        ],
        "p (Holm)": [shown_p(p) for p in pairs["p_holm"]],
        "clean, points": all_points(pairs["clean_difference"]),
        "clean, p (Holm)": [shown_p(p) for p in pairs["clean_p_holm"]],
    }


def shown_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def conclusion(pairs: pd.DataFrame) -> str:
    """Two sentences: what n images tell apart at 5 %, robust and clean, and what they do not."""
    n, reference, attack = pairs[["n", "reference", "attack"]].iloc[0]
    attack = "the suite" if attack == "suite" else COMBINED.get(attack, attack)
    robust = told_apart(pairs, "p_holm", "robust_difference", ("more robust", "less robust"))
    clean = told_apart(
        pairs, "clean_p_holm", "clean_difference", ("more accurate", "less accurate")
    )
    return (
        f"On {n:,} images, McNemar's exact test at {100 * LEVEL:.0f} % with Holm's correction for "
        f"{len(pairs)} comparison{'s' * (len(pairs) > 1)} with {reference}, under {attack}: "
        f"{robust}. On the clean images: {clean}."
    )


def told_apart(
    pairs: pd.DataFrame,
    p: str,
    difference: str,
    words: tuple[str, str],
    named: Callable[[Iterable[str]], str] = ", ".join,
) -> str:
    """Which models lie above and below a reference, in `words`, and which are not told apart."""
    apart = pairs[p] < LEVEL
    parts = []
    for is_above, word in zip((True, False), words, strict=True):
        names = pairs["model"][apart & ((pairs[difference] > 0) == is_above)]
        if len(names):
            parts.append(f"{word}: {named(names)}")
    if not apart.all():
        parts.append(f"not told apart: {named(pairs['model'][~apart])}")
    return "; ".join(parts)


# --------------------------------------------------------------------------- how strong rapid is


def shown_rapid(beside: pd.DataFrame) -> dict[str, list[str]]:
    """`tables.rapid_beside_stronger` as text; a last row for all networks of an attack together."""
    counts = ["n", "stronger", "rapid", "only_stronger", "only_rapid"]
    parts = []
    for kind, rows in beside.groupby("attack", sort=False):
        together = {"model": f"all {len(rows)}", "attack": kind} | rows[counts].sum().to_dict()
        parts.append(pd.concat([rows, pd.DataFrame([together])[: len(rows) - 1]]))
    frame = pd.concat(parts)
    return {
        "model": list(frame["model"]),
        "against": [COMBINED[kind] for kind in frame["attack"]],
        "images": [f"{n:,}" for n in frame["n"]],
        "stand under it": [f"{n:,}" for n in frame["stronger"]],
        "stand under rapid": [f"{n:,}" for n in frame["rapid"]],
        "felled by it alone": [str(n) for n in frame["only_stronger"]],
        "felled by rapid alone": [str(n) for n in frame["only_rapid"]],
        "rapid's figure is higher by, points": all_points(
            (frame["rapid"] - frame["stronger"]) / frame["n"]
        ),
    }


# --------------------------------------------------------------------------- seeds and claims


def shown_means(table: pd.DataFrame) -> dict[str, list[str]]:
    """A table of `claims.means` as text, percent with 95 % intervals."""
    cells = {
        "activation": [ACTIVATION_LABELS.get(name, name) for name in table["activation"]],
        "seeds": [str(count) for count in table["seeds"]],
    }
    for measure in MEASURES:
        cells[f"{measure}, mean"] = [f"{100 * value:.1f}" for value in table[measure]]
        cells[f"{measure}, 95 %"] = _intervals(table[f"{measure}_low"], table[f"{measure}_high"])
    return cells


def shown_answer(table: pd.DataFrame, architecture: str) -> dict[str, list[str]]:
    """The same on one screen: 95 % intervals in brackets, and what was published.

    Args:
        table: of `claims.means`. architecture: of the study.
    """
    cells = shown_means(table)
    answer = {name: cells[name] for name in ("activation", "seeds")}
    for measure in MEASURES:
        pairs = zip(cells[f"{measure}, mean"], cells[f"{measure}, 95 %"], strict=True)
        answer[f"{measure}, %"] = [f"{mean} ({interval})" for mean, interval in pairs]
    published = [
        STUDIED[name].published.get(architecture) if name in STUDIED else None
        for name in table["activation"]
    ]
    answer["published: clean / robust*"] = [
        f"{100 * both[0]:.2f} / {100 * both[1]:.2f}" if both else NONE for both in published
    ]
    return answer


def shown_claims(table: pd.DataFrame) -> dict[str, list[str]]:
    """A table of `claims.claims_table` as text, in points; one claim's name stands once."""
    first = [ACTIVATION_LABELS.get(name, name) for name in table["first"]]
    second = [ACTIVATION_LABELS.get(name, name) for name in table["second"]]
    cells = {
        "claim": list(table["claim"].mask(table["claim"].duplicated(), "")),
        "of": first,
        "against": second,
        "seeds": list(table["seeds"]),
    }
    if table["published"].notna().any():
        cells["published*"] = all_points(table["published"])
    if _has_originals(table):
        cells["original networks"] = all_points(table["original"])
    return cells | {
        "here": all_points(table["difference"]),
        "95 %": _intervals(table["low"], table["high"], "+"),
        "verdict": [
            f"{said}: {why}" if why else said
            for said, why in zip(table["verdict"], table["why"], strict=True)
        ],
    }


def shown_verdicts(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """Tables of `claims.claims_table` {study: table} side by side, of the pairs in several of them.

    A column for each study, headed by its name without the words that all of them end in.
    """
    pair = ["claim", "first", "second"]
    whole = pd.concat([table.assign(study=study) for study, table in tables.items()])
    whole = whole[whole.duplicated(pair, keep=False)]
    order = {claim: place for place, claim in enumerate(whole["claim"].unique())}
    rows = whole.drop_duplicates(pair).sort_values(
        "claim", key=lambda c: c.map(order), kind="stable"
    )
    cells = {
        "claim": list(rows["claim"].mask(rows["claim"].duplicated(), "")),
        "of": [ACTIVATION_LABELS.get(name, name) for name in rows["first"]],
        "against": [ACTIVATION_LABELS.get(name, name) for name in rows["second"]],
    }
    for heading, table in zip(_without_common_end(list(tables)), tables.values(), strict=True):
        texts = [
            f"{point}, {said}"
            for point, said in zip(all_points(table["difference"]), table["verdict"], strict=True)
        ]
        found = dict(zip(table[pair].itertuples(index=False, name=None), texts, strict=True))
        keys = rows[pair].itertuples(index=False, name=None)
        cells[heading] = [found.get(key, NONE) for key in keys]
    return cells


def _without_common_end(names: list[str]) -> list[str]:
    words = [name.split() for name in names]
    from_the_end = zip(*(one[::-1] for one in words), strict=False)
    shared = len(list(itertools.takewhile(lambda place: len(set(place)) == 1, from_the_end)))
    return [" ".join(one[: max(1, len(one) - shared)]) for one in words]


def _has_originals(claims: pd.DataFrame) -> bool:
    return "original" in claims and bool(claims["original"].notna().any())


def _intervals(lows: Iterable[float], highs: Iterable[float], sign: str = "") -> list[str]:
    return [
        f"{points(low, sign)} to {points(high, sign)}" if np.isfinite(high - low) else NONE
        for low, high in zip(lows, highs, strict=True)
    ]


def claim_notes(study: Study, averages: pd.DataFrame, claims: pd.DataFrame) -> list[str]:
    """What the figures of a study's tables are, in sentences."""
    sd = averages.attrs["sd"]
    whose = "pooled over the activations"
    if study.lender:
        whose = f"taken from {common_training(study.lender.models)}, as here is one seed of each"
    lines = [
        f"{study.n:,} test images. Intervals are over images and seeds: Student's, with the "
        f"variance between seeds {whose} "
        f"(standard deviation: clean {100 * sd['clean']:.2f}, robust {100 * sd['robust']:.2f} "
        "points).",
        "Verdicts hold at 5 % for all pairs of a claim together (Shaffer's form of Holm's "
        "correction), differences and, by two one-sided tests, equality within "
        f"{100 * MARGIN:g} point.",
    ]
    if claims["published"].notna().any():
        lines.append(
            "\\* Differences of single networks; robust ones from attacks called without labels."
        )
    if _has_originals(claims):
        lines.append(
            "Original networks: the same networks, attacked again by rapid; one or two of each, so "
            "that other seeds may turn what they say."
        )
    return lines


def markdown_claims(study: Study, averages: pd.DataFrame, claims: pd.DataFrame) -> str:
    """Markdown of one study: means, claims, what they are."""
    return "\n".join(
        [
            markdown(shown_means(averages)),
            "",
            markdown(shown_claims(claims)),
            "",
            *claim_notes(study, averages, claims),
        ]
    )


# --------------------------------------------------------------------------- model cards


def model_cards(results: pd.DataFrame, *folders: str | Path, into: str | Path) -> str:
    """Markdown for models/README.md: one row per model; RobustBench's model_info keys where any.

    Args:
        results: of `read_results`.
        folders: whose trained models are listed, also those without results of the protocol.
        into: the file that the text is written to; it tells the command.
    """
    table = model_table(results)
    rows_of = next(iter(table.attrs["chosen"].values()))
    evaluated = {
        Path(folder).resolve(): row
        for folder, row in zip(table["folder"], table.itertuples(), strict=True)
    }
    trained = {model.folder.resolve(): model for model in trained_models(*folders)}
    chosen = table.attrs["chosen"]
    combined = [kind for kind in COMBINED if kind == "suite" or kind in chosen]
    rows = {}
    for folder in trained | evaluated:
        row, model = evaluated.get(folder), trained.get(folder)
        rows[row.model if row else folder.name] = _card(row, model, rows_of.iloc[0], combined)
    frame = pd.DataFrame.from_dict(rows, orient="index")
    others = "pgd_acc, suite_acc and rapid_acc" if "rapid" in chosen else "pgd_acc and suite_acc"
    columns = {"model": list(frame.index), **{c: list(frame[c]) for c in frame}}
    given = shlex.join([*(str(Path(folder)) for folder in folders), "--cards", str(into)])
    return "\n".join(
        [
            "# Models",
            "",
            "Generated from `training.json` and the result files by",
            f"`python robustness_eval.py compare {given}`",
            "(do not edit).",
            "",
            markdown(columns),
            "",
            *notes(table, [kind for kind in KINDS if kind != "pgd_predicted"], errors=False),
            "",
            f"{others}: robust accuracy, true labels; not AutoAttack's.",
            "A dash: not attacked in this way. train_eps 0/255: ordinary training.",
            *exceptions(list(trained.values())),
            *stopped(list(trained.values())),
            "Keys follow RobustBench's model_info where it has one. sha256 is of `model.keras`.",
            "",
        ]
    )


def _card(
    row, model: TrainedModel | None, protocol: pd.Series, combined: Sequence[str]
) -> dict[str, object]:
    """One model's row of the cards, from its row of the table and its folder, where it has them.

    combined: which of `COMBINED` have a column.
    """
    settings = model.settings if model else {}
    record = model.record if model else {"results": {}}
    activation = row.activation if row else settings["activation"]
    epochs, parameters = (record["results"].get(k) for k in ("epochs_trained", "parameters"))
    sha256 = row.model_sha256 if row else record.get("model_sha256")  # a stopped run has no weights

    return {
        "architecture": settings.get("architecture", NONE),
        "activation": ACTIVATION_LABELS.get(activation, activation or NONE),
        "dataset": settings.get("dataset", protocol["dataset"]),
        "eps": f"{255 * protocol['epsilon']:g}/255",
        "clean_acc": points(row.clean_accuracy if row else np.nan, ""),
        "pgd_acc": points(row.pgd_true if row else np.nan, ""),
        **{f"{kind}_acc": points(getattr(row, kind) if row else np.nan, "") for kind in combined},
        "epochs": f"{epochs}" if epochs else NONE,
        "optimizer": settings.get("optimizer", NONE),
        "lr_max": settings.get("lr_max", NONE),
        "train_eps": f"{255 * settings['epsilon']:g}/255" if "epsilon" in settings else NONE,
        "seed": settings.get("seed", NONE),
        "additional_data": "False",
        "parameters": f"{parameters:,}" if parameters else NONE,
        "sha256": f"`{sha256[:12]}`" if sha256 else NONE,
    }


def exceptions(models: Iterable[TrainedModel]) -> list[str]:
    """Sentences on models trained with other settings than most of their kind.

    A kind: one data set, architecture and radius. The activation is no exception, nor the seed.
    """
    kinds: dict[tuple, list[TrainedModel]] = {}
    for model in models:
        kind = tuple(model.settings.get(k) for k in ("dataset", "architecture", "epsilon"))
        kinds.setdefault(kind, []).append(model)
    sentences = []
    for group in kinds.values():
        for name in dict.fromkeys(name for model in group for name in model.settings):
            if name in ("activation", "seed") or len(group) < 3:
                continue
            values = [model.settings.get(name) for model in group]
            usual = max(values, key=values.count)
            sentences += [
                f"{model.folder.name} was trained with {name} {value}, the others with {usual}."
                for model, value in zip(group, values, strict=True)
                if value != usual
            ]
    return sentences


def stopped(models: Sequence[TrainedModel]) -> list[str]:
    """Sentences on trainings that the probe ended, and whether another seed stands in for each."""

    def stopped_in(model):  # counted from 0
        return model.record["results"].get("catastrophic_overfitting_in_epoch")

    def study(model):
        return model.activation, training_of(model)

    whole = [study(model) for model in models if stopped_in(model) is None]
    return [
        f"{model.folder.name} was stopped by the probe in epoch {stopped_in(model) + 1} "
        "(catastrophic overfitting)"
        + f"; another seed stands in for seed {model.settings['seed']}" * (study(model) in whole)
        + "."
        for model in models
        if stopped_in(model) is not None
    ]


# --------------------------------------------------------------------------- text


def markdown(columns: Columns) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [list(map(str, cells)) for cells in zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def console(columns: Columns) -> str:
    return pd.DataFrame(columns).to_string(index=False)


def markdown_table(table: pd.DataFrame) -> str:
    return "\n".join([markdown(shown(table)), "", *notes(table)])


def markdown_originals(table: pd.DataFrame) -> str:
    """Of a `tables.original_table`; one that overfitted has its activation in brackets."""
    labels = table["activation"].map(ACTIVATION_LABELS)
    activations = labels.where(~table["failed"], "(" + labels + ")")
    cells = shown(table)
    return markdown({"file": cells.pop("model"), "activation": list(activations)} | cells)


def markdown_pairs(*tests: pd.DataFrame) -> str:
    """Markdown of results of `tables.against`, one table and its conclusion for each."""
    return "\n\n".join(f"{markdown(shown_pairs(c))}\n\n{conclusion(c)}" for c in tests)


def put_table_into(path: str | Path, table: str, name: str = "table") -> None:
    """Rewrites what stands between <!-- name --> and <!-- /name --> in a text file."""
    path = Path(path)
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error})") from None
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (start and end) or opening in after:
        raise InputError(f"{str(path)!r} must hold {opening} and, after it, {closing}, once each")
    write_atomically(path, f"{before}{start}\n{table}\n{end}{after}".encode())
