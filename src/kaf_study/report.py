"""The figures of the report: every number and table of thesis/report.tex, from result files.

python -m kaf_study.report      # writes thesis/generated/: numbers.tex and the tables

`numbers.tex` defines one LaTeX macro for each number, and for each sentence that hangs on a
verdict, so that neither can be out of date in the text. The statistics are those of `tables` and
`claims`, their words those of `cards`.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kaf_study import CommandParser, InputError, tables
from kaf_study.activations import ACTIVATION_LABELS, STUDIED, is_kaf
from kaf_study.cards import (
    COMBINED,
    claim_notes,
    shown,
    shown_claims,
    shown_means,
    shown_pairs,
    told_apart,
)
from kaf_study.claims import ALIKE, Study, claims_table, means, studies
from kaf_study.latex import NONE, Report, listed, points, span, tabular
from kaf_study.model_folder import TrainedModel, model_labels, trained_models
from kaf_study.paired import LEVEL
from kaf_study.records import read_json, read_results
from kaf_study.tables import model_table, paired_tests, pgd_name

ARCHITECTURE = "resnet20"  # of the study; other networks stand in the table of all
MOST_ROBUST, KAFS_ROBUST = "Swish is the most robust", "KAFs are more robust than ReLU"
WORDS, CLEAN_WORDS = ("more robust", "less robust"), ("more accurate", "less accurate")


# --------------------------------------------------------------------------- published


def published(report: Report) -> None:
    """The figures of the thesis, of `activations`."""
    cells: dict[str, list[str]] = {"activation": []}
    for name, row in STUDIED.items():
        if row.published:
            cells["activation"].append(ACTIVATION_LABELS[name])
            for network, title in ((ARCHITECTURE, "ResNet20"), ("vgg", "VGG")):
                pair = row.published.get(network, (np.nan, np.nan))
                for what, value in zip(("clean", "robust*"), pair, strict=True):
                    text = NONE if pd.isna(value) else f"{100 * value:.2f}"
                    cells.setdefault(f"{title}, {what}", []).append(text)
    report.tables["published"] = tabular(cells)
    pairs = {a: r.published[ARCHITECTURE] for a, r in STUDIED.items() if r.published}
    clean, robust = ({a: pair[k] for a, pair in pairs.items()} for k in (0, 1))
    report.numbers |= {
        "PublishedCleanSpan": span(clean.values()),
        "PublishedSpan": span(robust.values()),
        "PublishedSwishOverReLU": points(robust["swish"] - robust["relu"]),
    }


# --------------------------------------------------------------------------- trained here


def main_study(results: pd.DataFrame) -> tuple[str, Study]:
    """(kind of attack, study) of the most networks; of those, the one of the most images."""
    found = [
        (kind, study)
        for kind in ("pgd_true", "rapid", "autoattack")
        for study in studies(results, kind)
        if study.architecture == ARCHITECTURE
    ]
    if not found:
        raise InputError(f"no {ARCHITECTURE} has results; make them with robustness_eval.py")
    return max(found, key=lambda pair: (len(pair[1].models), pair[1].n))


def trained_here(report: Report, results: pd.DataFrame) -> Study:
    """The networks attacked: their figures, and the tests and verdicts of the main study."""
    kind, study = main_study(results)
    table = model_table(results)
    table = table[table["architecture"] == ARCHITECTURE]
    chosen, n = table.attrs["chosen"], table.attrs["n"]
    if not {"pgd_true", "pgd_predicted"} <= chosen.keys():
        raise InputError("PGD with true and with predicted labels is needed; see RESULTS.md")
    labels = {str(f): name for f, name in model_labels(trained_models(*table["folder"])).items()}
    cells = shown(table.assign(model=[labels[folder] for folder in table["folder"]]))
    for name in ("s per epoch", "epochs", "parameters"):
        del cells[name]
    report.tables["networks"] = tabular(cells)
    pgd = chosen["pgd_true"]
    report.numbers |= settings(study) | {
        "StudySeeds": in_words(study.seeds.values()),
        "StudyAttack": pgd_name(pgd) if kind == "pgd_true" else COMBINED[kind],
        "StudyImages": f"{study.n:,}",
        "CleanSpan": span(table["clean_accuracy"]),
        "PgdName": pgd_name(pgd),
        "AttackEpsilon": f"{255 * pgd['epsilon'].iloc[0]:g}/255",
        "AttackStep": f"{255 * pgd['alpha'].iloc[0]:g}/255",
        "AttackSteps": f"{pgd['steps'].iloc[0]:.0f}",
        "AttackRestarts": f"{pgd['restarts'].iloc[0]:.0f}",
        "LastAttack": last_month(results),
    }
    report.numbers |= {
        "PgdSpan": span(table["pgd_true"]),
        "PgdImages": f"{n['pgd_true']:,}",
        "PgdNetworks": str(int(table["pgd_true"].notna().sum())),
        "SuiteImages": f"{n.get('suite', 0):,}",
        "SuiteBelowPgd": span(tables.below_pgd(chosen, "suite")),
    }
    report.numbers["StrongerAttacks"] = " ".join(
        f"Under {COMBINED[kind]}, {count} networks stand at {span(table[kind])} % of {n[kind]:,} "
        f"images, {span(below)} points below PGD on the images that both attacked."
        for kind in COMBINED
        if (count := int(table.get(kind, pd.Series()).notna().sum()))
        and (below := tables.below_pgd(chosen, kind))
    )
    label_protocols(report, tables.label_protocols(chosen), labels)
    inside = [str(model.folder) for model in study.models]
    first = table[table["folder"].isin(inside)].drop_duplicates("activation")
    paired(report, first.assign(model=first["activation"].map(ACTIVATION_LABELS)), kind, "Study")
    verdicts(report, study)
    return study


def settings(study: Study) -> dict[str, str]:
    """What the trainings were made with, and the sizes of the networks."""
    s, record = study.models[0].settings, study.models[0].record
    sizes = {m.activation: f"{m.record['results']['parameters']:,}" for m in study.models}
    return {
        "ParametersReLU": sizes.get("relu", NONE),
        "ParametersKAF": sizes.get("kaf", NONE),
        "ParametersKAFFree": sizes.get("kaf_free", NONE),
        "TrainData": study.models[0].dataset_label,
        "Epochs": str(s["epochs"]),
        "BatchSize": str(s["batch_size"]),
        "TrainImages": f"{record['dataset']['train_n']:,}",
        "ValidationImages": f"{record['results'].get('validation_n', 0):,}",
        "TrainEpsilon": f"{255 * s['epsilon']:g}/255",
        "TrainAlpha": f"{255 * s['alpha']:g}/255",
        "RateFirst": f"{first_rate(s):.2g}",
        "RatePeak": f"{s['lr_max']:g}",
        "RateLast": f"{s['lr_min']:g}",
        "Momentum": f"{s['momentum']:g}",
        "WeightDecay": f"{s['l2']:g}",
        "DictionarySize": str(s["dictionary_size"]),
    }


def first_rate(s: Mapping[str, Any]) -> float:
    return s["lr_min"] + s["lr_start"] * (s["lr_max"] - s["lr_min"])


def last_month(results: pd.DataFrame) -> str:
    """Of the attacks: "November 2026"."""
    summaries = [read_json(Path(path)) for path in results["path"]]
    dates = [pd.Timestamp(summary["date"]) for summary in summaries if "date" in summary]
    return f"{max(dates):%B %Y}" if dates else NONE


def in_words(counts: Iterable[int]) -> str:
    """ "one seed", "2 to 3 seeds"."""
    ends = sorted(set(counts))
    numbers = dict.fromkeys(str(end) for end in (ends[0], ends[-1]))
    return "one seed" if ends == [1] else f"{' to '.join(numbers)} seeds"


def label_protocols(report: Report, frame: pd.DataFrame, labels: Mapping[str, str]) -> None:
    """The table and the spans of `tables.label_protocols`; labels: {folder: name}."""
    names = {
        "true": "true labels",
        "predicted": "predicted*",
        "added": "added",
        "wrong": "by wrong images",
        "counting": "by counting",
        "later": "later restarts",
    }
    frame = frame.loc[[folder for folder in labels if folder in frame.index]]
    report.tables["labels"] = tabular(
        {"network": [labels[folder] for folder in frame.index]}
        | {title: [points(v, "") for v in frame[name]] for name, title in names.items()}
    )
    report.numbers |= {f"Labels{name.title()}": span(frame[name]) for name in frame}


# --------------------------------------------------------------------------- tests and verdicts


def paired(report: Report, table: pd.DataFrame, kind: str, name: str) -> None:
    """The paired tests against ReLU and Swish of a table whose models bear the report's names."""
    known = table.drop_duplicates("activation").set_index("activation")["model"]
    activations = table.set_index("model")["activation"]
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
            f"{key}Robust": told_apart(pairs, "p_holm", "robust_difference", WORDS),
            f"{key}Clean": told_apart(pairs, "clean_p_holm", "clean_difference", CLEAN_WORDS),
        }
        reaches += list((pairs["high"] - pairs["low"]) / 2)
        found = pairs[(pairs["p_holm"] < LEVEL) & (sign * pairs["robust_difference"] > 0)]
        above[reference] = list(activations[found["model"]])
        for row in pairs[pairs["model"] == known.get("swish")].itertuples():
            interval = f"{points(row.low)} to {points(row.high)}"
            report.numbers[f"{name}SwishOverReLU"] = f"{points(row.robust_difference)} ({interval})"
    report.numbers[f"{name}HalfWidth"] = span(reaches)
    answers(report, name, above, sorted(set(activations), key=list(STUDIED).index))


def answers(
    report: Report, name: str, above: Mapping[str, Sequence[str]], tested: Sequence[str]
) -> None:
    """Two sentences, of above: {"relu": what is above ReLU, "swish": what Swish is above}."""
    kafs = [a for a in tested if is_kaf(a)]
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


def verdicts(report: Report, study: Study) -> None:
    """Means and verdicts over seeds; the answers come from these where there are several."""
    averages, claims = means(study), claims_table(study)
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
    several = max(study.seeds.values()) > 1
    report.numbers |= {
        "PairsTested": str(sum(rows["pairs"])),
        "PairsUndecided": str(sum(rows["undecided"])),
        "TestedOver": "over seeds and images" if several else "on the images, one network of each",
        "SeedSpread": claim_notes(study, averages, claims)[0]
        if several
        else "As there is one seed of each activation, the variance between trainings is unknown, "
        "and every verdict over seeds is undecided.",
    }
    if several:
        sure = claims[claims["verdict"] == WORDS[0]]
        seen = {
            "relu": list(sure["first"][sure["claim"] == KAFS_ROBUST]),
            "swish": list(sure["second"][sure["claim"] == MOST_ROBUST]),
        }
        answers(report, "Study", seen, list(study.seeds))


# --------------------------------------------------------------------------- the original networks


def original(report: Report, results: pd.DataFrame) -> None:
    """The networks of the original work, whose files are named architecture_activation_..."""
    table = model_table(results)
    known = {name.replace("_", ""): name for name in STUDIED}
    parts = [f"{name}_".split("_") for name in table["model"]]
    if "rapid" not in table.attrs["chosen"] or not all(part[1] in known for part in parts):
        raise InputError("original networks need results of rapid and names as resnet20_kafswish_x")
    table["activation"] = [known[part[1]] for part in parts]
    figures = [STUDIED[known[part[1]]].published.get(part[0]) for part in parts]
    pairs = [figure or (np.nan, np.nan) for figure in figures]
    table[["published_accuracy", "published_robustness"]] = pairs
    label = table["activation"].map(ACTIVATION_LABELS)
    label = label.where(~label.duplicated(keep=False), table["model"])
    fall = table["published_robustness"] - table["rapid"]
    files = {"file": list(table["model"])}
    table = table.assign(model=label)
    cells = files | shown(table) | {"fall": [points(value, "") for value in fall]}
    report.tables["original"] = tabular(cells, "ll" + "r" * (len(cells) - 2))
    report.numbers |= {
        "OriginalNetworks": str(len(table)),
        "OriginalEach": "one of each activation"
        if table["activation"].is_unique
        else f"of {table['activation'].nunique()} activations",
        "OriginalImages": f"{table.attrs['n']['rapid']:,}",
        "OriginalSpan": span(table["rapid"]),
        "OriginalCleanSpan": span(table["clean_accuracy"]),
        "OriginalPublishedSpan": span(table["published_robustness"]),
        "OriginalFall": span(fall),
        "OriginalCleanFall": span(table["published_accuracy"] - table["clean_accuracy"]),
    }
    paired(report, table, "rapid", "Original")


# --------------------------------------------------------------------------- trainings, cost


def validation(model: TrainedModel, what: str) -> float:
    return model.record["results"].get(f"validation_{what}", np.nan)


def trainings(report: Report, models: Sequence[TrainedModel], results: pd.DataFrame) -> None:
    """Every network in models/, and what it was attacked by."""
    under = {
        folder: ", ".join(
            f"{Path(row.path).stem.replace('-true', '')} {points(row.robust_accuracy, '')}"
            for row in rows.itertuples()
        )
        for folder, rows in results[results["labels"] == "true"].groupby("folder")
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


def curvature(report: Report, models: Sequence[TrainedModel]) -> None:
    """The median curvature over the layers, epoch by epoch, where it was recorded."""
    labels, rows = model_labels(models), []
    moved: dict[str, list[str]] = {"Rose": [], "Fell": []}
    for model in models:
        layers = model.history.filter(like="curvature_")
        if layers.empty:
            continue
        median = layers.median(axis=1)
        epochs = (0, len(median) // 2, len(median) - 1)
        last = layers.iloc[-1]
        rows.append(
            {"network": labels[model.folder]}
            | {f"epoch {epoch + 1}": f"{median[epoch]:.2f}" for epoch in epochs}
            | {"layers at the end": f"{last.min():.2f} to {last.max():.2f}"}
        )
        moved["Rose" if median.iloc[-1] > median[0] else "Fell"].append(labels[model.folder])
    if not rows:
        raise InputError("no history has a curvature_1; train a network with this version")
    report.tables["curvature"] = tabular(pd.DataFrame(rows).to_dict("list"))
    report.numbers["CurvatureNetworks"] = str(len(rows))
    for way, names in moved.items():
        report.numbers[f"Curvature{way}"] = "; ".join(names) or "no network"


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
    for what, name in (("clean", "clean"), ("fgsm", "FGSM"), ("pgd", "PGD-10")):
        cells[name] = [points(validation(model, what), "") for model in models]
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


def cost(report: Report, path: Path) -> None:
    """Ratios measured within one run, of the benchmarks."""
    content = read_json(path)
    rows: dict[str, list[str]] = {"ratio": [], "median": [], "quartiles": []}
    for macro, (title, *keys) in COSTS.items():
        value = content
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict) or not {"median", "quartiles"} <= value.keys():
            raise InputError(f"{str(path)!r} lacks {'/'.join(keys)}; run benchmarks/run.py all")
        report.numbers[macro] = f"{value['median']:.3g}"
        rows["ratio"].append(title)
        rows["median"].append(report.numbers[macro])
        rows["quartiles"].append(" to ".join(f"{end:.3g}" for end in value["quartiles"]))
    report.tables["cost"] = tabular(rows)


# --------------------------------------------------------------------------- command


def reported(root: Path) -> Report:
    """The whole report of the result files in a clone."""
    models, results = trained_models(root / "models"), read_results(root / "models")
    report = Report()
    published(report)
    study = trained_here(report, results)
    original(report, read_results(root / "results" / "original"))
    trainings(report, models, results)
    first = study.models[0].settings
    alike = [m for m in models if all(m.settings.get(k) == first.get(k) for k in ALIKE)]
    over_seeds(report, alike)
    curvature(report, alike)
    pilots(report, trained_models(root / "pilots"))
    cost(report, root / "benchmarks" / "results.json")
    return report


def parse(argv: Sequence[str] | None = None) -> Namespace:
    parser = CommandParser(
        prog="python -m kaf_study.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="the clone (here)")
    parser.add_argument("--out", metavar="DIR", help="for the .tex files (thesis/generated there)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    root = Path(arguments.root)
    try:
        reported(root).write(Path(arguments.out or root / "thesis" / "generated"))
    except InputError as error:
        print(f"kaf_study.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
