"""Do activations become alike in training, and does their curvature go with robustness?

    python -m kaf_study.mechanism models/cifar10_resnet20_* --into RESULTS.md

The curvature is kappa (`kaf_study.curvature`), of validation images, before training (as the seed
made the network, batch norm by the batch) and after it: the median over channels, then over layers.
It is measured once for each network and kept in its folder; the tables need no images. ReLU and
k-WTA have none.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kaf_study import CommandParser, InputError, run_command
from kaf_study.activations import (
    ACTIVATION_LABELS,
    STUDIED,
    WITHOUT_CURVATURE,
    is_trained_kaf,
    kind_of,
)
from kaf_study.cards import COMBINED, console, markdown, put_table_into
from kaf_study.claims import training_of
from kaf_study.model_folder import ModelFolder, TrainedModel, trained_models
from kaf_study.paired import LEVEL
from kaf_study.records import read_results, write_json
from kaf_study.tables import model_table, pgd_name

IMAGES = 512
WHEN = ("before_training", "after_training")
KINDS = ("rapid", "pgd_true")  # whose robust accuracy is taken: the first that most networks have
LEAST = 4  # activations: the fewest whose 24 orders can be told from chance at 5 %


def measure(model: TrainedModel, data_dir: str | None = None) -> dict[str, Any]:
    """The curvature of a finished network, as it is kept in its folder (`CurvatureRecord`).

    Raises:
        InputError: the images at hand are not those that it was trained with.
    """
    from kaf_study.curvature import curvatures
    from kaf_study.datasets import fingerprint, load_validation
    from kaf_study.figures.kafs import initial_network
    from kaf_study.saved_models import open_model

    x, y = load_validation(model.settings["dataset"], data_dir)
    there = model.record.get("dataset", {}).get("validation_fingerprint")
    if there != fingerprint(x, y):
        raise InputError(
            f"{model.folder} was trained with other images than those at hand; name them by "
            "--data-dir"
        )
    x = x[:IMAGES]
    with open_model(model.folder) as opened:
        found = (
            curvatures(initial_network(model), x, training=True),
            curvatures(opened.model, x),
        )
    medians = [one.groupby("layer")["kappa"].median().tolist() for one in found]
    record = {
        "model_sha256": model.record["model_sha256"],
        "dataset": {"name": model.settings["dataset"], "validation_fingerprint": there},
        "n": len(x),
    } | dict(zip(WHEN, medians, strict=True))
    write_json(ModelFolder(model.folder).curvature, record)
    return record


def curvature_table(models: Sequence[TrainedModel]) -> pd.DataFrame:
    """One row for each network that has its curvature measured.

    Returns:
        DataFrame: folder, activation, seed, n (images of the curvature); before_training and
        after_training, the medians over layers; robust and robust_standard_error, fractions, NaN
        where it was not attacked so. Its `.attrs["attack"]` says how: "rapid on 10,000 images",
        None if by nothing.

    Raises:
        InputError: the networks are not of one study (`claims.training_of`), or none is measured.
    """
    measured = [(model, kappa) for model in models if (kappa := model.curvature)]
    if not measured:
        raise InputError("no network there has its curvature measured, or ReLU and k-WTA alone")
    trainings = [training_of(model) for model, _ in measured]
    for name in trainings[0]:
        if len({training[name] for training in trainings}) > 1:
            raise InputError(
                f"the networks differ in {name}; give those of one study, as in "
                "models/cifar10_resnet20_*"
            )
    rows = [
        {
            "folder": str(model.folder),
            "activation": model.activation,
            "seed": model.settings["seed"],
            "n": kappa["n"],
        }
        | {when: float(np.median(kappa[when])) for when in WHEN}
        for model, kappa in measured
    ]
    return _with_robustness(pd.DataFrame(rows))


def _with_robustness(frame: pd.DataFrame) -> pd.DataFrame:
    """Two more columns: robust, robust_standard_error."""
    frame = frame.assign(robust=np.nan, robust_standard_error=np.nan)
    frame.attrs["attack"] = None
    results = read_results(*frame["folder"])
    if not (results["labels"] == "true").any():
        return frame
    table = model_table(results)
    chosen = table.attrs["chosen"]
    there = [kind for kind in KINDS if kind in chosen]
    if not there:
        return frame
    kind = max(there, key=lambda kind: table[kind].notna().sum())
    of_folder = table.set_index("folder").reindex(frame["folder"])
    name = COMBINED.get(kind) or pgd_name(chosen[kind])
    frame.attrs["attack"] = f"{name} on {table.attrs['n'][kind]:,} images"
    return frame.assign(
        robust=of_folder[kind].to_numpy(),
        robust_standard_error=of_folder[f"{kind}_standard_error"].to_numpy(),
    )


def by_activation(networks: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of each activation, in the order of the tables.

    Args:
        networks: of `curvature_table`.

    Returns:
        DataFrame, a row for each activation: seeds, before_training, after_training, attacked (how
        many), robust (the mean over those).
    """
    groups = networks.groupby("activation", sort=False)
    frame = groups[[*WHEN, "robust"]].mean()
    frame.insert(0, "seeds", groups.size())
    frame.insert(3, "attacked", groups["robust"].count())
    frame.attrs = networks.attrs
    return frame.loc[[name for name in STUDIED if name in frame.index]]


def association(means: pd.DataFrame) -> tuple[float, float, int] | None:
    """Spearman's rank correlation of the two columns of a table, such as curvature and robustness.

    Args:
        means: one row per activation, not per network: seeds of one are no independent witnesses.
            Rows with a missing value are left out.

    Returns:
        (rho, two-sided p by permutation, exact up to 8 activations; how many), or None where there
        are fewer than LEAST.
    """
    pairs = means.dropna().to_numpy()
    if len(pairs) < LEAST:
        return None

    def rho(order):
        return stats.spearmanr(order, pairs[:, 1]).statistic

    tested = stats.permutation_test(
        (pairs[:, 0],), rho, permutation_type="pairings", n_resamples=50_000,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(tested.statistic), float(tested.pvalue), len(pairs)


# --------------------------------------------------------------------------- text


def shown(means: pd.DataFrame) -> dict[str, list[str]]:
    """`by_activation` as text."""
    cells = {
        "activation": [ACTIVATION_LABELS[name] for name in means.index],
        "kind": [kind_of(name) for name in means.index],
        "seeds": [str(n) for n in means["seeds"]],
        "kappa before": [f"{kappa:.2f}" for kappa in means["before_training"]],
        "kappa after": [f"{kappa:.2f}" for kappa in means["after_training"]],
    }
    if means.attrs["attack"]:
        robust = zip(means["robust"], means["attacked"], strict=True)
        cells[f"robust, % ({means.attrs['attack']})"] = [
            f"{100 * value:.1f} ({n})" if n else "–" for value, n in robust
        ]
    return cells


def conclusions(networks: pd.DataFrame) -> tuple[str, str]:
    """What the table says of shapes, and of robustness, in sentences made of its figures."""
    means = by_activation(networks)
    learned = means[[is_trained_kaf(name) for name in means.index]]
    shapes = "With fewer than two learned activations there are none to become alike."
    if len(learned) > 1:
        (low, high), (low_after, high_after) = (
            (learned[when].min(), learned[when].max()) for when in WHEN
        )
        change = "closer together" if high_after / low_after < high / low else "further apart"
        shapes = (
            f"The {len(learned)} learned activations lie {change} after training than before: from "
            f"{low_after:.2f} to {high_after:.2f} (a factor of {high_after / low_after:.1f}) where "
            f"it was {low:.2f} to {high:.2f} ({high / low:.1f})."
        )
    if (found := association(means[["after_training", "robust"]])) is None:
        return shapes, f"Fewer than {LEAST} activations cannot tell a relation to robust accuracy."
    rho, p, count = found
    verdict = "goes with" if p < LEVEL else "is not shown to go with"
    return shapes, (
        f"Curvature after training {verdict} robust accuracy: Spearman's rho {rho:+.2f} over "
        f"{count} activations, p = {p:.2f} by permutation."
    )


def markdown_curvature(networks: pd.DataFrame) -> str:
    sizes = " or ".join(f"{n:,}" for n in networks["n"].unique())
    note = f"kappa: median over channels and layers, on {sizes} validation images, mean over seeds."
    if networks.attrs["attack"]:
        note += " Robust: mean over the networks attacked so, how many in brackets."
    return "\n".join(
        [markdown(shown(by_activation(networks))), "", note, "", *conclusions(networks)]
    )


# --------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None = None) -> Namespace:
    parser = CommandParser(
        prog="python -m kaf_study.mechanism", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folders", nargs="+", metavar="MODEL_FOLDER", help="of one study")
    parser.add_argument("--data-dir", metavar="DIR", help="CIFAR-10, as for training")
    parser.add_argument("--into", metavar="RESULTS.md", help="rewrites its <!-- curvature -->")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    return run_command("kaf_study.mechanism", lambda: run(arguments))


def run(arguments: Namespace) -> None:
    models = trained_models(*arguments.folders)
    for model in models:
        if model.activation not in WITHOUT_CURVATURE and not model.curvature:
            print(f"measuring {model.folder}", flush=True)
            measure(model, arguments.data_dir)
    networks = curvature_table(models)
    print(console(shown(by_activation(networks))), "", *conclusions(networks), sep="\n")
    if arguments.into:
        put_table_into(arguments.into, markdown_curvature(networks), "curvature")


if __name__ == "__main__":
    sys.exit(main())
