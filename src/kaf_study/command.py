"""Attack saved classifiers and say how many test images stand.

    python robustness_eval.py models/NAME                 # PGD; a model folder
    python robustness_eval.py foreign.h5 --input 0..255   # a Keras classifier
    python robustness_eval.py models/NAME --attack rapid  # the worst of several
    python robustness_eval.py models/NAME --check         # can it be trusted?
    python robustness_eval.py compare models/             # tables and a figure

MODEL is a model folder, a .keras or .h5 file (of Keras 3; of Keras 2 where
tf_keras is installed), a SavedModel folder, or a .zip of one. Results go to
MODEL/robustness/ (model folders), else to robustness/NAME/ beside the model,
or to DIR/NAME/ with --out DIR. Interrupted, the same command goes on after the
last finished restart. How images are counted, under true and under predicted
labels, is written in kaf_study/evaluation.py.
"""

import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter, _ArgumentGroup
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# After the log level, which TensorFlow reads once; TensorFlow itself is imported in `run`, when
# the settings are known to be possible.
from kaf_study import CommandParser, InputError, called_as, records, run_command
from kaf_study.attacks.registry import (
    ATTACKS,
    DEFAULT_N,
    LABELS,
    MOST_IMAGES_TOGETHER,
    AttackSettings,
    check_count,
)
from kaf_study.files import make_writable
from kaf_study.records import write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kaf_study.result_files import ImageSet
    from kaf_study.sanity_checks import CheckReport
    from kaf_study.saved_models import LoadedModel, Opening

CHECK_N = 64
MOST_N = 1_000_000  # more than any test set here; what is beyond is a slip of the keyboard


def prog() -> str:
    """The command as it was called."""
    return called_as("kaf-evaluate", "robustness_eval.py")


def parse(argv: list[str] | None = None) -> Namespace:
    parser = CommandParser(
        prog=prog(), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    add_model_options(parser.add_argument_group("models and images"))
    add_attack_options(parser.add_argument_group("attack"))
    results = parser.add_argument_group("results")
    results.add_argument("--batch-size", type=int, default=128, help="images at a time (128)")
    results.add_argument("--out", metavar="DIR", help="results go to DIR/NAME/")
    results.add_argument(
        "--check",
        action="store_true",
        help="sanity checks (Carlini et al. 2019) instead; exit code 1 if one fails",
    )
    results.add_argument(
        "--transfer-from",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="with --check: attack these too",
    )
    results.add_argument(
        "--save-examples", type=int, metavar="K", help="draw the first K fallen images (.png)"
    )
    results.add_argument(
        "--save-adversarial",
        action="store_true",
        help="keep what the attack added to the images (.npz)",
    )
    results.add_argument("--force", action="store_true", help="repeat finished evaluations")
    return parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))


def _joined(argv):
    """`--input -1..1` as `--input=-1..1`: argparse takes what begins with a dash for an option."""
    joined = []
    for argument in argv:
        if argument == "-1..1" and joined[-1:] == ["--input"]:
            argument = f"{joined.pop()}={argument}"
        joined.append(argument)
    return joined


def add_model_options(parser: _ArgumentGroup) -> None:
    """Which images, and what a file does not say of its model (`opening_of`)."""
    parser.add_argument(
        "--dataset",
        choices=("cifar10", "digits"),
        help="default: the one its training.json names, else cifar10",
    )
    parser.add_argument("--data-dir", metavar="D", help="folder of cifar-10-batches-py")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--n", type=int, help=f"first N test images ({DEFAULT_N}; {CHECK_N} to check)"
    )
    size.add_argument("--all", action="store_true", help="all test images")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first, for the layers it defines (repeatable)",
    )
    parser.add_argument(
        "--input",
        metavar="RANGE",
        help="pixels it was trained on: 0..1 (default), 0..255, -1..1 or mean=R,G,B,std=R,G,B; "
        "eps stays in 255ths of [0, 1]",
    )
    parser.add_argument(
        "--architecture", metavar="NAME", help="of a file of weights alone: resnet20, ..."
    )
    parser.add_argument(
        "--activation", metavar="NAME", help="of a file of weights alone: kaf, relu, ..."
    )


def opening_of(arguments: Namespace) -> "Opening":
    """How to open the models."""
    from kaf_study.saved_models import Network, Opening, PixelRange

    named = arguments.architecture, arguments.activation
    if (named[0] is None) != (named[1] is None):
        raise InputError("--architecture and --activation go together; give both, or neither")
    return Opening(
        imports=tuple(arguments.imports),
        pixel_range=None if arguments.input is None else PixelRange.parse(arguments.input),
        network=None if named[0] is None else Network(*named),
    )


def add_attack_options(parser: _ArgumentGroup) -> None:
    """The options that decide a verdict: what `settings_of` reads."""
    suites = ", ".join(
        f"{name} ({', '.join(member for member, _ in attack.members)})"
        for name, attack in ATTACKS.items()
        if attack.members
    )
    alone = ", ".join(name for name, attack in ATTACKS.items() if not attack.members)
    parser.add_argument(
        "--attack",
        choices=tuple(ATTACKS),
        default="pgd",
        metavar="NAME",
        help=f"one of {alone} (pgd); or several in turn, each on what still stands: {suites}",
    )
    parser.add_argument("--eps", type=float, default=8, help="L-inf radius in 255ths (8)")
    parser.add_argument("--step", type=float, help="step size of pgd in 255ths (2)")
    queried = [name for name, own in ATTACKS.items() if not (own.members or own.needs_gradient)]
    targeted = [name for name, own in ATTACKS.items() if own.is_targeted]
    for name, what in (
        ("steps", f"iterations, of {' and '.join(queried)}: queries"),
        ("restarts", f"random restarts, of {', '.join(targeted)}: target classes"),
    ):
        counts = {attack: getattr(own, name) for attack, own in ATTACKS.items()}
        defaults = ", ".join(f"{attack} {count}" for attack, count in counts.items() if count)
        parser.add_argument(f"--{name}", type=int, help=f"{what} ({defaults})")
    parser.add_argument(
        "--labels",
        nargs="+",
        choices=LABELS,
        default=["true"],
        help="true (default): the real figure; predicted: only to compare with published ones",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random starts (0)")


def settings_of(arguments: Namespace, labels: str) -> AttackSettings:
    return AttackSettings(
        attack=arguments.attack,
        epsilon=arguments.eps / 255,
        alpha=None if arguments.step is None else arguments.step / 255,
        steps=arguments.steps,
        restarts=arguments.restarts,
        labels=labels,
        seed=arguments.seed,
    )


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0; 1 if a check failed; 2 if something cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        from kaf_study import compare

        return compare.main(argv[1:])
    arguments = parse(argv)

    def checked_or_attacked():
        if arguments.check:
            return 0 if check(arguments) else 1
        print(run(arguments))

    again = "begins anew" if arguments.check else "resumes"
    return run_command(prog(), checked_or_attacked, again)


def run(arguments: Namespace) -> str:
    """Evaluate every model under every protocol asked for; returns the table."""
    if arguments.transfer_from:
        raise InputError("--transfer-from is for --check; give both, or neither")
    protocols = [settings_of(arguments, labels) for labels in dict.fromkeys(arguments.labels)]
    check_counts(arguments, DEFAULT_N)

    from kaf_study import result_files
    from kaf_study.evaluation import Execution

    keep_images = bool(arguments.save_examples or arguments.save_adversarial)
    summaries = []
    with ExitStack() as stack:
        models, data = opened(arguments, stack)
        for model in models:
            images = data[_dataset(model, arguments)]
            folder = result_files.result_folder(model, arguments.out)
            for settings in protocols:
                with progress_bar(f"{model.name}, {settings.labels} labels") as progress:
                    result = result_files.evaluate_saved(
                        model,
                        images,
                        settings,
                        out=arguments.out,
                        force=arguments.force,
                        keep_images=keep_images,
                        execution=Execution(arguments.batch_size, progress=progress, say=print),
                    )
                summaries.append(result.summary)
                if arguments.save_adversarial:
                    print(result_files.save_adversarial(result, images.x, folder))
                if arguments.save_examples:
                    print(save_examples(model, images, result, folder, arguments.save_examples))
    return records.results_table(summaries)


def check_counts(arguments: Namespace, default_n: int) -> None:
    if arguments.n is None:
        arguments.n = default_n
    check_count("--n", arguments.n, 1, MOST_N)
    check_count("--batch-size", arguments.batch_size, 1, MOST_IMAGES_TOGETHER)
    if arguments.save_examples is not None:
        check_count("--save-examples", arguments.save_examples, 1, MOST_N)


def opened(
    arguments: Namespace, stack: ExitStack
) -> "tuple[list[LoadedModel], dict[str, ImageSet]]":
    """The models, and {data set: ImageSet}; all is opened before anything is attacked."""
    from kaf_study import datasets, result_files
    from kaf_study.saved_models import open_model

    how = opening_of(arguments)
    models = [stack.enter_context(open_model(path, how)) for path in arguments.models]
    refuse_clashes(models, arguments.out, result_files.result_folder)
    names = {_dataset(model, arguments) for model in models}
    if arguments.data_dir is not None and "cifar10" not in names:
        raise InputError(f"--data-dir is for cifar10, not for {', '.join(names)}; leave it out")
    tests = {name: datasets.load_test(name, data_dir=arguments.data_dir) for name in names}
    for model in models:
        model.refuse_other_range(*tests[_dataset(model, arguments)])  # however few are attacked
    return models, {name: first_images(name, *test, arguments) for name, test in tests.items()}


def opened_beside(
    arguments: Namespace, stack: ExitStack, data: Iterable["ImageSet"]
) -> "list[LoadedModel]":
    """The models of --transfer-from; those with a training record of ours take [0, 1]."""
    from kaf_study.saved_models import open_model
    from kaf_study.saved_models.pixel_range import Rescaled

    how, others = opening_of(arguments), []
    for path in arguments.transfer_from:
        other = stack.enter_context(open_model(path, replace(how, pixel_range=None, network=None)))
        if how.pixel_range is not None and other.training is None:
            other = replace(other, model=Rescaled(other.model, how.pixel_range))
        for images in data:
            other.refuse_other_range(images.x, images.y)
        others.append(other)
    return others


def check(arguments: Namespace) -> bool:
    """Run the sanity checks on every model, print them, keep them; returns whether all passed."""
    check_counts(arguments, CHECK_N)
    refuse_ignored(arguments)

    from kaf_study import result_files, sanity_checks

    arguments.restarts = sanity_checks.RESTARTS
    settings = settings_of(arguments, "true")
    passed = True
    with ExitStack() as stack:
        models, data = opened(arguments, stack)
        others = opened_beside(arguments, stack, data.values())
        for model in models:
            images = data[_dataset(model, arguments)]
            folder = result_files.result_folder(model, arguments.out)
            make_writable(folder)
            report = sanity_checks.check_model(
                model.model,
                images.x,
                images.y,
                settings,
                batch_size=arguments.batch_size,
                classes=images.classes,
                transfer_from=[(o.name, o.model) for o in others if o.sha256 != model.sha256],
            )
            print(f"{model.name}, first {len(images.x)} test images of {images.dataset}")
            print("\n".join(report.lines()))
            print(f"{save_report(report, model, images, settings, folder)} and .png\n")
            passed &= report.passed
    return passed


def refuse_ignored(arguments: Namespace) -> None:
    """What --check would leave unread is refused: it attacks by PGD with restarts of its own."""
    ignored = {
        "--attack": arguments.attack != "pgd",
        "--labels": arguments.labels != ["true"],
        "--restarts": arguments.restarts is not None,
        "--save-examples": arguments.save_examples is not None,
        "--save-adversarial": arguments.save_adversarial,
        "--force": arguments.force,
    }
    given = [name for name, is_given in ignored.items() if is_given]
    if given:
        raise InputError(f"--check does not use {', '.join(given)}; leave it out, or --check")


def save_report(
    report: "CheckReport",
    model: "LoadedModel",
    images: "ImageSet",
    settings: AttackSettings,
    folder: Path,
) -> Path:
    """Keep a report as .json, and its curve as .png beside; returns the path of the first."""
    from kaf_study import figures

    record = {
        "format": "checks-1",
        "model": model.name,
        "model_sha256": model.sha256,
        "dataset": images.dataset,
        "n": len(images.x),
        "attack": {
            "name": settings.attack,
            "epsilon": settings.epsilon,
            "alpha": settings.alpha,
            "steps": settings.steps,
            "restarts": settings.restarts,
        },
        "seed": settings.seed,
        **report.as_dict(),
        "versions": records.versions(),
    }
    stem = settings.stem(len(images.x), images.dataset).replace("pgd", "checks", 1)
    path = folder / f"{stem}.json"
    write_json(path, record, indent=2)
    activation = model.training["settings"]["activation"] if model.training else None
    axes = figures.robustness_curve({model.name: figures.Line(report.curve, activation)})
    figures.save(axes.figure, path.with_suffix(".png"))
    return path


def save_examples(
    model: "LoadedModel",
    images: "ImageSet",
    result: records.Evaluation,
    folder: Path,
    count: int,
) -> str:
    """Draw the first `count` fallen images beside the result; the line that says where."""
    import numpy as np

    from kaf_study import datasets, figures
    from kaf_study.saved_models import logits_of

    has_kept = result.images["label"] == result.images["adversarial_prediction"]
    fell = np.flatnonzero(np.asarray(result.is_clean & ~has_kept))[:count]
    if not len(fell):
        return f"{model.name}: no image fell, so there are no examples to draw"
    logits, _ = logits_of(model.model, images.x[:2])
    x, x_adv = images.x[fell], np.asarray(result.x_adv)[fell]
    figure = figures.adversarial_examples(
        x,
        x_adv,
        images.y[fell],
        np.asarray(logits(x, training=False)),
        np.asarray(logits(x_adv, training=False)),
        datasets.class_names(images.dataset),
        fell.tolist(),
    )
    path = folder / f"{result.stem}-examples.png"
    figures.save(figure, path)
    return str(path)


def _dataset(model, arguments):
    return arguments.dataset or model.dataset or "cifar10"


def first_images(name: str, x: "NDArray", y: "NDArray", arguments: Namespace) -> "ImageSet":
    """The first n of the test images of a data set."""
    from kaf_study.result_files import ImageSet

    n = len(x) if arguments.all else min(arguments.n, len(x))
    if not arguments.all and arguments.n > n:
        print(f"{name} has {n} test images; all are attacked")
    return ImageSet(x[:n], y[:n], name, int(y.max()) + 1)


def refuse_clashes(models: list, out: str | None, result_folder: Callable) -> None:
    """Two models whose results would go to the same folder cannot be told apart afterwards."""
    seen: dict[Path, Path] = {}
    for model in models:
        folder = result_folder(model, out).resolve()
        if folder in seen:
            raise InputError(
                f"{str(seen[folder])!r} and {str(model.path)!r} would both write to "
                f"{str(folder)!r}; rename one, or evaluate them with different --out"
            )
        seen[folder] = model.path


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, int], None]]:
    """A tqdm bar in image iterations that also shows how many images are still standing."""
    bar = None

    def progress(done, total, standing):
        nonlocal bar
        if bar is None:
            from tqdm.auto import tqdm  # a bar of its own in notebooks

            bar = tqdm(total=total, desc=title, unit=" it", leave=False, smoothing=0.05)
        bar.set_postfix_str(f"{standing} standing", refresh=False)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
