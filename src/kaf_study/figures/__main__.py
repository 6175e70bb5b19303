"""python -m kaf_study.figures KIND MODEL_FOLDER... --out FILE.png"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack

import matplotlib
from matplotlib.figure import Figure, SubFigure

from kaf_study import CommandParser, InputError, run_command
from kaf_study.activations import is_kaf
from kaf_study.cards import ATTACKS, COMBINED, kind_of_attack
from kaf_study.claims import Study, studies
from kaf_study.figures.insights import curvature_and_robustness
from kaf_study.figures.kafs import initial_network, kaf_shapes, kaf_shapes_side_by_side
from kaf_study.figures.results import accuracy_robustness_scatter, smallest_perturbations
from kaf_study.figures.seeds import accuracies_over_seeds
from kaf_study.figures.style import Line, save
from kaf_study.figures.training import training_curves
from kaf_study.mechanism import curvature_table
from kaf_study.model_folder import TrainedModel, common_training, model_labels, trained_models
from kaf_study.records import read_results


def parse(argv: Sequence[str] | None = None) -> Namespace:
    parser = CommandParser(
        prog="python -m kaf_study.figures",
        description="Figures from model folders and their result files.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("seeds", "clean and robust accuracy over seeds, with intervals"),
        ("scatter", "clean against robust accuracy"),
        ("perturbations", "images that stand, by the smallest perturbation found (deepfool)"),
        ("curves", "loss and probe accuracies by epoch"),
        ("shapes", "the functions of a model's KAF layers, or of several models side by side"),
        ("curvature", "curvature before and after training, and robust accuracy"),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("folders", nargs="+", metavar="MODEL_FOLDER", help="or models/")
        command.add_argument("--out", required=True, metavar="FILE.png")
        if name == "scatter":
            command.add_argument("--labels", choices=("true", "predicted"), default="true")
        if name in ("scatter", "perturbations"):
            command.add_argument("--protocol", help="name of the result files: pgd-50-10-true")
        if name == "seeds":
            command.add_argument("--attack", choices=ATTACKS, default="rapid")
        if name == "shapes":
            command.add_argument("--channels", type=int, default=6, help="drawn per layer (6)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    matplotlib.use("Agg")

    def run():
        save(drawn(arguments), arguments.out)
        print(arguments.out)

    return run_command("kaf_study.figures", run)


def drawn(arguments: Namespace) -> Figure | SubFigure:
    """The figure that was asked for."""
    models = trained_models(*arguments.folders)  # also says if something is not a folder
    if arguments.command == "seeds":
        name = COMBINED.get(arguments.attack, "PGD")
        return accuracies_over_seeds(_one_study(arguments), name)
    if arguments.command == "scatter":
        results = read_results(*arguments.folders)
        ax = accuracy_robustness_scatter(results, arguments.labels, protocol=arguments.protocol)
        return ax.figure
    if arguments.command == "perturbations":
        results = read_results(*arguments.folders)
        return smallest_perturbations(results, protocol=arguments.protocol).figure
    if arguments.command == "curves":
        return _curves(models)
    if arguments.command == "curvature":
        measured = [model for model in models if model.curvature]
        return curvature_and_robustness(curvature_table(models), common_training(measured))
    return _shapes(models, arguments.channels)


def _one_study(arguments: Namespace) -> Study:
    found = studies(read_results(*arguments.folders), kind_of_attack(arguments.attack))
    if len(found) != 1:
        raise InputError(
            f"expected networks that were trained alike and attacked by {arguments.attack}, got "
            f"{len(found)} groups of such; name their folders (models/cifar10_resnet20_*, say)"
        )
    return found[0]


def _curves(models: list[TrainedModel]) -> Figure:
    labels = model_labels(models)
    images = {str(model.record["results"].get("probe_n")) for model in models}
    # Of ordinary training Keras reports the loss with the regularisation.
    kinds = [model.settings.get("epsilon") == 0 for model in models]
    loss = "with l2" if all(kinds) else "each its own" if any(kinds) else "perturbed batches"
    return training_curves(
        {labels[model.folder]: Line(model.history, model.activation) for model in models},
        title=f"{common_training(models)},\nprobed on {', '.join(sorted(images))} "
        "validation images",
        loss=f"training loss ({loss})",
    )


def _shapes(models: list[TrainedModel], channels: int) -> Figure:
    models = [model for model in models if is_kaf(model.activation)]
    if not models:
        raise InputError("no finished model with KAFs is there, so there are no shapes to draw")
    if channels < 1:
        raise InputError(f"--channels must be at least 1, got {channels}")
    from kaf_study.saved_models import open_model

    labels = model_labels(models)
    with ExitStack() as stack:
        networks = {
            labels[model.folder]: (
                stack.enter_context(open_model(str(model.folder))).model,
                initial_network(model),
            )
            for model in models
        }
        if len(networks) > 1:
            title = common_training(models)
            return kaf_shapes_side_by_side(networks, channels=channels, title=title)
        ((label, (model, initial)),) = networks.items()
        title = f"{label}, {common_training(models)}"
        return kaf_shapes(model, initial=initial, channels=channels, title=title)


if __name__ == "__main__":
    sys.exit(main())
