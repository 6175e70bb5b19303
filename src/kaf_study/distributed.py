"""One training on several devices or machines, by tf.distribute.

Every replica takes its part of each global batch, so a training has the settings, the steps and, up
to rounding, the weights of one on a single device: `fbfadvtrain` draws noise for the whole batch,
and batch norm is synchronised (`fused_layers.fused`), which costs its one kernel. Under several
workers all compute the same and the chief alone writes; what it wrote all must be able to read.
"""

import json
import os
from collections.abc import Sequence

import keras
import tensorflow as tf

from kaf_study import InputError

STRATEGIES = ("mirrored", "multiworker")


def strategy_named(name: str | None) -> tf.distribute.Strategy:
    """The strategy of a command's option; None: that in force.

    mirrored: all GPUs of this machine. multiworker: the workers of TF_CONFIG, as TensorFlow has it.
    That of several workers must be made before anything is computed.

    Raises:
        InputError: where there is one device or no cluster.
    """
    if name is None:
        return tf.distribute.get_strategy()
    if name == "mirrored":
        gpus = tf.config.list_physical_devices("GPU")
        if len(gpus) < 2:
            raise InputError(
                f"--strategy mirrored is for several GPUs; TensorFlow sees {len(gpus)} here. "
                "Leave it out."
            )
        return tf.distribute.MirroredStrategy()
    if name != "multiworker":
        raise InputError(f"Unknown strategy {name!r}. Choose one of: {', '.join(STRATEGIES)}.")
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        has_workers = isinstance(config["cluster"]["worker"], list)
        has_task = config["task"].keys() >= {"type", "index"}
    except (AttributeError, KeyError, TypeError, ValueError):
        has_workers = has_task = False
    if not (has_workers and has_task):
        raise InputError(
            "--strategy multiworker needs TF_CONFIG in the environment, on each machine: "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}.'
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes: the chief, or worker 0 where there is none."""
    cluster = strategy.cluster_resolver
    if cluster is None or not cluster.task_type:
        return True
    if "chief" in cluster.cluster_spec().jobs:
        return cluster.task_type == "chief"
    return cluster.task_id == 0


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Returns when every worker has come here."""
    strategy.reduce("SUM", strategy.run(lambda: tf.constant(1.0)), axis=None)


def fit(
    model: keras.Model,
    data: tf.data.Dataset,
    *,
    steps_per_epoch: int,
    epochs: range,
    callbacks: Sequence[keras.callbacks.Callback],
    verbose: int = 0,
) -> None:
    """model.fit under the strategy that is in force, of several workers as well.

    Keras' own fails under several workers (Keras 3.15: it takes their batches for tensors).

    Args:
        model: built and compiled within the strategy's scope.
        data: global batches (x, y) of all the epochs, one after the other.
        epochs: numbers of those to be trained.
        callbacks: told of epochs, not of batches.
    """
    strategy = tf.distribute.get_strategy()
    told = keras.callbacks.CallbackList(
        callbacks,
        add_progbar=verbose > 0,
        model=model,
        verbose=verbose,
        epochs=epochs.stop,
        steps=steps_per_epoch,
    )
    # Metrics make their variables when they first see labels: not within the graph of a step.
    x, y = next(iter(data.unbatch().batch(1)))
    strategy.run(lambda: model.compute_metrics(x, y, model(x), None))
    batches = iter(strategy.experimental_distribute_dataset(data))

    @tf.function
    def step(batch):
        strategy.run(model.train_step, args=(batch,))

    model.stop_training = False
    told.on_train_begin()
    for epoch in epochs:
        model.reset_metrics()
        told.on_epoch_begin(epoch)
        for _ in range(steps_per_epoch):
            step(next(batches))
        logs = {name: float(value) for name, value in model.get_metrics_result().items()}
        told.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    told.on_train_end()
