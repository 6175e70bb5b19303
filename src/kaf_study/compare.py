"""Compare models from their result files alone: tables, tests, claims, cards, scatter plot.

python robustness_eval.py compare models/
python robustness_eval.py compare models/ --into RESULTS.md --cards models/README.md
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd

from kaf_study import CommandParser, InputError, run_command
from kaf_study.cards import (
    ATTACKS,
    COMBINED,
    claim_notes,
    conclusion,
    console,
    kind_of_attack,
    markdown,
    markdown_claims,
    markdown_originals,
    markdown_pairs,
    markdown_table,
    model_cards,
    notes,
    put_table_into,
    shown,
    shown_answer,
    shown_claims,
    shown_means,
    shown_pairs,
    shown_rapid,
    shown_verdicts,
)
from kaf_study.claims import (
    Study,
    beside_originals,
    claims_table,
    main_study,
    means,
    studies,
    training_of,
)
from kaf_study.figures import accuracy_robustness_scatter, save
from kaf_study.files import make_writable, write_atomically
from kaf_study.model_folder import common_training
from kaf_study.records import read_results
from kaf_study.tables import (
    TRUE_LABELS,
    model_table,
    original_table,
    paired_tests,
    rapid_beside_stronger,
)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    parser = CommandParser(
        prog="robustness_eval.py compare",
        description="Tables, tests, claims and the scatter plot, from result files alone.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="models/, or model folders")
    parser.add_argument(
        "--reference",
        nargs="+",
        metavar="MODEL",
        help="each is compared with all others (Swish and ReLU, within each architecture)",
    )
    parser.add_argument(
        "--attack", choices=ATTACKS, default="pgd",
        help="whose results (true labels) the paired tests count (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="writes .csv, .md and .png files there")
    parser.add_argument(
        "--into",
        metavar="RESULTS.md",
        help="rewrites its <!-- table --> and, where there are results for them, <!-- paired -->, "
        "<!-- claims --> (over seeds), <!-- rapid --> (beside stronger attacks) and, with "
        "--originals, <!-- originals -->",
    )
    parser.add_argument(
        "--answer", metavar="README.md", help="rewrites its <!-- answer -->: means over seeds"
    )
    parser.add_argument("--cards", metavar="FILE.md", help="writes model cards")
    parser.add_argument(
        "--originals", metavar="DIR", help="results on the original networks, beside the claims"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    return run_command("robustness_eval.py compare", lambda: run(arguments))


def run(arguments: Namespace) -> None:
    for folder in arguments.folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder!r} is not a folder; give model folders, or models/")
    results = read_results(*arguments.folders)
    if results.empty:
        raise InputError(
            f"no results in {', '.join(arguments.folders)}; make them with robustness_eval.py MODEL"
        )
    table = model_table(results)
    kind = kind_of_attack(arguments.attack)
    tests = paired_tests(table, arguments.reference or (), kind)
    if kind != "pgd_true" and not tests:
        raise InputError(
            f"--attack {kind} needs results of two models to compare; make them with "
            f"robustness_eval.py MODEL --attack {kind}"
        )
    print(console(shown(table)), "", *notes(table), sep="\n")
    for pairs in tests:
        print("", console(shown_pairs(pairs)), "", conclusion(pairs), sep="\n")
    originals = original_table(read_results(arguments.originals)) if arguments.originals else None
    studied = tables_of_studies(results, kind, originals)
    for one in studied:
        print("", one.title, "", console(shown_means(one.means)), sep="\n")
        print("", console(shown_claims(one.claims)), "", sep="\n")
        print(*claim_notes(one.study, one.means, one.claims), sep="\n")
    if arguments.out:
        write(results, table, tests, studied, Path(arguments.out))
    if arguments.into:
        put_table_into(arguments.into, markdown_table(table))
        if tests:
            put_table_into(arguments.into, markdown_pairs(*tests), "paired")
        if studied:
            put_table_into(arguments.into, markdown_of(studied), "claims")
        if originals is not None:
            put_table_into(arguments.into, markdown_originals(originals), "originals")
        if len(beside := rapid_beside_stronger(results)):
            put_table_into(arguments.into, markdown(shown_rapid(beside)), "rapid")
    if arguments.answer:
        found = [(one.study, one.means) for one in studied]
        found = found or [(study, means(study)) for study in studies(results, kind)]
        put_table_into(arguments.answer, answer(found), "answer")
    if arguments.cards:
        make_writable(Path(arguments.cards).parent)
        cards = model_cards(results, *arguments.folders, into=arguments.cards)
        write_atomically(Path(arguments.cards), cards.encode())


class StudyTables(NamedTuple):
    title: str
    study: Study
    means: pd.DataFrame
    claims: pd.DataFrame


def tables_of_studies(
    results: pd.DataFrame, kind: str, originals: pd.DataFrame | None = None
) -> list[StudyTables]:
    """Means and verdicts of each study that has claims and several seeds of an activation.

    All are of the kind of attack of the `main_study`; of equal ones that under `kind`. Beside them
    those with one seed of each that a study with several can lend its spread between seeds.
    """
    kinds = dict.fromkeys((kind, *TRUE_LABELS))
    attacked = [study for attack in kinds for study in studies(results, attack)]
    if not attacked:
        return []
    main = main_study(attacked)
    tested = [
        study
        for study in attacked
        if study.kind == main.kind
        and study.has_claims
        and (study.has_several_seeds or study.lender)
    ]
    found = []
    for title, study in zip(titles_of(tested), tested, strict=True):
        claims = claims_table(study)
        if originals is not None:
            claims = beside_originals(claims, originals, study.architecture)
        found.append(StudyTables(title, study, means(study), claims))
    return found


def titles_of(tested: Sequence[Study]) -> list[str]:
    """How each was trained and attacked; of those that this names alike, also what differs."""
    names = [
        f"{common_training(study.models)}, {COMBINED.get(study.kind, 'PGD')}" for study in tested
    ]
    trainings = [training_of(study.models[0]) for study in tested]
    titles = []
    for name, training in zip(names, trainings, strict=True):
        twins = [other for twin, other in zip(names, trainings, strict=True) if twin == name]
        words = [name]
        for setting, value in training.items():
            if any(twin[setting] != value for twin in twins):
                shown_value = f"{value:.3g}" if isinstance(value, float) else str(value)[:16]
                words.append(f"{setting} {shown_value}")
        titles.append(", ".join(words))
    return titles


def markdown_of(studied: list[StudyTables]) -> str:
    """Each study by itself, and the verdicts side by side if there are several."""
    parts = [
        f"**{one.title}**\n\n{markdown_claims(one.study, one.means, one.claims)}" for one in studied
    ]
    if len(studied) > 1:
        verdicts = shown_verdicts({one.title: one.claims for one in studied})
        if verdicts["claim"]:
            parts.append(markdown(verdicts))
    return "\n\n".join(parts)


def answer(found: list[tuple[Study, pd.DataFrame]]) -> str:
    """Of the `main_study`; each with its `claims.means`."""
    if not found:
        raise InputError("--answer needs models trained here, with their training.json")
    main = main_study(study for study, _ in found)
    (averages,) = (averages for study, averages in found if study is main)
    return markdown(shown_answer(averages, main.architecture))


def write(
    results: pd.DataFrame,
    table: pd.DataFrame,
    tests: list[pd.DataFrame],
    studied: list[StudyTables],
    folder: Path,
) -> None:
    """comparison.csv and .md, paired.csv, claims.csv, scatter.png"""
    matplotlib.use("Agg")
    make_writable(folder)
    files = {"comparison.csv": csv(table), "comparison.md": markdown_table(table) + "\n"}
    if tests:
        files["paired.csv"] = csv(pd.concat(tests))
        files["comparison.md"] += "\n" + markdown_pairs(*tests) + "\n"
    if studied:
        parts = [one.claims.assign(study=one.title) for one in studied]
        files["claims.csv"] = csv(pd.concat(parts))
        files["comparison.md"] += "\n" + markdown_of(studied) + "\n"
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    if "pgd_true" in table.attrs["chosen"]:
        rows = table.attrs["chosen"]["pgd_true"]
        drawn = results[results["path"].isin(rows["path"])]
        save(accuracy_robustness_scatter(drawn).figure, folder / "scatter.png")


def csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.9g", lineterminator="\n")
