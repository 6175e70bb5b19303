"""Attack saved classifiers and say how many test images stand.

    python robustness_eval.py models/NAME                      # PGD; a model folder of this project
    python robustness_eval.py foreign.keras --dataset cifar10  # any Keras classifier
    python robustness_eval.py models/NAME --attack suite       # several attacks, the worst counts
    python robustness_eval.py models/NAME --check              # is the evaluation to be trusted?
    python robustness_eval.py compare models/                  # tables and figure from result files

MODEL is a model folder, a .keras or .h5 file, a SavedModel folder, or a .zip of one. Results go
to MODEL/robustness/ (model folders), else to robustness/NAME/ beside the model, or to DIR/NAME/
with --out DIR. Interrupted, the same command goes on after the last finished restart. How images
are counted, under true and under predicted labels, is written in kaf_study/evaluation.py.
"""

import json
import os
import sys
from argparse import RawDescriptionHelpFormatter
from contextlib import ExitStack

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# After the log level, which TensorFlow reads once; TensorFlow itself is imported in `run`, when
# the settings are known to be possible.
from kaf_study import CommandParser, InputError, records
from kaf_study.attacks.registry import ATTACKS, DEFAULT_N, DEFAULTS, AttackSettings, check_count
from kaf_study.records import make_writable, write_atomically

CHECK_N = 64


def parse(argv=None):
    parser = CommandParser(
        prog="robustness_eval.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
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
        "--attack",
        choices=ATTACKS,
        default="pgd",
        help="pgd (default); suite: apgd-ce, apgd-t, square, pgd, each on what still stands",
    )
    parser.add_argument("--eps", type=float, default=8, help="L-inf radius in 255ths (8)")
    parser.add_argument("--step", type=float, help="step size of pgd in 255ths (2)")
    for name, what in (
        ("steps", "iterations, of square: queries"),
        ("restarts", "random restarts"),
    ):
        own = ", ".join(f"{a} {d[name]}" for a, d in DEFAULTS.items() if d[name])
        parser.add_argument(f"--{name}", type=int, help=f"{what} ({own})")
    parser.add_argument(
        "--labels",
        nargs="+",
        choices=("true", "predicted"),
        default=["true"],
        help="true (default): the real figure; predicted: only to compare with published ones",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random starts (0)")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time (128)")
    parser.add_argument("--out", metavar="DIR", help="results go to DIR/NAME/")
    parser.add_argument(
        "--check",
        action="store_true",
        help="sanity checks (Carlini et al. 2019) instead; exit code 1 if one fails",
    )
    parser.add_argument(
        "--transfer-from",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="with --check: attack these too",
    )
    parser.add_argument(
        "--save-examples", type=int, metavar="K", help="draw the first K fallen images (.png)"
    )
    parser.add_argument(
        "--save-adversarial", action="store_true", help="keep the attacked images (.npz)"
    )
    parser.add_argument("--force", action="store_true", help="repeat finished evaluations")
    return parser.parse_args(argv)


def main(argv=None):
    """The command. Returns its exit code: 0; 1 if a check failed; 2 if something cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        from kaf_study import compare

        return compare.main(argv[1:])
    arguments = parse(argv)
    try:
        if arguments.check:
            return 0 if check(arguments) else 1
        print(run(arguments))
    except InputError as error:
        print(f"robustness_eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "robustness_eval.py: interrupted; the same command "
            + ("begins anew" if arguments.check else "resumes"),
            file=sys.stderr,
        )
        return 130
    return 0


def run(arguments):
    """Evaluate every model under every protocol asked for; returns the table."""
    if arguments.transfer_from:
        raise InputError("--transfer-from is for --check; give both, or neither")
    protocols = [
        AttackSettings(
            attack=arguments.attack,
            epsilon=arguments.eps / 255,
            alpha=None if arguments.step is None else arguments.step / 255,
            steps=arguments.steps,
            restarts=arguments.restarts,
            labels=labels,
            seed=arguments.seed,
        )
        for labels in dict.fromkeys(arguments.labels)
    ]
    check_counts(arguments, DEFAULT_N)

    from kaf_study import evaluation

    summaries = []
    with ExitStack() as stack:
        models, data = opened(arguments, stack)
        for model in models:
            dataset = _dataset(model, arguments)
            x, y, classes = data[dataset]
            for settings in protocols:
                with progress_bar(f"{model.name}, {settings.labels} labels") as progress:
                    result = evaluation.evaluate_saved(
                        model,
                        x,
                        y,
                        settings,
                        dataset=dataset,
                        classes=classes,
                        out=arguments.out,
                        batch_size=arguments.batch_size,
                        force=arguments.force,
                        keep_images=bool(arguments.save_examples or arguments.save_adversarial),
                        progress=progress,
                        say=print,
                    )
                summaries.append(result.summary)
                folder = evaluation.result_folder(model, arguments.out)
                if arguments.save_adversarial:
                    print(evaluation.save_adversarial(result, folder))
                if arguments.save_examples:
                    print(save_examples(model, x, y, result, folder, arguments.save_examples))
    return records.results_table(summaries)


def check_counts(arguments, default_n):
    if arguments.n is None:
        arguments.n = default_n
    check_count("--n", arguments.n, 1)
    check_count("--batch-size", arguments.batch_size, 1)
    if arguments.save_examples is not None:
        check_count("--save-examples", arguments.save_examples, 1)


def opened(arguments, stack):
    """The models, and {data set: (x, y, classes)}; all is opened before anything is attacked."""
    from kaf_study import evaluation
    from kaf_study.saved_models import open_model

    models = [stack.enter_context(open_model(path)) for path in arguments.models]
    refuse_clashes(models, arguments.out, evaluation.result_folder)
    names = {_dataset(model, arguments) for model in models}
    return models, {name: test_images(name, arguments) for name in names}


def check(arguments):
    """Run the sanity checks on every model, print them, keep them; returns whether all passed."""
    check_counts(arguments, CHECK_N)
    refuse_ignored(arguments)

    from kaf_study import evaluation, figures, sanity_checks
    from kaf_study.saved_models import open_model

    settings = AttackSettings(
        epsilon=arguments.eps / 255,
        alpha=None if arguments.step is None else arguments.step / 255,
        steps=arguments.steps,
        restarts=sanity_checks.RESTARTS,
        seed=arguments.seed,
    )
    passed = True
    with ExitStack() as stack:
        models, data = opened(arguments, stack)
        others = [stack.enter_context(open_model(path)) for path in arguments.transfer_from]
        for model in models:
            dataset = _dataset(model, arguments)
            x, y, classes = data[dataset]
            folder = evaluation.result_folder(model, arguments.out)
            make_writable(folder)
            report = sanity_checks.check_model(
                model.model,
                x,
                y,
                epsilon=settings.epsilon,
                alpha=settings.alpha,
                steps=settings.steps,
                seed=settings.seed,
                batch_size=arguments.batch_size,
                classes=classes,
                transfer_from=[(o.name, o.model) for o in others if o.sha256 != model.sha256],
            )
            print(f"{model.name}, first {len(x)} test images of {dataset}")
            print("\n".join(report.lines()))
            stem = settings.stem(len(x), dataset).replace("pgd", "checks", 1)
            record = {
                "format": "checks-1",
                "model": model.name,
                "model_sha256": model.sha256,
                "dataset": dataset,
                "n": len(x),
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
            path = folder / f"{stem}.json"
            write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
            axes = figures.robustness_curve({model.name: report.curve})
            figures.save(axes.figure, path.with_suffix(".png"))
            print(f"{path} and .png\n")
            passed &= report.passed
    return passed


def refuse_ignored(arguments):
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


def save_examples(model, x, y, result, folder, count):
    """Draw the first `count` fallen images beside the result; returns the path."""
    import numpy as np

    from kaf_study import datasets, figures
    from kaf_study.saved_models import logits_of

    rows = result.images
    is_clean = rows["label"] == rows["clean_prediction"]
    fell = np.flatnonzero(is_clean & (rows["label"] != rows["adversarial_prediction"]))[:count]
    if not len(fell):
        return f"{model.name}: no image fell, so there are no examples to draw"
    logits, _ = logits_of(model.model, x[:2])
    clean, attacked = (np.asarray(logits(z[fell], training=False)) for z in (x, result.x_adv))
    figure = figures.adversarial_examples(
        x[fell],
        result.x_adv[fell],
        y[fell],
        clean,
        attacked,
        datasets.class_names(result.summary["dataset"]["name"]),
        fell,
    )
    path = folder / f"{result.stem}-examples.png"
    figures.save(figure, path)
    return path


def _dataset(model, arguments):
    return arguments.dataset or model.dataset or "cifar10"


def test_images(name, arguments):
    """The first n test images, their labels, and the number of classes."""
    from kaf_study import datasets

    _, _, (x, y) = datasets.load(name, data_dir=arguments.data_dir)
    classes = int(y.max()) + 1
    n = len(x) if arguments.all else min(arguments.n, len(x))
    if not arguments.all and arguments.n > n:
        print(f"{name} has {n} test images; all are attacked")
    return x[:n], y[:n], classes


def refuse_clashes(models, out, result_folder):
    """Two models whose results would go to the same folder cannot be told apart afterwards."""
    seen = {}
    for model in models:
        folder = result_folder(model, out).resolve()
        if folder in seen:
            raise InputError(
                f"{str(seen[folder])!r} and {str(model.path)!r} would both write to "
                f"{str(folder)!r}; rename one, or evaluate them with different --out"
            )
        seen[folder] = model.path


class progress_bar:
    """A tqdm bar in image iterations that also shows how many images are still standing."""

    def __init__(self, title):
        self.title, self.bar = title, None

    def __enter__(self):
        return self

    def __call__(self, done, total, standing):
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=self.title, unit=" it", leave=False, smoothing=0.05)
        self.bar.set_postfix_str(f"{standing} standing", refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
