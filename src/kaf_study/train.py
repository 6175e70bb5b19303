"""One training run: settings -> a model folder, resumable from its last finished epoch.

python -m kaf_study.train --dataset cifar10 --architecture resnet20 --activation kaf \
    --epochs 15 --seed 0 --out models/cifar10_resnet20_kaf_seed0
"""

import json
import math
import os
import shutil
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from activationsf import ACTIVATIONS, AnnealKwta, activation
from fbfadvtrain import FastBetterFreeTrainedModel, RobustnessProbe, fgsm_random_start
from kaf_study import CommandParser, InputError
from kaf_study.activations import STUDIED
from kaf_study.architectures import build
from kaf_study.datasets import DATASETS, batches, fingerprint, is_augmentable, load
from kaf_study.fused_layers import fused
from kaf_study.lr_policy import TriangularCycle
from kaf_study.records import hardware, make_writable, versions, write_atomically
from kaf_study.saved_models import file_sha256

PROBE_IMAGES = 512
PROBE_EPSILON = 8 / 255  # where training itself has no radius
KWTA_FIRST_RATIO = 0.30  # Xiao et al. 2020
EMA_BATCHES = 100  # over which the batch norm of a running mean of weights is estimated
OPTIMIZERS = {
    "sgd": lambda schedule, momentum, **kwargs: keras.optimizers.SGD(
        schedule, momentum=momentum, **kwargs
    ),
    "adam": lambda schedule, momentum, **kwargs: keras.optimizers.Adam(
        schedule, beta_1=momentum, **kwargs
    ),
}
INITIALIZERS = ("glorot_uniform", "he_normal", "he_uniform")


def recipe(name, architecture, activation):
    """Optimiser settings: "fast" (few epochs; momentum), "thesis" (SGD without), or "adam".

    The light CNNs are trained with Adam: there a KAF from a random start, whose outputs are small
    and reach the logits through no batch norm, does not leave chance level under SGD.

    Returns optimizer, lr_start, lr_min, lr_max, lr_peak, momentum, ema_momentum and, of the
    ResNets, l2 and kernel_initializer (the other networks have their own).
    """
    common = {
        "lr_start": 0.0,
        "lr_peak": 0.5,
        "kernel_initializer": "glorot_uniform",
        "ema_momentum": None,
    }
    if name == "thesis":
        lr_min, lr_max = 0.01, 0.8
        if architecture == "vgg":
            lr_min, lr_max = STUDIED[activation].thesis_vgg_bounds or (0.0001, 0.1)
        rates = {"lr_min": lr_min, "lr_max": lr_max}
        return common | rates | {"optimizer": "sgd", "momentum": 0.0, "l2": 5e-4}
    if name == "fast":
        # From lr_min a ReLU network overfits to the one-step attack before its rate has risen.
        rates = {"lr_start": 0.25, "lr_min": 0.002, "lr_max": 0.2}
        return common | rates | {"optimizer": "sgd", "momentum": 0.9, "l2": 2.5e-4}
    if name == "adam":
        rates = {"lr_min": 1e-4, "lr_max": 0.01}
        return common | rates | {"optimizer": "adam", "momentum": 0.9, "l2": 2.5e-4}
    raise InputError(f"Unknown recipe {name!r}. Choose one of: fast, thesis, adam.")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; everything its result depends on, but for the data itself."""

    dataset: str = "cifar10"
    architecture: str = "resnet20"
    activation: str = "kaf"
    epochs: int = 15
    batch_size: int = 128
    train_n: int | None = None  # first images of the training split; None: all
    epsilon: float = 8 / 255  # L-inf radius, images in [0, 1]; 0: ordinary training
    alpha: float = 10 / 255  # FGSM step; 1.25 epsilon as in Wong et al.
    optimizer: str = "sgd"  # or adam
    lr_min: float = 0.002  # ends of the one-cycle triangular schedule
    lr_max: float = 0.2  # its peak
    lr_start: float = 0.25  # its first rate, from lr_min (0) to lr_max (1)
    lr_peak: float = 0.5  # where the peak lies, as a fraction of the training
    momentum: float = 0.9  # of SGD; Adam's beta_1
    l2: float = 2.5e-4  # Keras l2 on every kernel; ResNets only
    kernel_initializer: str = "glorot_uniform"  # of the convolutions; ResNets only
    ema_momentum: float | None = None  # of a running mean of the weights, which is what is saved
    dictionary_size: int = 20  # D of the KAFs
    kwta_anneal_from: int | None = None  # epoch from which k-WTA's ratio falls from 0.30 ...
    kwta_anneal_every: int = 2  # ... by 0.01 every so many epochs, to 0.15 if they are enough
    seed: int = 0
    deterministic: bool = False  # TensorFlow's op determinism, slower

    def check(self):
        """Raises InputError for settings that cannot be trained."""
        if self.dataset not in DATASETS:
            raise InputError(
                f"Unknown dataset {self.dataset!r}. Choose one of: {', '.join(DATASETS)}."
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"Unknown activation {self.activation!r}. Choose one of: {', '.join(ACTIVATIONS)}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"Unknown optimizer {self.optimizer!r}. Choose one of: {', '.join(OPTIMIZERS)}."
            )
        for name in ("epochs", "batch_size", "train_n", "kwta_anneal_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; received {value}.")
        if not (0 <= self.epsilon <= 1 and 0 <= self.alpha <= 1):
            raise InputError(
                "epsilon and alpha lie between 0 and 255 (in 255ths); "
                f"received {self.epsilon * 255:g} and {self.alpha * 255:g}."
            )
        if not (0 <= self.momentum < 1 and 0 <= self.l2 < math.inf and 0 <= self.seed < 2**31):
            raise InputError(
                "momentum lies in [0, 1), l2 is not negative, seed lies in [0, 2**31); received "
                f"momentum={self.momentum}, l2={self.l2}, seed={self.seed}."
            )
        if self.kernel_initializer not in INITIALIZERS:
            raise InputError(
                f"Unknown kernel initializer {self.kernel_initializer!r}. "
                f"Choose one of: {', '.join(INITIALIZERS)}."
            )
        if self.dictionary_size < 2:
            raise InputError(
                f"A dictionary has at least 2 points; received {self.dictionary_size}."
            )
        if self.kwta_anneal_from is not None and (
            self.activation != "kwta" or self.kwta_anneal_from < 0
        ):
            raise InputError(
                "kwta_anneal_from is an epoch, from 0, and for the activation kwta; "
                f"received {self.kwta_anneal_from} for {self.activation}."
            )
        if not (self.ema_momentum is None or 0 < self.ema_momentum < 1):
            raise InputError(f"ema_momentum lies in (0, 1); received {self.ema_momentum}.")


def build_network(config):
    """The network to be trained, of Keras' own layers (and Kaf)."""
    kwargs = {}
    if config.architecture.startswith("resnet"):
        kwargs = {"l2": config.l2, "kernel_initializer": config.kernel_initializer}
    changed = {}
    if config.activation.startswith("kaf") and config.dictionary_size != 20:
        changed = {"D": config.dictionary_size}
    elif config.kwta_anneal_from is not None:
        changed = {"ratio": KWTA_FIRST_RATIO}

    if not changed:
        return build(config.architecture, config.activation, **kwargs)

    def layer():
        fresh = activation(config.activation)
        return type(fresh).from_config(fresh.get_config() | changed)

    return build(config.architecture, layer, **kwargs)


def build_trainer(network, config, steps):
    """A fast twin of `network`, compiled for `steps` batches.

    It trains by fast adversarial training or, where epsilon is 0, as any Keras model.
    """
    twin = fused(network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if config.epsilon:
        model = FastBetterFreeTrainedModel(
            twin.input,
            twin.output,
            eps=config.epsilon,
            alpha=config.alpha,
            seed=config.seed,
            name=network.name,
        )
    else:
        model = twin
    schedule = TriangularCycle(config.lr_min, config.lr_max, steps, config.lr_peak, config.lr_start)
    ema = {"use_ema": True, "ema_momentum": config.ema_momentum} if config.ema_momentum else {}
    model.compile(
        OPTIMIZERS[config.optimizer](schedule, config.momentum, **ema),
        loss,
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def train(config, out, *, data_dir=None, force=False, verbose=2):
    """Trains one model into the folder `out`; goes on where an earlier call was interrupted.

    Everything random is a function of the seed and the epoch, or a variable that the checkpoint
    keeps, so a resumed run ends with the history and weights of an uninterrupted one (bitwise with
    `deterministic`).

    Args:
        config: TrainConfig.
        out: model folder; gets model.keras, history.csv and, last of all, training.json.
        data_dir: see datasets.load.
        force: start anew, whatever `out` holds.

    Returns:
        The content of training.json.

    Raises:
        InputError: for bad settings or data, or if `out` belongs to a run of other settings or of
            other images.
    """
    config.check()
    folder = ModelFolder(out)
    finished = None if force else folder.finished_run(config)
    if finished:
        print(f"{out} is already trained with these settings; --force trains it anew.")
        return finished
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)
    (x, y), (x_val, y_val), _ = load(config.dataset, data_dir)
    x, y = x[: config.train_n], y[: config.train_n]
    steps_per_epoch = math.ceil(len(x) / config.batch_size)
    network = build_network(config)
    model = build_trainer(network, config, config.epochs * steps_per_epoch)

    dataset = {
        "name": config.dataset,
        "train_n": len(x),
        "train_fingerprint": fingerprint(x, y),
        "validation_fingerprint": fingerprint(x_val, y_val),
    }
    folder.start(config, force=force)
    checkpoint = Checkpoint(folder.checkpoint, model, dataset)
    first_epoch = len(checkpoint.history)
    if first_epoch:
        print(f"Resuming {out} after epoch {first_epoch} of {config.epochs}.")
    radius = config.epsilon or PROBE_EPSILON
    probe = (RobustnessProbe if config.epsilon else Measurement)(
        x_val[:PROBE_IMAGES], y_val[:PROBE_IMAGES], epsilon=radius,
        seed=config.seed, history=checkpoint.history,
    )  # fmt: skip
    callbacks = [probe, checkpoint]
    if config.kwta_anneal_from is not None:
        annealing = AnnealKwta(start=config.kwta_anneal_from, every=config.kwta_anneal_every)
        callbacks.insert(0, annealing)
    augment = is_augmentable(config.dataset) and config.architecture.startswith("resnet")
    epoch_batches = partial(
        batches, x, y, batch_size=config.batch_size, seed=config.seed, augment=augment
    )
    if first_epoch < config.epochs and not checkpoint.stopped:
        epochs = range(first_epoch, config.epochs)
        model.fit(
            reduce(tf.data.Dataset.concatenate, [epoch_batches(epoch=epoch) for epoch in epochs]),
            steps_per_epoch=steps_per_epoch,
            epochs=config.epochs,
            initial_epoch=first_epoch,
            callbacks=callbacks,
            shuffle=False,  # batches() has shuffled
            verbose=verbose,
        )
    if config.ema_momentum:
        # fit ends by taking over the running mean; not where there was no epoch left to train. A
        # training that was stopped keeps the weights the probe put back.
        if checkpoint.stopped is None:
            model.optimizer.finalize_variable_values(model.trainable_variables)
            one_more = epoch_batches(epoch=config.epochs)
            reestimate_batch_norm(model, one_more.take(EMA_BATCHES))
        elif hasattr(probe, "good_weights"):
            model.set_weights(probe.good_weights)
    network.set_weights(model.get_weights())
    # The weights that are saved, on all validation images: what recipes are chosen by.
    final = RobustnessProbe(x_val, y_val, epsilon=radius, seed=config.seed)
    final.set_model(model)
    final.on_train_begin()
    validation = {k.replace("probe", "validation"): v for k, v in final.accuracies().items()}
    record = {
        "settings": asdict(config),
        "results": {
            **validation,  # clean, FGSM and PGD-10
            "validation_n": len(x_val),
            **{k: v for k, v in checkpoint.last_good_row().items() if k.startswith("probe_")},
            "probe_n": len(x_val[:PROBE_IMAGES]),
            "epochs_trained": len(checkpoint.history),
            "catastrophic_overfitting_in_epoch": checkpoint.stopped,
            "parameters": network.count_params(),
        },
        "dataset": dataset,
        "seconds": round(sum(row["seconds"] for row in checkpoint.history), 1),
        # The process that finished; `processes` has all that trained, each from its first epoch.
        "versions": versions(),
        "hardware": hardware(),
        "processes": checkpoint.processes,
    }
    return folder.finish(network, checkpoint.history, record)


def reestimate_batch_norm(model, batches):
    """Set all moving statistics to the means over some batches, of the weights as they now are.

    A running mean of weights needs this: the statistics kept so far are of the weights it is the
    mean of (Izmailov et al. 2018, "Averaging weights leads to wider optima", UAI, section 3.2).

    Args:
        model: of `build_trainer`. batches: of training images; they are perturbed as in training.
    """
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]

    def keep(share):
        """How much of the statistics so far the next batch leaves."""
        for layer in layers:
            layer.momentum = share

    for done, (x, y) in enumerate(batches):
        if isinstance(model, FastBetterFreeTrainedModel):
            keep(1.0)
            x = fgsm_random_start(
                model, model.loss_fn, x, y, epsilon=model.eps, alpha=model.alpha,
                seed_generator=model.seed_generator,
            )  # fmt: skip
        keep(done / (done + 1))
        model(x, training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


class Measurement(RobustnessProbe):
    """The probe of ordinary training: there PGD accuracy falls to 0, and nothing is to be done."""

    def on_epoch_end(self, epoch, logs=None):
        logs.update(self.accuracies())


class ModelFolder:
    """A folder that is empty, holds an unfinished run, or a finished one (training.json)."""

    def __init__(self, path):
        self.path = Path(path)
        self.record = self.path / "training.json"
        self.model = self.path / "model.keras"
        self.unfinished = self.path / "unfinished"
        self.settings = self.unfinished / "settings.json"
        self.checkpoint = self.unfinished / "checkpoint.npz"

    def check(self):
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out must be a folder; {self.path} is a file. Name another.")

    def finished_run(self, config):
        """The record of a finished run of these settings, or None when there is work to do."""
        self.check()
        if self.record.exists():
            finished = read_json(self.record)
            self._refuse_other_settings(finished.get("settings", {}), config)
            shutil.rmtree(self.unfinished, ignore_errors=True)
            return finished
        if self.settings.exists():
            self._refuse_other_settings(read_json(self.settings), config)
        elif self.model.exists():
            raise InputError(
                f"{self.path} holds a model.keras without training.json. "
                "Name another --out, or --force to replace it."
            )
        return None

    def start(self, config, *, force):
        """Makes the folder ready for a run of these settings, new or resumed."""
        self.check()
        if force:
            # robustness/ holds figures of the old weights: it must not outlive them.
            for folder in (self.path / "robustness", self.unfinished):
                if folder.exists():
                    shutil.rmtree(folder)
            for path in (self.record, self.model, self.path / "history.csv"):
                path.unlink(missing_ok=True)
        make_writable(self.unfinished)
        write_json(self.settings, asdict(config))

    def _refuse_other_settings(self, settings, config):
        # Settings go through JSON so that both sides have the same types.
        asked = json.loads(json.dumps(asdict(config)))
        settings = asdict(TrainConfig()) | settings  # of a run from before a setting existed
        differing = [
            f"{name}: there {settings.get(name)!r}, asked {asked.get(name)!r}"
            for name in sorted(settings | asked)
            if settings.get(name) != asked.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.path} belongs to a run of other settings ({'; '.join(differing)}). "
                "Name another --out, or --force to start anew."
            )

    def finish(self, network, history, record):
        """Writes everything; training.json, whose presence says finished, comes last."""
        partial = self.unfinished / "model.keras"
        network.save(partial)
        os.replace(partial, self.model)
        partial = self.unfinished / "history.csv"
        pd.DataFrame(history).to_csv(partial, index=False)
        os.replace(partial, self.path / "history.csv")
        record["model_sha256"] = file_sha256(self.model)
        partial = self.unfinished / "training.json"
        write_json(partial, record)
        os.replace(partial, self.record)
        shutil.rmtree(self.unfinished)
        return record


class Checkpoint(keras.callbacks.Callback):
    """All variables of a run and its history in one file, replaced at once after each epoch.

    keras.callbacks.BackupAndRestore keeps neither the history nor the state of the random
    generators, and a kill while it writes leaves a torn backup.

    On creation the model takes over what the file holds, if there is one.

    Args:
        dataset: dict that names the training images; a checkpoint of other images is refused.

    Attributes:
        history: list of rows (dict), one for each finished epoch.
        stopped: the epoch (from 0) in which the probe stopped the training, or None.
        processes: first epoch (from 0), versions and hardware of each process that trained.
    """

    def __init__(self, path, model, dataset):
        super().__init__()
        self.path = Path(path)
        self.dataset = dataset
        self.history = []
        self.stopped = None
        self.processes = []
        if self.path.exists():
            try:
                with np.load(self.path) as stored:
                    state = json.loads(str(stored["state"]))
                    for index, variable in enumerate(self._variables(model)):
                        variable.assign(stored[f"variable_{index}"])
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise InputError(
                    f"{self.path} is not a checkpoint of this network "
                    f"({type(error).__name__}); --force to start anew."
                ) from error
            if state.get("dataset", dataset) != dataset:  # not kept by earlier versions
                raise InputError(
                    f"{self.path} is of a run on other images of {dataset['name']}. Give the "
                    "--data-dir it was begun with, name another --out, or --force to start anew."
                )
            self.history, self.stopped = state["history"], state["stopped"]
            self.processes = state.get("processes", [])

    @staticmethod
    def _variables(model):
        # model.variables: weights, batch-norm statistics and states of the random generators
        return [*model.variables, *model.optimizer.variables]

    def on_train_begin(self, logs=None):
        here = {"versions": versions(), "hardware": hardware()}
        self.processes.append({"first_epoch": len(self.history)} | here)

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch, **{k: float(v) for k, v in logs.items()}}
        variables = {
            f"variable_{i}": keras.ops.convert_to_numpy(v)
            for i, v in enumerate(self._variables(self.model))
        }
        # The last batch of an epoch can spoil the weights without a trace in the loss.
        is_finite = all(np.isfinite(v).all() for v in variables.values())
        if not (math.isfinite(row["loss"]) and is_finite):
            raise InputError(
                f"The training diverged in epoch {epoch + 1} (loss {row['loss']:.4g}): the loss or "
                "the weights are no longer finite. Start anew with a lower --lr-max and --force; "
                "until then the checkpoint of the epoch before is kept."
            )
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["seconds"] = round(time.perf_counter() - self.started, 2)
        self.history.append(row)
        self.stopped = epoch if self.model.stop_training else None
        state = json.dumps(
            {
                "history": self.history,
                "stopped": self.stopped,
                "dataset": self.dataset,
                "processes": self.processes,
            }
        )
        partial = self.path.with_suffix(".part")
        with open(partial, "wb") as file:
            np.savez(file, state=state, **variables)
        os.replace(partial, self.path)

    def last_good_row(self):
        """The row of the epoch whose weights (of which it may be the mean) the model has."""
        return self.history[-2 if self.stopped else -1]


def read_json(path):
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); --force to start anew."
        ) from error
    return content if isinstance(content, dict) else {}


def write_json(path, value):
    write_atomically(Path(path), (json.dumps(value, indent=1) + "\n").encode())


def parse(argv):
    parser = CommandParser(
        prog="python -m kaf_study.train",
        description="Fast adversarial (or ordinary) training of one model folder; resumable.",
    )
    add = parser.add_argument
    defaults = TrainConfig()
    add("--dataset", default=defaults.dataset, help=" or ".join(DATASETS))
    add("--data-dir", help="folder of CIFAR-10 (else CIFAR10_DIR, Keras' cache, download)")
    add("--architecture", default=defaults.architecture, help="light_cnn, vgg, resnet20, ...")
    add("--activation", default=defaults.activation, help=", ".join(ACTIVATIONS))
    add("--epochs", type=int, default=defaults.epochs)
    add("--batch-size", type=int, default=defaults.batch_size)
    add("--train-n", type=int, help="only the first N training images")
    add(
        "--epsilon", type=float, default=8, help="L-inf radius in 255ths (%(default)g); 0: ordinary"
    )
    add("--alpha", type=float, help="step of the attack in 255ths (1.25 epsilon)")
    add("--recipe", default="fast", help="optimiser settings: fast (default), thesis, adam")
    for name in ("lr-min", "lr-max", "lr-start", "lr-peak", "momentum", "l2", "ema-momentum"):
        add(f"--{name}", type=float, help="instead of the recipe's")
    add("--kernel-initializer", help=f"instead of the recipe's: {', '.join(INITIALIZERS)}")
    add("--dictionary-size", type=int, default=defaults.dictionary_size, help="D of the KAFs (20)")
    add("--kwta-anneal-from", type=int, help="epoch from which k-WTA's ratio falls from 0.30")
    add(
        "--kwta-anneal-every",
        type=int,
        default=defaults.kwta_anneal_every,
        help="epochs for a fall by 0.01, down to 0.15; 15 falls are needed (2)",
    )
    add("--seed", type=int, default=defaults.seed)
    add("--deterministic", action="store_true", help="bitwise repeatable, slower")
    add("--out", required=True, help="model folder, e.g. models/cifar10_resnet20_kaf_seed0")
    add("--force", action="store_true", help="start anew, whatever the folder holds")
    return parser.parse_args(argv)


def config_of(args):
    """TrainConfig from the command line; 255ths become fractions here, and only here."""
    optimiser = recipe(args.recipe, args.architecture, args.activation)
    given = {name: getattr(args, name, None) for name in optimiser}
    optimiser |= {name: value for name, value in given.items() if value is not None}
    alpha = 1.25 * args.epsilon if args.alpha is None else args.alpha
    return TrainConfig(
        dataset=args.dataset,
        architecture=args.architecture,
        activation=args.activation,
        epochs=args.epochs,
        batch_size=args.batch_size,
        train_n=args.train_n,
        epsilon=args.epsilon / 255,
        alpha=alpha / 255,
        dictionary_size=args.dictionary_size,
        kwta_anneal_from=args.kwta_anneal_from,
        kwta_anneal_every=args.kwta_anneal_every,
        seed=args.seed,
        deterministic=args.deterministic,
        **optimiser,
    )


def main(argv=None):
    args = parse(argv)
    try:
        train(config_of(args), args.out, data_dir=args.data_dir, force=args.force)
    except InputError as error:
        print(f"kaf_study.train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
