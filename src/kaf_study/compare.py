"""Compare models from their result files alone: tables, paired tests, model cards, scatter plot.

    python robustness_eval.py compare models/
    python robustness_eval.py compare models/ --into README.md --cards models/README.md

Two models were attacked on the same images, so their difference is judged pair by pair: of n
images b stand under the first model only and c under the second only, and all others say nothing
about the difference (b - c) / n. McNemar's test (1947, Psychometrika 12) asks whether b and c could
come from a fair coin; here the exact, binomial one, two-sided, corrected for the number of
comparisons by Holm (1979, Scandinavian Journal of Statistics 6). The 95 % interval is Wald's for
paired proportions (Agresti 2013, "Categorical data analysis", section 11.1).
"""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from kaf_study import CommandParser, InputError
from kaf_study.activations import ACTIVATION_LABELS
from kaf_study.figures import accuracy_robustness_scatter, put_table_into, save
from kaf_study.model_folder import (
    DATASET_LABELS,
    model_order,
    trained_models,
    with_training,
)
from kaf_study.records import Evaluation, make_writable, read_results, write_atomically

# Master's thesis (Sapienza, 2020): clean accuracy, and accuracy under PGD-50-10 of ART 1.3.3
# called without labels: of the predicted-label kind. 60 (VGG) and 80 epochs of CIFAR-10.
PUBLISHED = {
    ("vgg", "relu"): (0.7810, 0.4541),
    ("vgg", "elu"): (0.7399, 0.4549),
    ("vgg", "kaf"): (0.7793, 0.4680),
    ("vgg", "kaf_elu"): (0.7493, 0.4540),
    ("vgg", "swish"): (0.7699, 0.4773),
    ("vgg", "kaf_swish"): (0.7885, 0.4633),
    ("vgg", "kaf_free"): (0.7754, 0.4620),
    ("resnet20", "relu"): (0.7752, 0.5017),
    ("resnet20", "elu"): (0.7542, 0.5169),
    ("resnet20", "kaf"): (0.7808, 0.5223),
    ("resnet20", "kaf_relu"): (0.7965, 0.5144),
    ("resnet20", "kaf_elu"): (0.7869, 0.5276),
    ("resnet20", "swish"): (0.7868, 0.5388),
    ("resnet20", "kaf_swish"): (0.7921, 0.5210),
    ("resnet20", "kaf_free"): (0.7888, 0.5207),
}

KINDS = {  # column -> which results are meant
    "pgd_true": {"attack": "pgd", "labels": "true"},
    "pgd_predicted": {"attack": "pgd", "labels": "predicted"},
    "suite": {"attack": "suite", "labels": "true"},
}
SETTINGS = ["dataset", "attack", "labels", "epsilon", "alpha", "steps", "restarts", "seed", "n"]
SAME_FOR_ALL = ("dataset", "epsilon")
SAME_PGD = ("alpha", "steps", "restarts", "seed")


# --------------------------------------------------------------------------- the table


def chosen_results(results):
    """For each of `KINDS` the results of one protocol: {kind: DataFrame, one row per model}.

    Where there are several protocols (other numbers of images, say) the one that most models have
    is taken, and of those the one of most images: figures of different protocols do not mix. All
    kinds are of the data set and radius of the first one found, and PGD is the same under both
    labels.
    """
    chosen = {}
    for kind, wanted in KINDS.items():
        wanted = dict(wanted)
        if chosen:
            first = next(iter(chosen.values())).iloc[0]
            same = [*SAME_FOR_ALL, *(SAME_PGD if kind == "pgd_predicted" else ())]
            wanted |= {name: first[name] for name in same}
        rows = results[np.logical_and.reduce([results[k] == v for k, v in wanted.items()])]
        if rows.empty:
            continue
        groups = rows.groupby(SETTINGS, dropna=False, sort=True)
        chosen[kind] = max(
            (group for _, group in groups),
            key=lambda group: (group["folder"].nunique(), group["n"].iloc[0]),
        )
        _refuse_twins(chosen[kind], "folder", "path")
        chosen[kind] = chosen[kind].set_index("folder")
    if "pgd_true" not in chosen and "suite" not in chosen:
        raise InputError("no results with true labels there; make them with robustness_eval.py")
    return chosen


def _refuse_twins(rows, column, places):
    """Two rows of one name cannot be told apart in a table, nor which of them is meant."""
    twins = rows[rows.duplicated(column, keep=False)]
    if len(twins):
        name = twins[column].iloc[0]
        where = " and ".join(twins.loc[twins[column] == name, places].iloc[:2])
        raise InputError(
            f"{where} both claim to be {name!r} under one protocol; leave one out, or rename it"
        )


def comparison(results):
    """One row per model, fractions; columns as in the CSV. `.attrs["n"]`: {kind: images}.

    The standard errors are binomial. Clean accuracy is that of the images of the first kind that is
    there (PGD's, as a rule), and empty for a model that lacks it: no column mixes sizes.
    """
    results = with_training(results)
    chosen = chosen_results(results)
    first_kind = next(iter(chosen))
    folders = dict.fromkeys(folder for rows in chosen.values() for folder in rows.index)
    table = []
    for folder in folders:
        found = {kind: rows.loc[folder] for kind, rows in chosen.items() if folder in rows.index}
        any_row = next(iter(found.values()))
        training = any_row["training"]
        settings = training.settings if training else {}
        row = {
            "model": any_row["model"] or Path(folder).name,
            "activation": any_row["activation"],
            "architecture": settings.get("architecture"),
        }
        for name in ("clean_accuracy", "clean_standard_error"):
            row[name] = found[first_kind][name] if first_kind in found else np.nan
        for kind in KINDS:
            value, error = "robust_accuracy", "robust_standard_error"
            if kind == "pgd_predicted":
                value, error = (
                    "accuracy_under_attack_predicted_labels",
                    "standard_error_predicted_labels",
                )
            row[kind] = found[kind][value] if kind in found else np.nan
            row[f"{kind}_standard_error"] = found[kind][error] if kind in found else np.nan
        record = training.record if training else {"results": {}}
        epochs = record["results"].get("epochs_trained")
        published = ()
        if settings.get("dataset") == "cifar10":
            published = PUBLISHED.get((settings["architecture"], any_row["activation"]), ())
        row |= dict(zip(("published_accuracy", "published_robustness"), published, strict=False))
        row |= {
            "epochs": epochs,
            "seconds_per_epoch": record["seconds"] / epochs if epochs else None,
            "parameters": record["results"].get("parameters"),
            "model_sha256": any_row["model_sha256"],
            "folder": folder,
        }
        table.append(((training is None, model_order(training) if training else ()), row))
    rows = [row for _, row in sorted(table, key=lambda item: item[0])]
    columns = ["published_accuracy", "published_robustness", "epochs", "seconds_per_epoch"]
    frame = pd.DataFrame(rows)
    _refuse_twins(frame, "model", "folder")
    frame = frame.reindex(columns=[*frame.columns.union(columns, sort=False)])
    frame.attrs["n"] = {kind: int(rows["n"].iloc[0]) for kind, rows in chosen.items()}
    frame.attrs["chosen"] = chosen
    return frame


def shown(table):
    """The table as text: {header: cells}, percent with standard errors."""
    n, chosen = table.attrs["n"], table.attrs["chosen"]

    def accuracy(column):
        return [
            "–" if pd.isna(v) else f"{100 * v:.1f} ± {100 * e:.1f}"
            for v, e in zip(table[column], table[_error_of(column)], strict=True)
        ]

    def plain(column, pattern):
        return ["–" if pd.isna(v) else pattern.format(v) for v in table[column]]

    cells = {"model": list(table["model"]), "clean": accuracy("clean_accuracy")}
    for kind, name in (("pgd_true", "true labels"), ("pgd_predicted", "predicted labels*")):
        if kind in chosen:
            cells[f"{_pgd_name(chosen[kind])}, {name}"] = accuracy(kind)
    if "suite" in n:
        cells["suite"] = accuracy("suite")
    if table["published_accuracy"].notna().any():
        cells["published clean"] = plain("published_accuracy", "{:.2%}")
        cells["published robust*"] = plain("published_robustness", "{:.2%}")
        cells = {k: [c.rstrip("%") for c in v] for k, v in cells.items()}
    cells["s per epoch"] = plain("seconds_per_epoch", "{:.0f}")
    cells["epochs"] = plain("epochs", "{:.0f}")
    cells["parameters"] = plain("parameters", "{:,.0f}")
    return cells


def _error_of(column):
    return column.replace("_accuracy", "") + "_standard_error"


def notes(table, kinds=tuple(KINDS), *, errors=True):
    """What the figures of `kinds` in a table are, in sentences; errors: they stand beside them."""
    chosen = table.attrs["chosen"]
    n = {kind: size for kind, size in table.attrs["n"].items() if kind in kinds}
    row = next(iter(chosen.values())).iloc[0]
    step = chosen["pgd_true"].iloc[0]["alpha"] if "pgd_true" in chosen else None
    counts = {"pgd_true": "PGD", "pgd_predicted": "PGD with predicted labels", "suite": "suite"}
    sizes = ", ".join(f"{counts[kind]} {size:,}" for kind, size in n.items())
    lines = [
        f"Percent of the first test images of {_dataset(chosen)} (n: {sizes})"
        + " ± one binomial standard error" * errors
        + f"; L-inf, eps {255 * row['epsilon']:g}/255"
        + (f", step {255 * step:g}/255" if step else "")
        + ". PGD-S-R: S steps, R random restarts; the worst counts, image by image."
    ]
    if "suite" in n:
        lines.append("Suite: apgd-ce, apgd-t, square, pgd, each on what the ones before left.")
    if "pgd_predicted" in n:
        lines.append(
            "\\* Only for comparison with figures from attacks called without labels; not a "
            "robust accuracy."
        )
    return lines


def _dataset(chosen):
    rows = next(iter(chosen.values()))
    name = rows["dataset"].iloc[0]
    plain = DATASET_LABELS.get(name, name)
    trained_on = {model.dataset_label for model in rows["training"] if model is not None}
    copies = sorted(label for label in trained_on if label != plain and label.endswith(plain))
    return copies[0] if copies else plain


# --------------------------------------------------------------------------- paired differences


def comparisons(table, names=(), kind="pgd_true"):
    """The paired tests of a table: a list of what `paired` returns.

    Args:
        names: of models, each compared with all others. None given: what the published claims
            compare with, within each architecture: "Swish is the most robust", "KAFs improve on
            ReLU"; where there is neither, the first model.
        kind: see `paired`.
    """
    if names:
        return [pairs for name in names if len(pairs := paired(table, name, kind))]
    table = _with_results(table, kind)
    found = []
    for _, group in table.groupby("architecture", dropna=False, sort=False):
        if len(group) > 1:
            first = group.drop_duplicates("activation").set_index("activation")["model"]
            claimed = [first[name] for name in ("swish", "relu") if name in first]
            references = claimed or [group["model"].iloc[0]]
            found += [paired(group, name, kind) for name in references]
    return found


def paired(table, reference, kind="pgd_true"):
    """Each model against a reference on the same images: DataFrame, one row per other model.

    Args:
        table: of `comparison`.
        reference: name of a model.
        kind: "pgd_true" or "suite".

    Returns:
        Columns model, reference, attack, n, robust_difference, low, high (95 %), only_model,
        only_reference (images that stand under one alone), p (McNemar, exact), p_holm;
        clean_difference and, of accuracy on clean images, clean_p and clean_p_holm.

    Raises:
        InputError: if a reference is not there, or results are not of the same images.
    """
    table = _with_results(table, kind)
    names = list(table["model"])
    if reference not in names:
        raise InputError(
            f"--reference {reference!r} is not among {', '.join(names) or 'the models'} with "
            f"results of {kind}"
        )
    if len(table) < 2:
        return pd.DataFrame()
    rows = table.attrs["chosen"][kind]
    found = {
        name: Evaluation.read(rows.loc[folder, "path"])
        for name, folder in zip(names, table["folder"], strict=True)
    }
    base = found.pop(reference)
    attack = "suite" if kind == "suite" else _pgd_name(rows)
    differences = [
        {"model": name, "reference": reference, "attack": attack}
        | _difference(name, result, reference, base)
        for name, result in found.items()
    ]
    frame = pd.DataFrame(differences)
    frame["p_holm"] = holm(frame["p"])
    frame["clean_p_holm"] = holm(frame["clean_p"])
    return frame


def _with_results(table, kind):
    """The rows of a table whose models have results of a kind."""
    rows = table.attrs["chosen"].get(kind)
    return table[table["folder"].isin(rows.index)] if rows is not None else table[:0]


def _pgd_name(rows):
    """PGD-S-R."""
    return f"PGD-{rows['steps'].iloc[0]:.0f}-{rows['restarts'].iloc[0]:.0f}"


def _difference(name, result, reference, base):
    for what, get in (
        ("images", lambda r: r.summary["dataset"].get("fingerprint")),
        ("number of images", lambda r: len(r.images)),
    ):
        if get(result) != get(base):
            raise InputError(
                f"{name} and {reference} were attacked on different {what}; evaluate both alike"
            )
    standing, correct = (
        [function(r.images).to_numpy() for r in (result, base)] for function in (_robust, _clean)
    )
    b, c = _discordant(*standing)
    n = len(base.images)
    difference, margin = (b - c) / n, 1.96 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    return {
        "n": n,
        "robust_difference": difference,
        "low": difference - margin,
        "high": difference + margin,
        "only_model": b,
        "only_reference": c,
        "p": mcnemar(b, c),
        "clean_difference": float(correct[0].mean() - correct[1].mean()),
        "clean_p": mcnemar(*_discordant(*correct)),
    }


def _discordant(one, other):
    """How many images only `one` has, and how many only `other`."""
    return int((one & ~other).sum()), int((other & ~one).sum())


def _clean(rows):
    return rows["label"] == rows["clean_prediction"]


def _robust(rows):
    return _clean(rows) & (rows["label"] == rows["adversarial_prediction"])


def mcnemar(b, c):
    """Exact two-sided p-value of b against c discordant pairs."""
    return float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def holm(p):
    """Holm's step-down correction of p-values (k,)."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return np.minimum(corrected, 1.0)[np.argsort(order)]


def shown_pairs(pairs):
    """The paired differences as text: {header: cells}, in points."""
    return {
        f"against {pairs['reference'].iloc[0]}": list(pairs["model"]),
        "robust, points": [f"{100 * d:+.1f}" for d in pairs["robust_difference"]],
        "95 %": [
            f"{100 * a:+.1f} to {100 * b:+.1f}"
            for a, b in zip(pairs["low"], pairs["high"], strict=True)
        ],
        "stand under this / the reference alone": [
            f"{b} / {c}" for b, c in zip(pairs["only_model"], pairs["only_reference"], strict=True)
        ],
        "p (Holm)": _shown_p(pairs["p_holm"]),
        "clean, points": [f"{100 * d:+.1f}" for d in pairs["clean_difference"]],
        "clean, p (Holm)": _shown_p(pairs["clean_p_holm"]),
    }


def _shown_p(values):
    return ["< 0.001" if p < 0.001 else f"{p:.3f}" for p in values]


def conclusion(pairs):
    """Two sentences: what n images tell apart at 5 %, robust and clean, and what they do not."""
    n, reference, attack = pairs[["n", "reference", "attack"]].iloc[0]
    attack = "the suite" if attack == "suite" else attack
    robust = _told_apart(pairs, "p_holm", "robust_difference", ("more robust", "less robust"))
    clean = _told_apart(
        pairs, "clean_p_holm", "clean_difference", ("more accurate", "less accurate")
    )
    return (
        f"On {n:,} images, McNemar's exact test at 5 % with Holm's correction for {len(pairs)} "
        f"comparison{'s' * (len(pairs) > 1)} with {reference}, under {attack}: {robust}. "
        f"On the clean images: {clean}."
    )


def _told_apart(pairs, p, difference, words):
    apart = pairs[p] < 0.05
    parts = []
    for is_above, word in zip((True, False), words, strict=True):
        names = pairs["model"][apart & ((pairs[difference] > 0) == is_above)]
        if len(names):
            parts.append(f"{word}: {', '.join(names)}")
    if not apart.all():
        parts.append(f"not told apart: {', '.join(pairs['model'][~apart])}")
    return "; ".join(parts)


# --------------------------------------------------------------------------- model cards


def model_cards(results, *folders):
    """Markdown for models/README.md: one row per model; RobustBench's model_info keys where any.

    Args:
        results: of `read_results`.
        folders: whose trained models are listed, also those without results of the protocol.
    """
    table = comparison(results)
    rows_of = next(iter(table.attrs["chosen"].values()))
    eps, data = rows_of["epsilon"].iloc[0], rows_of["dataset"].iloc[0]
    evaluated = {Path(row.folder).resolve(): row for row in table.itertuples()}
    trained = {model.folder.resolve(): model for model in trained_models(*folders)}
    rows = {}
    for folder in trained | evaluated:
        row, model = evaluated.get(folder), trained.get(folder)
        settings = model.settings if model else {}
        record = model.record if model else {"results": {}}
        activation = row.activation if row else model.activation
        epochs, parameters = (record["results"].get(k) for k in ("epochs_trained", "parameters"))
        sha256 = row.model_sha256 if row else record.get("model_sha256")
        rows[row.model if row else folder.name] = {
            "architecture": settings.get("architecture", "–"),
            "activation": ACTIVATION_LABELS.get(activation, activation or "–"),
            "dataset": settings.get("dataset", data),
            "eps": f"{255 * eps:g}/255",
            "clean_acc": _or_dash(row.clean_accuracy if row else None),
            "pgd_acc": _or_dash(row.pgd_true if row else None),
            "suite_acc": _or_dash(row.suite if row else None),
            "epochs": f"{epochs}" if epochs else "–",
            "optimizer": settings.get("optimizer", "–"),
            "lr_max": settings.get("lr_max", "–"),
            "train_eps": f"{255 * settings['epsilon']:g}/255" if "epsilon" in settings else "–",
            "seed": settings.get("seed", "–"),
            "additional_data": "False",
            "parameters": f"{parameters:,}" if parameters else "–",
            "sha256": f"`{str(sha256)[:12]}`",
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    columns = {"model": list(frame.index), **{c: list(frame[c]) for c in frame}}
    return "\n".join(
        [
            "# Models",
            "",
            "Generated from `training.json` and the result files by",
            "`python robustness_eval.py compare models --cards models/README.md`; do not edit.",
            "",
            markdown(columns),
            "",
            *notes(table, ("pgd_true", "suite"), errors=False),
            "",
            "pgd_acc and suite_acc: robust accuracy, true labels; not AutoAttack's.",
            "A dash: not attacked in this way. train_eps 0/255: ordinary training.",
            *exceptions(list(trained.values())),
            "Keys follow RobustBench's model_info where it has one. sha256 is of `model.keras`.",
            "",
        ]
    )


def exceptions(models):
    """Sentences on models trained with other settings than most of their kind.

    A kind: one data set, architecture and radius. The activation is no exception, nor the seed.
    """
    kinds = {}
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


def _or_dash(value):
    return "–" if pd.isna(value) else f"{100 * value:.1f}"


# --------------------------------------------------------------------------- text


def markdown(columns):
    """{header: cells} as a Markdown table; all but the first column to the right."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [list(map(str, cells)) for cells in zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_table(table):
    return "\n".join([markdown(shown(table)), "", *notes(table)])


def markdown_pairs(*tests):
    """Markdown of results of `paired`, one table and its conclusion for each."""
    return "\n\n".join(f"{markdown(shown_pairs(c))}\n\n{conclusion(c)}" for c in tests)


def console(columns):
    return pd.DataFrame(columns).to_string(index=False)


# --------------------------------------------------------------------------- the command


def parse(argv=None):
    parser = CommandParser(
        prog="robustness_eval.py compare",
        description="Tables, paired tests and the scatter plot, from result files alone.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="models/, or model folders")
    parser.add_argument(
        "--reference",
        nargs="+",
        metavar="MODEL",
        help="each is compared with all others (Swish and ReLU, within each architecture)",
    )
    parser.add_argument(
        "--attack", choices=("pgd", "suite"), default="pgd",
        help="whose results (true labels) the paired tests count (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="writes .csv, .md and .png files there")
    parser.add_argument(
        "--into", metavar="README.md", help="rewrites its <!-- table --> and <!-- paired --> blocks"
    )
    parser.add_argument("--cards", metavar="FILE.md", help="writes model cards")
    return parser.parse_args(argv)


def main(argv=None):
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    try:
        run(arguments)
    except InputError as error:
        print(f"robustness_eval.py compare: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments):
    for folder in arguments.folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder!r} is not a folder; give model folders, or models/")
    results = read_results(*arguments.folders)
    if results.empty:
        raise InputError(
            f"no results in {', '.join(arguments.folders)}; make them with robustness_eval.py MODEL"
        )
    table = comparison(results)
    kind = {"pgd": "pgd_true", "suite": "suite"}[arguments.attack]
    tests = comparisons(table, arguments.reference or (), kind)
    if arguments.attack == "suite" and not tests:
        raise InputError(
            "--attack suite needs results of two models to compare; make them with "
            "robustness_eval.py MODEL --attack suite"
        )
    print(console(shown(table)), "", *notes(table), sep="\n")
    for pairs in tests:
        print("", console(shown_pairs(pairs)), "", conclusion(pairs), sep="\n")
    if arguments.out:
        write(results, table, tests, Path(arguments.out))
    if arguments.into:
        put_table_into(arguments.into, markdown_table(table))
        if tests:
            put_table_into(arguments.into, markdown_pairs(*tests), "paired")
    if arguments.cards:
        make_writable(Path(arguments.cards).parent)
        write_atomically(Path(arguments.cards), model_cards(results, *arguments.folders).encode())


def write(results, table, tests, folder):
    """comparison.csv and .md, paired.csv, scatter.png"""
    matplotlib.use("Agg")
    make_writable(folder)
    files = {"comparison.csv": csv(table), "comparison.md": markdown_table(table) + "\n"}
    if tests:
        files["paired.csv"] = csv(pd.concat(tests))
        files["comparison.md"] += "\n" + markdown_pairs(*tests) + "\n"
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    if "pgd_true" in table.attrs["chosen"]:
        rows = table.attrs["chosen"]["pgd_true"]
        drawn = results[results["path"].isin(rows["path"])]
        save(accuracy_robustness_scatter(drawn).figure, folder / "scatter.png")


def csv(frame):
    buffer = io.StringIO()
    frame.to_csv(buffer, index=False, float_format="%.9g", lineterminator="\n")
    return buffer.getvalue()
