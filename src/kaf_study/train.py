"""One training run: settings -> a model folder, resumable from its last finished epoch.

python -m kaf_study.train --dataset cifar10 --architecture resnet20 --activation kaf \
    --epochs 15 --seed 0 --out models/cifar10_resnet20_kaf_seed0
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from activationsf import AnnealKwta, activation
from fbfadvtrain import FastBetterFreeTrainedModel, Refinements, RobustnessProbe
from kaf_study import InputError, called_as, distributed, run_command
from kaf_study.activations import WITHOUT_CURVATURE
from kaf_study.architectures import build
from kaf_study.checkpoint import Checkpoint
from kaf_study.config import DICTIONARY_SIZE, TrainConfig, config_of, is_resnet, parse, recipe
from kaf_study.curvature import CurvatureProbe
from kaf_study.datasets import batches, class_names, fingerprint, is_augmentable, load
from kaf_study.fused_layers import fused
from kaf_study.lr_policy import TriangularCycle, WarmMeanSGD
from kaf_study.model_folder import ModelFolder
from kaf_study.records import hardware, versions
from kaf_study.transplant import network_of_shapes, shapes_sha256

__all__ = ["TrainConfig", "build_network", "build_trainer", "recipe", "train"]

PROBE_IMAGES = 512
PROBE_EPSILON = 8 / 255  # where training itself has no radius
KWTA_FIRST_RATIO = 0.30  # Xiao et al. 2020
EMA_BATCHES = 100  # over which the batch norm of a running mean of weights is estimated

Images = tuple[np.ndarray, np.ndarray]  # x (N, H, W, C) in [0, 1], y (N,)


def train(
    config: TrainConfig,
    out: Path | str,
    *,
    data_dir: Path | str | None = None,
    force: bool = False,
    verbose: int = 2,
    strategy: tf.distribute.Strategy | None = None,
) -> dict[str, Any]:
    """Trains one model into the folder `out`; goes on where an earlier call was interrupted.

    Everything random is a function of the seed and the epoch, or a variable that the checkpoint
    keeps, so a resumed run ends with the history and weights of an uninterrupted one (bitwise with
    `deterministic`).

    Args:
        out: model folder; gets model.keras, history.csv and, last of all, training.json.
        data_dir: see datasets.load.
        force: start anew, whatever `out` holds.
        strategy: for several devices or workers, see kaf_study.distributed; None: that in force.

    Returns:
        The content of training.json (`records.TrainingRecord`).

    Raises:
        InputError: for bad settings or data, or if `out` belongs to a run of other settings or of
            other images, or is being trained by another process.
    """
    config.check()
    folder = ModelFolder(out)
    strategy = strategy or tf.distribute.get_strategy()
    is_chief = distributed.is_chief(strategy)
    if not force and (finished := folder.finished_run(config)):
        if is_chief:
            folder.tidy()
        print(f"{out} is already trained with these settings; --force trains it anew.")
        return finished
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)
    training, validation, dataset = images_of(config, data_dir)
    with strategy.scope(), folder.locked() if is_chief else nullcontext():
        network = build_network(config)
        shapes = shapes_sha256(config.shapes_of) if config.shapes_of else None
        model = build_trainer(network, config, config.epochs * steps_per_epoch(config, training))
        if is_chief:
            folder.start(config, force=force)
        distributed.wait_for_all(strategy)
        checkpoint = Checkpoint(
            folder.checkpoint, model, dataset, shapes_sha256=shapes, writes=is_chief
        )
        if checkpoint.history:
            print(f"Resuming {out} after epoch {len(checkpoint.history)} of {config.epochs}.")
        probe = fit(model, network, config, training, validation, checkpoint, verbose)
        network.set_weights(model.get_weights())
        look_at_saved(probe, network, config)
        results = measured(probe, validation, checkpoint)
        results["parameters"] = network.count_params()
        record = record_of(config, results, dataset, checkpoint)
        return folder.finish(network.save, checkpoint.history, record) if is_chief else record


# --------------------------------------------------------------------------- what is trained


def images_of(
    config: TrainConfig, data_dir: Path | str | None
) -> tuple[Images, Images, dict[str, Any]]:
    """Training images, validation images, and how the record names them."""
    (x, y), validation, _ = load(config.dataset, data_dir)
    if config.train_n is not None and config.train_n > len(x):
        raise InputError(f"train_n is {config.train_n}; {config.dataset} has {len(x)} to train on.")
    training = x[: config.train_n], y[: config.train_n]
    return (
        training,
        validation,
        {
            "name": config.dataset,
            "train_n": len(training[0]),
            "train_fingerprint": fingerprint(*training),
            "validation_fingerprint": fingerprint(*validation),
        },
    )


def build_network(config: TrainConfig) -> keras.Model:
    """The network to be trained, of Keras' own layers (and Kaf)."""
    kwargs: dict[str, Any] = {}
    if is_resnet(config.architecture):
        kwargs = {"l2": config.l2, "kernel_initializer": config.kernel_initializer}
    if config.shapes_of is not None:
        return network_of_shapes(config.architecture, config.shapes_of, **kwargs)
    changed: dict[str, Any] = {}
    if config.activation.startswith("kaf") and config.dictionary_size != DICTIONARY_SIZE:
        changed = {"D": config.dictionary_size}
    elif config.kwta_anneal_from is not None:
        changed = {"ratio": KWTA_FIRST_RATIO}

    if not changed:
        return build(config.architecture, config.activation, **kwargs)

    def layer():
        fresh = activation(config.activation)
        return type(fresh).from_config(fresh.get_config() | changed)

    return build(config.architecture, layer, **kwargs)


def build_trainer(network: keras.Model, config: TrainConfig, steps: int) -> keras.Model:
    """A fast twin of `network`, compiled for `steps` batches.

    It trains by fast adversarial training or, where epsilon is 0, as any Keras model; in the
    precision of `config`, whatever that of `network`.
    """
    twin = fused(network, config.precision)
    loss: keras.losses.Loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if config.label_smoothing:  # labels are one-hot, see epoch_batches
        loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=config.label_smoothing
        )
    if config.epsilon:
        model = FastBetterFreeTrainedModel(
            twin.input,
            twin.output,
            eps=config.epsilon,
            alpha=config.alpha,
            seed=config.seed,
            refinements=Refinements(
                noise=config.noise,
                ramp=round(config.epsilon_ramp * steps),
                pairing=config.pairing,
                pairing_ramp=round(config.pairing_ramp * steps),
            ),
            name=network.name,
        )
    else:
        model = twin
    schedule = TriangularCycle(config.lr_min, config.lr_max, steps, config.lr_peak, config.lr_start)
    model.compile(optimizer_of(config, schedule), loss, metrics=["accuracy"], jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def optimizer_of(config: TrainConfig, schedule: Any) -> keras.optimizers.Optimizer:
    ema = {"use_ema": True, "ema_momentum": config.ema_momentum} if config.ema_momentum else {}
    if config.optimizer == "adam":
        optimizer = keras.optimizers.Adam(schedule, beta_1=config.momentum, **ema)
    else:
        kind = WarmMeanSGD if config.ema_warm else keras.optimizers.SGD
        optimizer = kind(schedule, momentum=config.momentum, nesterov=config.nesterov, **ema)
    if config.precision == "mixed_float16":  # whose gradients are 0 below 6e-8
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


# --------------------------------------------------------------------------- how it is trained


def steps_per_epoch(config: TrainConfig, training: Images) -> int:
    return math.ceil(len(training[0]) / config.batch_size)


def epoch_batches(config: TrainConfig, training: Images, epoch: int) -> tf.data.Dataset:
    """The batches of one epoch, from 0; labels are one-hot where they are to be smoothed."""
    augment = is_augmentable(config.dataset) and is_resnet(config.architecture)
    of_epoch = batches(
        *training, batch_size=config.batch_size, seed=config.seed, epoch=epoch, augment=augment
    )
    if not config.label_smoothing:
        return of_epoch
    classes = len(class_names(config.dataset))
    return of_epoch.map(lambda x, y: (x, tf.one_hot(y, classes)))


def fit(
    model: keras.Model,
    network: keras.Model,
    config: TrainConfig,
    training: Images,
    validation: Images,
    checkpoint: Checkpoint,
    verbose: int,
) -> RobustnessProbe:
    """Trains the epochs that `checkpoint` does not have yet; the model gets its last weights.

    network: the plain twin of the model; gets its weights of each epoch to be looked at.
    """
    x_val, y_val = validation
    probe = (RobustnessProbe if config.epsilon else Measurement)(
        x_val[:PROBE_IMAGES], y_val[:PROBE_IMAGES], epsilon=config.epsilon or PROBE_EPSILON,
        seed=config.seed, history=checkpoint.history,
    )  # fmt: skip
    callbacks = [probe, checkpoint]
    # A run begun without these columns goes on without them.
    if config.activation not in WITHOUT_CURVATURE and all(
        "curvature_1" in row for row in checkpoint.history
    ):
        callbacks.insert(1, CurvatureProbe(network, x_val[:PROBE_IMAGES]))
    if config.kwta_anneal_from is not None:
        annealing = AnnealKwta(start=config.kwta_anneal_from, every=config.kwta_anneal_every)
        callbacks.insert(0, annealing)
    epochs = range(len(checkpoint.history), config.epochs)
    if epochs and checkpoint.stopped is None:
        each = [epoch_batches(config, training, epoch) for epoch in epochs]
        data = reduce(tf.data.Dataset.concatenate, each)
        steps = steps_per_epoch(config, training)
        if tf.distribute.has_strategy():
            distributed.fit(
                model, data, steps_per_epoch=steps, epochs=epochs, callbacks=callbacks,
                verbose=verbose,
            )  # fmt: skip
        else:
            model.fit(
                data, steps_per_epoch=steps, epochs=epochs.stop, initial_epoch=epochs.start,
                callbacks=callbacks, shuffle=False, verbose=verbose,  # batches() has shuffled
            )  # fmt: skip
    if config.ema_momentum:
        # fit ends by taking over the running mean; not where there was no epoch left to train. A
        # training that was stopped keeps the weights the probe put back.
        if checkpoint.stopped is None:
            model.optimizer.finalize_variable_values(model.trainable_variables)
            one_more = epoch_batches(config, training, config.epochs)
            reestimate_batch_norm(model, one_more.take(EMA_BATCHES))
        elif hasattr(probe, "good_weights"):
            model.set_weights(probe.good_weights)
    if not hasattr(probe, "images"):  # there was no epoch left to train
        probe.set_model(model)
        probe.on_train_begin()
    return probe


def reestimate_batch_norm(model: keras.Model, batches: tf.data.Dataset) -> None:
    """Set all moving statistics to the means over some batches, of the weights as they now are.

    A running mean of weights needs this: the statistics kept so far are of the weights it is the
    mean of (Izmailov et al. 2018, "Averaging weights leads to wider optima", UAI, section 3.2).

    Args:
        model: of `build_trainer`. batches: of training images; they are perturbed as in training.
    """
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in layers]

    def keep(share: float) -> None:
        """How much of the statistics so far the next batch leaves."""
        for layer in layers:
            layer.momentum = share

    for done, (x, y) in enumerate(batches):
        if isinstance(model, FastBetterFreeTrainedModel):
            keep(1.0)
            _, x = model.perturbed(x, y)
        keep(done / (done + 1))
        model(x, training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


class Measurement(RobustnessProbe):
    """The probe of ordinary training: there PGD accuracy falls to 0, and nothing is to be done."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs.update(self.accuracies())


def look_at_saved(probe: RobustnessProbe, network: keras.Model, config: TrainConfig) -> None:
    """Gives a probe the network as it is saved, in float32, where training computed otherwise."""
    if config.precision != "float32":
        probe.set_model(build_trainer(network, replace(config, precision="float32"), steps=1))
        probe.on_train_begin()


def measured(probe: RobustnessProbe, validation: Images, checkpoint: Checkpoint) -> dict[str, Any]:
    """The results of a training: of its final weights on all validation images, and its probe's."""
    # What recipes are chosen by: clean, FGSM and PGD-10
    final = probe.on_images(*validation).accuracies()
    return {
        **{k.replace("probe", "validation"): v for k, v in final.items()},
        "validation_n": len(validation[0]),
        **{k: v for k, v in checkpoint.last_good_row().items() if k.startswith("probe_")},
        "probe_n": len(validation[0][:PROBE_IMAGES]),
        "epochs_trained": len(checkpoint.history),
        "catastrophic_overfitting_in_epoch": checkpoint.stopped,
    }


def record_of(
    config: TrainConfig, results: dict[str, Any], dataset: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """training.json (`records.TrainingRecord`), but for the hash of the model's file."""
    shapes = checkpoint.shapes_sha256
    return ({"shapes_sha256": shapes} if shapes else {}) | {
        "settings": asdict(config),
        "results": results,
        "dataset": dataset,
        "seconds": round(sum(row["seconds"] for row in checkpoint.history), 1),
        # The process that finished; `processes` has all that trained, from its first epoch.
        "versions": versions(),
        "hardware": hardware(),
        "processes": checkpoint.processes,
    }


# --------------------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0; 2 if something cannot be used; 130 if interrupted."""
    prog = called_as("kaf-train", "python -m kaf_study.train")
    args = parse(argv, prog)

    def run():
        train(
            config_of(args),
            args.out,
            data_dir=args.data_dir,
            force=args.force,
            strategy=distributed.strategy_named(args.strategy),
        )

    return run_command(prog, run, again="(without --force) resumes")


if __name__ == "__main__":
    sys.exit(main())
