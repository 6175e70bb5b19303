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

import numpy as np
import pandas as pd

from kaf_study import CommandParser, InputError, run_command, tables
from kaf_study.activations import ACTIVATION_LABELS, STUDIED
from kaf_study.cards import COMBINED, NONE, points, shown
from kaf_study.claims import Study, main_study, studies, training_of
from kaf_study.latex import Report, listed, networks_stand, span, tabular
from kaf_study.model_folder import model_labels, trained_models
from kaf_study.records import read_json, read_results
from kaf_study.report_original import in_half_precision, original
from kaf_study.report_tests import elsewhere, paired, verdicts
from kaf_study.report_trainings import (
    cost,
    curvature_by_epoch,
    first_rate,
    held,
    mechanism,
    over_seeds,
    pilots,
    trainings,
)
from kaf_study.tables import model_table, original_table, pgd_name

ARCHITECTURE = "resnet20"  # of the study; other networks stand in the table of all


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


def main_studies(attacked: Iterable[Study]) -> tuple[Study, Study]:
    """The largest study, and that by which the claims are tested; they may be one."""
    found = [study for study in attacked if study.architecture == ARCHITECTURE]
    if not found:
        raise InputError(f"no {ARCHITECTURE} has results; make them with robustness_eval.py")
    largest = max(found, key=lambda study: study.size)
    return largest, main_study([largest, *found])


def trained_here(report: Report, results: pd.DataFrame, originals: pd.DataFrame) -> Study:
    """The networks attacked: their figures, and the tests and verdicts of the main study."""
    attacked = [study for kind in tables.TRUE_LABELS for study in studies(results, kind)]
    study, seeds_study = main_studies(attacked)
    table = model_table(results)
    table = table[table["architecture"] == ARCHITECTURE]
    chosen, n = table.attrs["chosen"], table.attrs["n"]
    if not {"pgd_true", "pgd_predicted"} <= chosen.keys():
        raise InputError("PGD with true and with predicted labels is needed; see RESULTS.md")
    labels = {str(f): name for f, name in model_labels(trained_models(*table["folder"])).items()}
    cells = shown(table.assign(model=[labels[folder] for folder in table["folder"]]))
    for name in ("epochs", "parameters"):
        del cells[name]
    report.tables["networks"] = tabular(cells)
    pgd = chosen["pgd_true"]
    report.numbers |= settings(study) | {
        "StudyAttack": COMBINED.get(study.kind, pgd_name(pgd)),
        "StudyImages": f"{study.n:,}",
        "SeedsOf": f"{in_words(seeds_study.seeds.values())} of "
        f"{listed([ACTIVATION_LABELS[name] for name in seeds_study.seeds])}",
        "SeedsAttack": COMBINED.get(seeds_study.kind, pgd_name(pgd)),
        "SeedsImages": f"{seeds_study.n:,}",
        "CleanSpan": span(table["clean_accuracy"]),
        "CleanImages": f"{n[table.attrs['clean_kind']]:,}",
        "CleanNetworks": str(int(table["clean_accuracy"].notna().sum())),
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
    }
    report.numbers["StrongerAttacks"] = " ".join(
        f"Under {COMBINED[kind]}, {networks_stand(count)} at {span(table[kind])} % of {n[kind]:,} "
        f"images, {span(below.values())} points below PGD on the images that both attacked."
        for kind in COMBINED
        if (count := int(table.get(kind, pd.Series()).notna().sum()))
        and (below := tables.below_pgd(chosen, kind))
    )
    strength_of_rapid(report, results)
    label_protocols(report, tables.label_protocols(chosen), labels)
    inside = [str(model.folder) for model in study.models]
    first = table[table["folder"].isin(inside)].drop_duplicates("activation")
    first = first.assign(model=first["activation"].map(ACTIVATION_LABELS))
    paired(report, first, study.kind, "Study")
    verdicts(report, seeds_study, originals)
    elsewhere(report, [one for one in attacked if one.kind == seeds_study.kind and one.lender])
    return study


def strength_of_rapid(report: Report, results: pd.DataFrame) -> None:
    """How many images `rapid` leaves where attacks that take far longer were run as well."""
    beside = tables.rapid_beside_stronger(results)
    if beside.empty:
        report.numbers["RapidStrength"] = "It was not held against a stronger attack here"
        return
    sums = beside.groupby("attack", sort=False)[["n", "stronger", "rapid"]].sum()
    report.numbers["RapidStrength"] = "It leaves " + " and ".join(
        f"{row.rapid:,} of {row.n:,} images where {'' if row.Index == 'autoattack' else 'the '}"
        f"{COMBINED[row.Index]} leaves {row.stronger:,}"
        for row in sums.itertuples()
    )


def settings(study: Study) -> dict[str, str]:
    """What the trainings were made with, and the sizes of the networks."""
    s, record = study.models[0].settings, study.models[0].record

    def count(images):
        return NONE if images is None else f"{images:,}"

    sizes = {m.activation: f"{m.record['results']['parameters']:,}" for m in study.models}
    return {
        "ParametersReLU": sizes.get("relu", NONE),
        "ParametersKAF": sizes.get("kaf", NONE),
        "ParametersKAFFree": sizes.get("kaf_free", NONE),
        "TrainData": study.models[0].dataset_label,
        "Epochs": str(s["epochs"]),
        "BatchSize": str(s["batch_size"]),
        "TrainImages": count(record.get("dataset", {}).get("train_n")),
        "ValidationImages": count(record["results"].get("validation_n")),
        "TrainEpsilon": f"{255 * s['epsilon']:g}/255",
        "TrainAlpha": f"{255 * s['alpha']:g}/255",
        "RateFirst": f"{first_rate(s):.2g}",
        "RatePeak": f"{s['lr_max']:g}",
        "RateLast": f"{s['lr_min']:g}",
        "Momentum": f"{s['momentum']:g}",
        "WeightDecay": f"{s['l2']:g}",
        "DictionarySize": str(s["dictionary_size"]),
    }


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


# --------------------------------------------------------------------------- command


def reported(root: Path) -> Report:
    """The whole report of the result files in a clone."""
    models, results = trained_models(root / "models"), read_results(root / "models")
    report = Report()
    published(report)
    originals = original_table(read_results(root / "results" / "original"))
    study = trained_here(report, results, originals)
    original(report, originals, study)
    in_half_precision(report, originals, root / "results" / "original" / "float16.csv")
    trainings(report, models, results)
    alike = [model for model in models if training_of(model) == training_of(study.models[0])]
    over_seeds(report, alike)
    mechanism(report, alike)
    curvature_by_epoch(report, alike)
    pilots(report, trained_models(root / "pilots"))
    benchmarks = root / "benchmarks"
    cost(report, benchmarks / "results.json", benchmarks / "results_avx512.json")
    held(report, benchmarks / "against_autoattack.json")
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
    out = Path(arguments.out or root / "thesis" / "generated")
    return run_command("kaf_study.report", lambda: reported(root).write(out))


if __name__ == "__main__":
    sys.exit(main())
