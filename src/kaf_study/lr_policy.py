"""The learning rate: a triangular cycle, and the range test that finds its bounds.

Smith 2017, "Cyclical learning rates for training neural networks" (WACV); one cycle over the whole
training, as in Wong, Rice & Kolter 2020. Also the running mean of the weights that such a cycle
passes through.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from scipy.ndimage import gaussian_filter1d

from kaf_study import InputError

SMOOTHING = 0.9  # weight of the past in the running loss that is watched for divergence
DIVERGENCE = 4.0  # stop when the running loss exceeds this multiple of its best value


@keras.saving.register_keras_serializable(package="robust_activations")
class TriangularCycle(keras.optimizers.schedules.LearningRateSchedule):
    """Linear up to max_lr at step peak * steps, and linear down to min_lr at `steps`.

    Beyond `steps` it stays at min_lr.

    Args:
        min_lr, max_lr: lowest and highest rate, 0 <= min_lr <= max_lr.
        steps: length of the cycle in batches, epochs * batches per epoch.
        peak: where the highest rate lies, as a fraction of the cycle.
        start: where the first rate lies between min_lr (0) and max_lr (1).
    """

    def __init__(
        self, min_lr: float, max_lr: float, steps: int, peak: float = 0.5, start: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= min_lr <= max_lr < math.inf or max_lr == 0:
            raise InputError(
                "TriangularCycle needs 0 <= min_lr <= max_lr, max_lr above 0 and finite; "
                f"received min_lr={min_lr}, max_lr={max_lr}."
            )
        if steps < 1 or not 0 < peak < 1 or not 0 <= start <= 1:
            raise InputError(
                "TriangularCycle needs at least 1 step, a peak between 0 and 1 and a start from "
                f"0 to 1; received steps={steps}, peak={peak}, start={start}."
            )
        self.min_lr = float(min_lr)
        self.max_lr = float(max_lr)
        self.steps = int(steps)
        self.peak = float(peak)
        self.start = float(start)

    def __call__(self, step: Any) -> Any:
        done = ops.cast(step, "float32") / self.steps  # fraction of the cycle
        up = self.start + (1.0 - self.start) * done / self.peak
        down = (1.0 - done) / (1.0 - self.peak)
        height = ops.maximum(ops.minimum(up, down), 0.0)
        return self.min_lr + (self.max_lr - self.min_lr) * height

    def get_config(self) -> dict[str, Any]:
        return {
            "min_lr": self.min_lr,
            "max_lr": self.max_lr,
            "steps": self.steps,
            "peak": self.peak,
            "start": self.start,
        }


@keras.saving.register_keras_serializable(package="robust_activations")
class WarmMeanSGD(keras.optimizers.SGD):
    """SGD whose running mean of the weights (`use_ema`) soon forgets the first ones.

    In step t = 0, 1, ... the mean so far weighs min(ema_momentum, (1 + t) / (10 + t)), in the first
    nothing; TensorFlow's ExponentialMovingAverage has this as `num_updates`. At a constant 0.9995
    half of a short training lies in the mean. All else is Keras': the mean is kept in the
    optimizer's variables and files and put into the model at the end of `fit`.
    """

    def _update_model_variables_moving_average(self, trainable_variables):
        step = ops.cast(self.iterations, "float32")
        momentum = ops.minimum(self.ema_momentum, (1 + step) / (10 + step))
        momentum = ops.where(step > 0, momentum, 0.0)
        for weight, mean in zip(
            trainable_variables, self._model_variables_moving_average, strict=True
        ):
            mean.assign(momentum * mean + (1 - momentum) * weight)


@dataclass(frozen=True)
class LRFinderResult:
    """What the range test saw.

    lrs: learning rate of each batch (steps,).
    losses: of each batch (steps,), as the model's training step reports it: Keras' own with the
        regularisation, FastBetterFreeTrainedModel's without.
    diverged: whether the loss exploded and ended the test early.
    """

    lrs: np.ndarray
    losses: np.ndarray
    diverged: bool
    growth: str = "exponential"

    @property
    def smoothed(self) -> np.ndarray:
        """Losses under a Gaussian window of 2 % of the test (at least 1 batch), without a lag."""
        # A batch whose loss is not finite is left out; it can only be the last.
        losses = self.losses[np.isfinite(self.losses)]
        width = max(1.0, 0.02 * len(losses))

        def under_window(values):  # beyond 10 widths a Gaussian is 2e-22
            return gaussian_filter1d(values, width, mode="constant", truncate=10)

        return under_window(losses) / under_window(np.ones(len(losses)))

    @property
    def noise(self) -> tuple[float, float]:
        """(of a batch's loss, of the smoothed loss): standard deviations, around the latter.

        Until its minimum: beyond, the loss explodes.
        """
        smoothed = self.smoothed
        until = int(np.argmin(smoothed)) + 1 if len(smoothed) else 0
        width = max(1.0, 0.02 * len(smoothed))
        batch = float(np.std(self.losses[:until] - smoothed[:until])) if until else 0.0
        return batch, batch / math.sqrt(2 * math.sqrt(math.pi) * width)

    @property
    def suggestion(self) -> tuple[float, float]:
        """(min_lr, max_lr) for a triangular cycle.

        Smith 2017, section 3.3: the lower bound where the loss begins to fall, the upper one where
        the fall slows down. Here: where the smoothed loss has made 10 % and 90 % of its way from
        the start to its minimum. A fall of less than 5 standard deviations of the
        smoothed loss is taken for noise.
        """
        smoothed = self.smoothed
        best = int(np.argmin(smoothed)) if len(smoothed) else 0
        if best == 0 or not smoothed[0] - smoothed[best] > 5 * self.noise[1]:
            raise InputError(
                "The loss never fell by more than its noise between the learning rates "
                f"{self.lrs[0]:.3g} and {self.lrs[-1]:.3g}, so there are no bounds to suggest. "
                "Start from a lower min_lr, or test for more steps."
            )
        progress = (smoothed[0] - smoothed[: best + 1]) / (smoothed[0] - smoothed[best])
        low, high = int(np.argmax(progress >= 0.1)), int(np.argmax(progress >= 0.9))
        return float(self.lrs[low]), float(self.lrs[high])

    def plot(self, ax: Any = None) -> Any:
        """Loss against learning rate, with the suggested bounds; returns the Matplotlib axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.plot(self.lrs, self.losses, color="0.8", label="batch loss")
        smoothed = self.smoothed
        ax.plot(self.lrs[: len(smoothed)], smoothed, label="smoothed")
        try:
            low, high = self.suggestion
            ax.axvspan(low, high, alpha=0.15, label=f"suggested: {low:.2g} to {high:.2g}")
        except InputError:
            ax.set_title("the loss never fell beyond its noise: no bounds to suggest")
        if self.growth == "exponential":
            ax.set_xscale("log")
        if len(smoothed):
            margin = 0.3 * (smoothed[0] - smoothed.min()) + 3 * self.noise[0] + 1e-3
            ax.set_ylim(smoothed.min() - margin, smoothed[0] + margin)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("training loss")
        ax.legend()
        return ax


class LRFinder:
    """Learning-rate range test (Smith 2017, section 3.3) on a compiled model.

    Trains while the rate grows from batch to batch and records each batch's loss; then everything
    is put back as it was, also after an error or Ctrl-C: weights, batch-norm statistics, states of
    random generators, optimizer slots, iterations and learning rate.

    Each step is the model's own: `fit` runs, with whatever `train_step` the model has. What `fit`
    reports is a running mean since the last reset of the metrics; here they are reset before every
    batch, so that the mean is the loss of that batch, exactly.

    Unlike the paper, the rate grows exponentially by default, since a range such as 1e-4 to 3
    would otherwise spend nearly all batches in its last decade.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def find(
        self,
        x: Any,
        y: Any = None,
        *,
        min_lr: float = 1e-4,
        max_lr: float = 3.0,
        epochs: int = 5,
        steps: int | None = None,
        batch_size: int = 128,
        growth: str = "exponential",
        seed: int = 0,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> LRFinderResult:
        """Run the test.

        Args:
            x: whatever `fit` takes: images (N, ...) with labels `y`, each an array, a tensor, a
                pandas column, a list of numbers, or a list, tuple or dict of arrays for a model of
                several inputs or outputs; or, alone, a tf.data.Dataset, a keras.utils.PyDataset or
                a generator of batches (x, y) or (x, y, sample_weight).
            min_lr, max_lr: rates of the first and the last batch.
            epochs: passes over the data, unless `steps` gives the number of batches. Arrays are
                shuffled afresh in each pass.
            growth: "exponential" or "linear", the latter as in the paper.
            seed: of the shuffling.
            callbacks: Keras', which watch the one epoch of `fit` that the test is, as a progress
                bar does (`tqdm.keras.TqdmCallback`).

        Returns:
            LRFinderResult with lrs, losses, diverged, suggestion and plot().
        """
        self._check(x, y, min_lr, max_lr, growth)
        if y is not None:
            x, y = _as_arrays(x), _as_arrays(y)
        steps = _count_steps(x, y, epochs, steps, batch_size)
        space = np.geomspace if growth == "exponential" else np.linspace
        lrs = space(min_lr, max_lr, steps)
        model, optimizer = self.model, self.model.optimizer
        strategy = model.distribute_strategy
        is_distributed = strategy.num_replicas_in_sync > 1
        data = _endless_batches(x, y, batch_size, seed, as_dataset=is_distributed)
        recorder = _RangeTest(lrs)
        with strategy.scope() if is_distributed else nullcontext():
            if not model.built:
                # A subclassed model has no weights to keep before its first batch.
                first, data = _peeked(data)
                model(first[0])
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            with _Restored(model):
                watching = [recorder, *callbacks]
                model.fit(data, steps_per_epoch=steps, callbacks=watching, shuffle=False, verbose=0)
        if not recorder.losses:
            raise InputError("LRFinder received a dataset without batches. Give it at least one.")
        losses = np.array(recorder.losses)
        return LRFinderResult(lrs[: len(losses)], losses, recorder.diverged, growth)

    def _check(self, x, y, min_lr, max_lr, growth):
        if not self.model.compiled or getattr(self.model, "optimizer", None) is None:
            raise InputError(
                "LRFinder needs a compiled model, with the optimizer and loss it will be trained "
                f"with; {self.model.name!r} is not. Call model.compile(...) first."
            )
        if _has_schedule(self.model.optimizer):
            raise InputError(
                "LRFinder sets the learning rate itself, but the optimizer of "
                f"{self.model.name!r} already follows a schedule. Compile with a plain number, "
                "e.g. SGD(0.01)."
            )
        if self.model.steps_per_execution != 1:
            raise InputError(
                "LRFinder changes the learning rate from batch to batch, which needs "
                f"steps_per_execution=1; received {self.model.steps_per_execution}. "
                "Compile without it for the test."
            )
        if not 0 < min_lr < max_lr < math.inf:
            raise InputError(
                "LRFinder needs 0 < min_lr < max_lr, finite; "
                f"received min_lr={min_lr}, max_lr={max_lr}."
            )
        if growth not in ("exponential", "linear"):
            raise InputError(f"growth must be 'exponential' or 'linear'; received {growth!r}.")
        if _comes_in_batches(x) == (y is not None):
            raise InputError(
                "LRFinder needs images x with labels y, or batches of (x, y) alone; "
                f"received x of type {type(x).__name__} and y of type {type(y).__name__}."
            )


def _has_schedule(optimizer):
    # A number is stored in get_config as a float, a schedule as its own configuration; the
    # optimizer of a mixed-precision model is wrapped.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return not isinstance(optimizer.get_config()["learning_rate"], (int, float))


class _RangeTest(keras.callbacks.Callback):
    """Sets the rate before each batch, records the batch's loss, stops when it explodes."""

    def __init__(self, lrs):
        super().__init__()
        self.lrs = lrs
        self.losses = []
        self.diverged = False
        self.running, self.best = 0.0, math.inf

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = self.lrs[batch]
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])
        self.losses.append(loss)
        # Running mean with the bias correction of Adam (Kingma & Ba 2015)
        self.running = SMOOTHING * self.running + (1 - SMOOTHING) * loss
        running = self.running / (1 - SMOOTHING ** len(self.losses))
        self.best = min(self.best, running)
        self.diverged = not math.isfinite(loss) or running > DIVERGENCE * self.best > 0
        self.model.stop_training = self.diverged


class _Restored:
    """Puts every variable of the model and its optimizer back on leaving, whatever happened."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        # model.variables: weights, batch-norm statistics and seed generators;
        # optimizer.variables: slots, iterations, learning rate.
        variables = (*self.model.variables, *self.model.optimizer.variables)
        self.saved = [(variable, ops.convert_to_numpy(variable).copy()) for variable in variables]

        self.history = getattr(self.model, "history", None)

    def __exit__(self, *exception):
        for variable, value in self.saved:
            variable.assign(value)
        self.model.reset_metrics()
        self.model.history = self.history
        self.model.stop_training = False


def _comes_in_batches(x):
    return isinstance(x, tf.data.Dataset | keras.utils.PyDataset) or hasattr(x, "__next__")


def _as_arrays(data):
    """An array, or several in a dict or tuple, as the model has inputs or outputs."""
    if isinstance(data, dict):
        return {name: np.asarray(column) for name, column in data.items()}
    if isinstance(data, list | tuple) and all(np.ndim(part) for part in data):
        if all(hasattr(part, "shape") for part in data):
            return tuple(np.asarray(part) for part in data)
    return np.asarray(data)


def _count_steps(x, y, epochs, steps, batch_size):
    if y is not None:
        images, labels = ({len(part) for part in keras.tree.flatten(data)} for data in (x, y))
        if images != labels or len(images) != 1 or 0 in images:
            raise InputError(
                "LRFinder needs as many labels as images, at least one; "
                f"received {sorted(images)} images and {sorted(labels)} labels."
            )
    if steps is None:
        if epochs < 1 or batch_size < 1:
            raise InputError(
                "LRFinder needs at least one epoch of batches of at least one; "
                f"received epochs={epochs}, batch_size={batch_size}."
            )
        if y is not None:
            per_epoch = math.ceil(images.pop() / batch_size)
        elif isinstance(x, tf.data.Dataset):
            per_epoch = int(x.cardinality())
        else:
            per_epoch = getattr(x, "num_batches", None) or -1
        if per_epoch < 0:  # infinite or unknown
            raise InputError(
                "The length of this dataset is infinite or unknown, so epochs have no meaning. "
                "Give LRFinder.find steps=..., the number of batches."
            )
        steps = epochs * per_epoch
    if steps < 2:
        raise InputError(f"A range test needs at least 2 batches; received {steps}.")
    return steps


def _endless_batches(x, y, batch_size, seed, as_dataset):
    """Batches without an end; arrays come in a new order in each pass.

    as_dataset: of arrays; where there are replicas, Keras loses batches of a generator.
    """
    if isinstance(x, tf.data.Dataset):
        return x.repeat()
    if isinstance(x, keras.utils.PyDataset):
        return (x[index] for _ in itertools.count() for index in range(x.num_batches))
    if y is None:
        return x

    def shuffled():
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(keras.tree.flatten(x)[0]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                yield keras.tree.map_structure(lambda part: part[rows], (x, y))  # noqa: B023

    if not as_dataset:
        return shuffled()
    rows = keras.tree.map_structure(
        lambda part: tf.TensorSpec((None, *part.shape[1:]), part.dtype), (x, y)
    )
    return tf.data.Dataset.from_generator(shuffled, output_signature=rows)


def _peeked(data):
    """(the first batch, all batches)"""
    first = next(iter(data))
    if isinstance(data, tf.data.Dataset):
        return first, data
    return first, (batch for batch in itertools.chain([first], data))
