"""Attack saved classifiers with PGD and say how many test images stand.

    python robustness_eval.py models/NAME                     # a model folder of this project
    python robustness_eval.py foreign.keras --dataset cifar10  # any Keras classifier

MODEL is a model folder, a .keras or .h5 file, a SavedModel folder, or a .zip of one. Results go
to MODEL/robustness/ (model folders), else to robustness/NAME/ beside the model, or to DIR/NAME/
with --out DIR. Interrupted, the same command goes on after the last finished restart. How images
are counted, under true and under predicted labels, is written in experiments/evaluation.py.
"""

import argparse
import os
import sys
from contextlib import ExitStack

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# After the log level, which TensorFlow reads once; TensorFlow itself is imported in `run`, when
# the settings are known to be possible.
from experiments import InputError, results
from experiments.results import AttackSettings, check_count


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="robustness_eval.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--dataset",
        choices=("cifar10", "digits"),
        help="default: the one its training.json names, else cifar10",
    )
    parser.add_argument("--data-dir", metavar="D", help="folder of cifar-10-batches-py")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--n", type=int, default=1000, help="first N test images (1000)")
    size.add_argument("--all", action="store_true", help="all test images")
    parser.add_argument("--eps", type=float, default=8, help="L-inf radius in 255ths (8)")
    parser.add_argument("--step", type=float, default=2, help="step size in 255ths (2)")
    parser.add_argument("--steps", type=int, default=50, help="iterations (50)")
    parser.add_argument("--restarts", type=int, default=10, help="random restarts (10)")
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
    parser.add_argument("--force", action="store_true", help="repeat finished evaluations")
    return parser.parse_args(argv)


def main(argv=None):
    """The command. Returns its exit code: 0, or 2 if something given cannot be used."""
    arguments = parse(argv)
    try:
        print(run(arguments))
    except InputError as error:
        print(f"robustness_eval.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("robustness_eval.py: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


def run(arguments):
    """Evaluate every model under every protocol asked for; returns the table."""
    protocols = [
        AttackSettings(
            epsilon=arguments.eps / 255,
            alpha=arguments.step / 255,
            steps=arguments.steps,
            restarts=arguments.restarts,
            labels=labels,
            seed=arguments.seed,
        )
        for labels in dict.fromkeys(arguments.labels)
    ]
    check_count("--n", arguments.n, 1)
    check_count("--batch-size", arguments.batch_size, 1)

    from experiments import evaluation
    from experiments.saved_models import open_model

    summaries = []
    with ExitStack() as stack:
        # All are opened before the first is attacked: a bad one shows at once.
        models = [stack.enter_context(open_model(path)) for path in arguments.models]
        refuse_clashes(models, arguments.out, evaluation.result_folder)
        data = {
            name: test_images(name, arguments) for name in {_dataset(m, arguments) for m in models}
        }
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
                        progress=progress,
                        say=print,
                    )
                summaries.append(result.summary)
    return results.results_table(summaries)


def _dataset(model, arguments):
    return arguments.dataset or model.dataset or "cifar10"


def test_images(name, arguments):
    """The first n test images, their labels, and the number of classes."""
    from experiments import datasets

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
