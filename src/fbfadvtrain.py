"""Fast adversarial training: one signed gradient step from a random start, then an ordinary step.

Wong, Rice & Kolter 2020, "Fast is better than free: revisiting adversarial training" (ICLR, arXiv
2001.03994). `FastBetterFreeTrainedModel` is a keras.Model that trains this way, `RobustnessProbe`
the callback that watches for its known failure, catastrophic overfitting.

Attacks have images in [0, 1], epsilon and alpha in the same units; the model and the probe scale
those of another `pixel_range`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


Tensor = Any  # of the backend, or an array
Network = Callable[..., Tensor]  # (x, training=...) -> logits
LossFunction = Callable[..., Tensor]  # (labels, logits) -> mean over the batch

# Attacks follow the sign of the gradient alone, so its scale is free. In float16 it matters: where
# 128 images are classified with confidence, a quarter of the pixels' gradients of the mean loss lie
# below the smallest number. A power of two changes no sign and, in float32, no digit.
GRADIENT_SCALE = 2.0**10

# How far images may leave their range, as a fraction of it, before it is taken for another one.
# Interpolation leaves it a little.
PIXEL_SLACK = 0.05
NOTHING_SEEN = (np.inf, -np.inf)  # darkest and brightest pixel of no image


def input_gradient(
    model: Network, loss_fn: LossFunction, x: Tensor, y: Tensor, *, training: bool
) -> Tensor:
    """GRADIENT_SCALE times the gradient of the loss in the images; (B, H, W, C) like x.

    No weight gradients.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        loss = GRADIENT_SCALE * loss_fn(y, model(x, training=training))
    return tape.gradient(loss, x)


def uniform_noise(
    x: Tensor, radius: float | Tensor, seed_generator: keras.random.SeedGenerator
) -> Tensor:
    """Uniform in [-radius, radius], shaped like x; a fresh draw every call, also in a graph.

    Each replica of a tf.distribute.Strategy takes its rows of one draw for the global batch, so
    that the noise does not depend on their number.
    """
    replica, shape = tf.distribute.get_replica_context(), ops.shape(x)
    if replica is None or replica.num_replicas_in_sync == 1:
        return keras.random.uniform(shape, -radius, radius, seed=seed_generator)
    sizes = replica.all_gather(tf.shape(x)[:1], axis=0)  # (replicas,)
    noise = keras.random.uniform((ops.sum(sizes), *shape[1:]), -radius, radius, seed=seed_generator)
    first = ops.sum(sizes[: replica.replica_id_in_sync_group])
    return noise[first : first + shape[0]]


def sum_over_replicas(value: Tensor) -> Tensor:
    """The value itself where there is one replica."""
    replica = tf.distribute.get_replica_context()
    return value if replica.num_replicas_in_sync == 1 else replica.all_reduce("SUM", value)


def with_stand_in(rows: Tensor) -> Tensor:
    """The rows; where a replica has none of a short batch, the first one of the others.

    On no image batch norm gives NaN, and gradients of oneDNN's convolutions have a wrong shape.
    """
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return rows
    first = replica.all_gather(rows[:1], axis=0)[:1]
    return tf.cond(tf.shape(rows)[0] > 0, lambda: rows, lambda: first)


def of_unit_images(model: Network, pixel_range: tuple[float, float]) -> Network:
    """The model of images in pixel_range as a function of images in [0, 1]."""
    low, high = pixel_range
    return lambda x, training: model(low + (high - low) * x, training=training)


def fgsm_from_noise(
    model: Network,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    *,
    noise: float | Tensor,
    alpha: float | Tensor,
    ball: float | Tensor | None,
    seed_generator: keras.random.SeedGenerator,
) -> tuple[Tensor, Tensor]:
    """One signed gradient step from uniform noise, in the image.

    noise = ball = epsilon: Wong, Rice & Kolter 2020, Algorithm 3; see fgsm_random_start.
    noise = 2 epsilon, alpha = epsilon, no ball: N-FGSM of de Jorge et al. 2022, "Make some noise:
    reliable and efficient single-step adversarial training" (NeurIPS, arXiv 2202.01181),
    Algorithm 1; start and result are clipped to valid pixels, as in their code.

    Args: as of fgsm_random_start; noise is the radius of the start, ball that of the result or
        None.

    Returns:
        start, x_adv (B, H, W, C), in [0, 1].
    """
    delta = uniform_noise(x, noise, seed_generator)
    delta = ops.clip(x + delta, 0.0, 1.0) - x
    start = x + delta
    gradient = input_gradient(model, loss_fn, start, y, training=True)
    delta = delta + alpha * ops.sign(gradient)
    if ball is not None:
        delta = ops.clip(delta, -ball, ball)
    return start, ops.clip(x + delta, 0.0, 1.0)


def fgsm_random_start(
    model: Network,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    alpha: float,
    seed_generator: keras.random.SeedGenerator,
) -> Tensor:
    """One signed gradient step from a uniform start in the epsilon-ball.

    Wong, Rice & Kolter 2020, Algorithm 3. Unlike the paper's pseudocode, the start and the result
    are also clipped to valid pixels, as its code does. The model runs in training mode (batch
    statistics of the perturbed images), as in the authors' code.

    Args:
        x: images (B, H, W, C), float32 in [0, 1]; any B.
        y: true labels (B,), int. Never model predictions.
        epsilon, alpha: radius and step in the units of x, e.g. 8 / 255 and 10 / 255.
        seed_generator: keras.random.SeedGenerator; a fresh start every call, also in a graph.

    Returns:
        x_adv (B, H, W, C) with |x_adv - x| <= epsilon, in [0, 1].
    """
    _, x_adv = fgsm_from_noise(
        model,
        loss_fn,
        x,
        y,
        noise=epsilon,
        alpha=alpha,
        ball=epsilon,
        seed_generator=seed_generator,
    )
    return x_adv


class _MeanLoss(keras.losses.Loss):
    """A loss given by name or as a function: its mean over the batch, as keras.Model has it."""

    def __init__(self, function):
        super().__init__(name="mean_loss")
        self.call = function


class _RandomStates(keras.layers.Layer):
    """Puts the states of a model's random generators into its files, where Keras leaves them out.

    A part of its own in them, so that a plain model still loads the others.
    """

    def __init__(self, model):
        super().__init__(name="random_states")
        # Weights are in the files already. A function, since Keras tracks the variables in a list.
        weights = {id(weight) for weight in model.weights}
        self.states = lambda: [v for v in model.variables if id(v) not in weights]

    def save_own_variables(self, store):
        for index, state in enumerate(self.states()):
            store[str(index)] = ops.convert_to_numpy(state)

    def load_own_variables(self, store):
        if not store.keys():  # the file of a plain model
            return
        for index, state in enumerate(self.states()):
            state.assign(store[str(index)])


@dataclass(frozen=True)
class Refinements:
    """What later work adds to the training of Wong et al.; these defaults add nothing.

    noise: of N-FGSM as a multiple of eps, 2 in its paper, with alpha = eps; see fgsm_from_noise.
        None: the attack is fgsm_random_start.
    ramp: steps over which eps and alpha grow linearly from 0, as in the code of N-FGSM on SVHN.
    pairing: weight of the squared distance, mean over images and classes, between the logits at
        the start of the attack and at its result (Jia et al. 2022, "Prior-guided adversarial
        initialization for fast adversarial training", ECCV, arXiv 2207.08859; 10 in their code,
        with a start from the epoch before). Costs a third pass of the network.
    pairing_ramp: steps over which that weight grows linearly from 0.
    """

    noise: float | None = None
    ramp: int = 0
    pairing: float = 0.0
    pairing_ramp: int = 0

    def __post_init__(self):
        numbers = (0.0 if self.noise is None else self.noise, *list(asdict(self).values())[1:])
        if not all(0 <= number < np.inf for number in numbers):
            raise ValueError(f"Refinements are finite and not negative; received {self}.")


@keras.saving.register_keras_serializable(package="robust_activations")
class FastBetterFreeTrainedModel(keras.Model):
    """A functional Keras model whose training step is that of fast adversarial training.

    Used like any keras.Model: compile, fit, evaluate, save, load. Needs the TensorFlow backend.
    `fit` reports the loss on the perturbed batch alone (regularisers are minimised but not
    reported) and metrics on the perturbed batch; `evaluate` and `predict` see images as they are.
    `.keras` and `.weights.h5` files hold the states of all random generators, so that a resumed
    training goes on as an uninterrupted one; Keras' legacy `.h5` does not.

    Batch norm is in training mode in both passes of a step and its moving statistics are updated in
    both (Wong et al. tried evaluation mode for the attack pass: 44.3 against 44.9 % robust).
    With eps and alpha 0 there is no attack pass: a step is Keras' own.

    Under a tf.distribute.Strategy a step changes the weights as it does on one device, but for
    batch norm, whose statistics are those of each replica's images unless its layers are
    `synchronized`.

    Args:
        inputs, outputs: of the model, images in pixel_range to logits.
        eps: L-infinity radius of the perturbation as a fraction of pixel_range, from 0 to 1.
        alpha: length of the gradient step, likewise; 1.25 eps in the paper.
        seed: of the random starts; None draws one.
        pixel_range: lowest and highest value of a pixel, to which perturbed images are clipped.
            Training images of any number type are cast; where those of the first batch do not fit
            pixel_range, training is refused (after its first step under jit_compile).
        refinements: Refinements, or a dict of its fields.
    """

    train_function: Callable | None  # Keras' own

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        eps: float = 8 / 255,
        alpha: float = 10 / 255,
        seed: int | None = None,
        pixel_range: Sequence[float] = (0, 1),
        refinements: Refinements | dict[str, Any] = Refinements(),
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "FastBetterFreeTrainedModel needs Keras' TensorFlow backend; "
                f"this is {keras.backend.backend()}. Set KERAS_BACKEND=tensorflow."
            )
        if not (0 <= eps <= 1 and 0 <= alpha <= 1):
            raise ValueError(
                "eps and alpha are fractions of the pixel range, from 0 to 1; "
                f"received {eps} and {alpha}. Give 8 of 255 grey levels as 8 / 255."
            )
        low, high = pixel_range
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"pixel_range is (lowest, highest); received {pixel_range}.")
        super().__init__(inputs, outputs, **kwargs)
        if not keras.backend.is_float_dtype(self.input.dtype):
            raise ValueError(
                "The attack needs the gradient in the images, so the model's Input must be of a "
                f"float type; received {self.input.dtype}. Training images may be integers."
            )
        self.eps = float(eps)
        self.alpha = float(alpha)
        self.pixel_range = (float(low), float(high))
        fields = refinements if isinstance(refinements, dict) else asdict(refinements)
        self.refinements = Refinements(**fields)
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.random_states = _RandomStates(self)
        self.extremes = tf.Variable(NOTHING_SEEN, trainable=False)  # of the first batch

    def compile(
        self,
        optimizer: Any = "sgd",
        loss: Any = None,
        *args: Any,
        jit_compile: bool = False,
        **kwargs: Any,
    ) -> None:
        """As keras.Model.compile, with one loss.

        jit_compile is off unless asked for: on a CPU, XLA's convolutions are slower than oneDNN's.
        """
        if loss is None or isinstance(loss, list | tuple | dict):
            raise ValueError(
                "Fast adversarial training maximises and minimises one loss; "
                f"received loss={loss!r}. Use SparseCategoricalCrossentropy(from_logits=True)."
            )
        loss_fn = keras.losses.get(loss)
        self.loss_fn = loss_fn if isinstance(loss_fn, keras.losses.Loss) else _MeanLoss(loss_fn)
        super().compile(optimizer, loss, *args, jit_compile=jit_compile, **kwargs)
        # Files are loaded into an optimizer that has its variables.
        self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras leaves a loaded model uncompiled where `compile` is overridden.
        self.compile(**keras.saving.deserialize_keras_object(config))

    def train_step(self, data: Any) -> dict[str, Tensor]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        batch_size = ops.shape(x)[0]
        x = self._checked(ops.cast(x, self.input.dtype))
        start, x_adv = self.perturbed(with_stand_in(x), with_stand_in(y))
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        share = self._share(batch_size, sample_weight)
        with tf.GradientTape() as tape:
            logits = self(x_adv, training=True)[:batch_size]  # without a stand-in
            loss = share * self.loss_fn(y, logits, sample_weight=sample_weight)
            objective = loss
            if self.refinements.pairing:
                objective += self._pairing(logits, self(start, training=True)[:batch_size])
            penalties = [penalty / replicas for penalty in self.losses]
            objective = self.optimizer.scale_loss(sum(penalties, start=objective))
        gradients = tape.gradient(objective, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)  # of their sum over replicas
        self._loss_tracker.update_state(sum_over_replicas(loss), sample_weight=batch_size)
        return self.compute_metrics(x_adv, y, logits, sample_weight)

    def perturbed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The attack of the training on a batch of images in pixel_range, and where it started.

        Returns:
            start, x_adv: like x, float, in pixel_range.
        """
        if self.eps == self.alpha == 0:  # ordinary training, at the cost of ordinary training
            return x, x
        low, high = self.pixel_range
        more = self.refinements
        growth = self._growth(more.ramp)
        start, x_adv = fgsm_from_noise(
            of_unit_images(self, self.pixel_range),
            self.loss_fn,
            (x - low) / (high - low),
            y,
            noise=growth * self.eps * (1.0 if more.noise is None else more.noise),
            alpha=growth * self.alpha,
            ball=growth * self.eps if more.noise is None else None,
            seed_generator=self.seed_generator,
        )
        return low + (high - low) * start, low + (high - low) * x_adv

    def _growth(self, ramp):
        """From 0 to 1 over the first `ramp` steps of the optimizer, whose count files keep."""
        if not ramp:
            return 1.0
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)  # mixed precision
        return ops.minimum(ops.cast(optimizer.iterations, "float32") / ramp, 1.0)

    def _pairing(self, logits, logits_at_start):
        weight = self._growth(self.refinements.pairing_ramp) * self.refinements.pairing
        distance = ops.square(ops.cast(logits - logits_at_start, "float32"))
        batch_size = ops.cast(sum_over_replicas(ops.shape(logits)[0]), "float32")
        return weight * ops.sum(distance) / (batch_size * logits.shape[-1])

    def _share(self, batch_size, sample_weight):
        """What to multiply a replica's loss by to make their sum that of the global batch."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas == 1 or self.loss_fn.reduction == "sum":
            return 1.0
        count = ops.cast(batch_size, "float32")
        if self.loss_fn.reduction == "mean_with_sample_weight" and sample_weight is not None:
            count = ops.sum(ops.cast(sample_weight, "float32"))
        # Keras' mean losses are divided by the number of replicas.
        return replicas * count / sum_over_replicas(count)

    def _checked(self, x):
        """x, whose first batch must look like images in pixel_range.

        In the graph: a look from outside would draw from the pipeline of the data.
        """

        def look():
            darkest, brightest = ops.min(x), ops.max(x)
            self.extremes.assign([darkest, brightest])
            tf.debugging.Assert(self._is_plausible(darkest, brightest), [darkest, brightest])
            return True

        looked = tf.cond(tf.math.is_inf(self.extremes[0]), look, lambda: True)
        with tf.control_dependencies([looked]):
            return tf.identity(x)

    def _is_plausible(self, darkest, brightest):
        low, high = self.pixel_range
        slack = PIXEL_SLACK * (high - low)
        is_inside = (darkest >= low - slack) & (brightest <= high + slack)
        # What was divided by 255 once too often uses 0.4 % of the range.
        return is_inside & ((brightest > low + (high - low) / 100) | (brightest <= low))

    def make_train_function(self, force: bool = False) -> None:
        """Keras' own, whose first step says in one line that images do not fit pixel_range."""
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        step = self.train_function

        def first_step(iterator):
            self.extremes.assign(NOTHING_SEEN)
            self.train_function = step
            try:
                logs = step(iterator)
            except tf.errors.InvalidArgumentError:
                self._refuse_implausible()
                raise
            self._refuse_implausible()  # XLA leaves assertions out
            return logs

        self.train_function = first_step

    def _refuse_implausible(self):
        darkest, brightest = ops.convert_to_numpy(self.extremes).tolist()
        if self._is_plausible(darkest, brightest):
            return
        self.train_function = None  # the next one looks again
        raise ValueError(
            f"Training images must lie in pixel_range={self.pixel_range}; those of the first batch "
            f"lie in {darkest:.4g} to {brightest:.4g}. Scale them, or give the model their "
            "pixel_range; eps and alpha are fractions of it."
        )

    def inference_model(self) -> keras.Model:
        """The plain keras.Model of the same layers, to save and to attack."""
        return keras.Model(self.input, self.output, name=self.name)

    def get_config(self) -> dict[str, Any]:
        return {
            "model": keras.saving.serialize_keras_object(self.inference_model()),
            "eps": self.eps,
            "alpha": self.alpha,
            "seed": self.seed_generator.get_config()["seed"],
            "pixel_range": self.pixel_range,
            "refinements": asdict(self.refinements),
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "FastBetterFreeTrainedModel":
        config = dict(config)
        model = keras.saving.deserialize_keras_object(
            config.pop("model"), custom_objects=custom_objects
        )
        return cls(model.input, model.output, **config)


# Keras' legacy .h5 format looks a class up by its bare name.
keras.saving.get_custom_objects()["FastBetterFreeTrainedModel"] = FastBetterFreeTrainedModel


def pgd(
    model: Network,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    *,
    start: Tensor,
    epsilon: float,
    alpha: float,
    steps: int,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018) in inference mode: a quick probe.

    The evaluation proper is kaf_study.evaluation.

    Args:
        x, start: images (B, H, W, C) in [0, 1] and the perturbed images to start from.
        y: true labels (B,).

    Returns:
        x_adv (B, H, W, C) with |x_adv - x| <= epsilon, in [0, 1].
    """

    def step(x_adv):
        gradient = input_gradient(model, loss_fn, x_adv, y, training=False)
        x_adv = x_adv + alpha * ops.sign(gradient)
        x_adv = ops.clip(x_adv, x - epsilon, x + epsilon)
        return ops.clip(x_adv, 0.0, 1.0)

    # keras.ops: a loop in the graph rather than `steps` copies of the model
    return ops.fori_loop(0, steps, lambda _, x_adv: step(x_adv), start)


def _checked_labels(x, y):
    """Class numbers (N,) or one-hot rows (N, classes) for the images of a probe."""
    x, y = np.asarray(x), np.asarray(y)
    if y.shape == (len(x), 1):  # as keras.datasets gives them
        y = y[:, 0]
    if y.ndim not in (1, 2) or len(y) != len(x):
        raise ValueError(
            "RobustnessProbe expects one class number or one-hot row per image, y of shape "
            f"({len(x)},) or ({len(x)}, classes); received {y.shape}."
        )
    return y


class RobustnessProbe(keras.callbacks.Callback):
    """Clean, FGSM and PGD-10 accuracy on a few validation images, at the end of each epoch.

    Adds probe_clean, probe_fgsm and probe_pgd (fractions) to the epoch's logs; list it before the
    callbacks that read them (CSVLogger, ModelCheckpoint). Every epoch uses the same random starts.
    For any model compiled with one loss over classes, of class numbers or of one-hot labels.

    Catastrophic overfitting (Wong et al., section 5.4): the model learns to answer the one-step
    attack alone. It is seen from the second epoch on, where PGD accuracy falls below half of its
    best while FGSM accuracy rises, or, by more than two standard errors of so few images, below
    half of that under the attack of the training (of a FastBetterFreeTrainedModel). Both are
    measured on the same images in inference mode: the training's own accuracy runs ahead of PGD's
    in the first epochs of a sound training as well, while the moving averages of batch norm lag.
    Nor is anything learned yet, the attack neither, by a network that answers that attack at less
    than a tenth of the way from chance to 1: its margins are so small that PGD takes all.
    The probe says so in one line, stops the training, restores the weights of the epoch before.

    Args:
        x, y: validation images (N, H, W, C) in [0, 1] or the model's pixel_range, of any number
            type, and true labels: class numbers (N,) or (N, 1), or one-hot (N, classes). 512 tell
            enough.
        epsilon: radius; FGSM makes one step of epsilon from the image, PGD `steps` steps of `alpha`
            from a uniform start.
        history: rows (dicts with probe_fgsm, probe_pgd) of earlier epochs, where a run is resumed.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        epsilon: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        batch_size: int = 128,
        seed: int = 0,
        history: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.x, self.y = np.asarray(x), _checked_labels(x, y)
        self.epsilon, self.alpha, self.steps = epsilon, alpha, steps
        self.batch_size, self.seed = batch_size, seed
        self.best = max(history, key=lambda row: row["probe_pgd"], default=None)
        self.overfitted_in_epoch: int | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.good_weights = self.model.get_weights()
        self._look_at(self.x, self.y)
        self._correct = self._compiled()

    def on_images(self, x: Any, y: Any) -> "RobustnessProbe":
        """This probe, which has begun, on other images of its model, without compiling it anew."""
        other = copy.copy(self)
        other._look_at(x, y)
        return other

    def _look_at(self, x, y):
        """Sets x, y, and `images`, what `_correct` is given: as the model and its loss take it."""
        self.x, self.y = np.asarray(x), _checked_labels(x, y)
        x = self._unit_images(getattr(self.model, "pixel_range", (0, 1)))
        noise = np.random.default_rng(self.seed).uniform(-self.epsilon, self.epsilon, x.shape)
        start = np.clip(x + noise.astype("float32"), 0.0, 1.0)
        classes = self.y.argmax(axis=-1) if self.y.ndim == 2 else self.y
        self.images = (x, classes, self._labels(keras.losses.get(self.model.loss)), start)

    def _compiled(self):
        """Function: a batch of `images` -> how many are right clean, under FGSM, PGD, and own."""
        network = of_unit_images(self.model, getattr(self.model, "pixel_range", (0, 1)))
        loss_fn = keras.losses.get(self.model.loss)

        @tf.function  # traced once for all three
        def attack(x, labels, start, alpha, steps):
            return pgd(
                network, loss_fn, x, labels, start=start, epsilon=self.epsilon, alpha=alpha,
                steps=steps,
            )  # fmt: skip

        @tf.function(
            input_signature=[tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in self.images]
        )
        def correct(x, classes, labels, start):
            def attacked(start, alpha, steps):
                return attack(x, labels, start, tf.constant(alpha, tf.float32), tf.constant(steps))

            looked_at = [x, attacked(x, self.epsilon, 1), attacked(start, self.alpha, self.steps)]
            if isinstance(self.model, FastBetterFreeTrainedModel):
                looked_at.append(attacked(start, self.model.alpha, 1))
            found = [ops.argmax(network(z, training=False), axis=-1) for z in looked_at]
            return [ops.sum(ops.cast(ops.equal(f, classes), "int32")) for f in found]

        return correct

    def _labels(self, loss_fn):
        """y as the loss takes it: Keras' sparse losses class numbers, its others one-hot rows."""
        kind = loss_fn if hasattr(loss_fn, "__name__") else type(loss_fn)
        outputs, labels = self._outputs(), self.y
        if kind.__module__.startswith("keras."):
            if "sparse" in kind.__name__.lower():
                labels = labels.argmax(axis=-1) if labels.ndim == 2 else labels
            elif labels.ndim == 1:
                labels = np.eye(outputs, dtype="float32")[labels]
        try:
            loss_fn(labels[:1], np.zeros((1, outputs), "float32"))
        except Exception as error:
            raise ValueError(
                f"The loss {kind.__name__} does not take the labels given to RobustnessProbe "
                f"(shape {labels.shape}, for {outputs} outputs). Give them as `fit` gets them."
            ) from error
        return labels

    def _outputs(self):
        return self.model.compute_output_shape((1, *self.x.shape[1:]))[-1]

    def _unit_images(self, pixel_range):
        low, high = pixel_range
        x = (self.x.astype("float32") - low) / (high - low)
        if not (x.min() >= -PIXEL_SLACK and x.max() <= 1 + PIXEL_SLACK):
            raise ValueError(
                f"The images of RobustnessProbe must lie in {pixel_range}; received {self.x.min()} "
                f"to {self.x.max()}. Scale them, or give the model their pixel_range."
            )
        return x

    def accuracies(self) -> dict[str, float]:
        """Fractions of the probe images: clean, under FGSM, under PGD."""
        return self.measure()[0]

    def measure(self) -> tuple[dict[str, float], float | None]:
        """`accuracies`, and the fraction under the attack of the training (None: it has none)."""
        batches = [slice(i, i + self.batch_size) for i in range(0, len(self.x), self.batch_size)]
        counts = [
            [int(n) for n in self._correct(*(tf.constant(array[batch]) for array in self.images))]
            for batch in batches
        ]
        clean, fgsm, pgd, *rest = (np.sum(counts, axis=0) / len(self.x)).tolist()
        row = {"probe_clean": clean, "probe_fgsm": fgsm, "probe_pgd": pgd}
        return row, rest[0] if rest else None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        row, training_attack = self.measure()
        if logs is not None:
            logs.update(row)
        best = self.best
        if best and (evidence := self.overfitting(row, best, training_attack)):
            self.overfitted_in_epoch = epoch
            print(
                f"\nCatastrophic overfitting in epoch {epoch + 1}: {evidence}. Training stops; the "
                "weights of the epoch before are restored. Another seed or, if it came early, a "
                "higher first learning rate may help."
            )
            self.model.set_weights(self.good_weights)
            self.model.stop_training = True
            return
        if best is None or row["probe_pgd"] > best["probe_pgd"]:
            self.best = row
        self.good_weights = self.model.get_weights()

    def overfitting(
        self,
        row: dict[str, float],
        best: dict[str, Any],
        training_attack: float | None = None,
    ) -> str | None:
        """The evidence in words, or None."""
        pgd = row["probe_pgd"]
        if pgd < best["probe_pgd"] / 2 and row["probe_fgsm"] > best["probe_fgsm"]:
            return (
                f"PGD accuracy {best['probe_pgd']:.1%} -> {pgd:.1%} while FGSM accuracy "
                f"{best['probe_fgsm']:.1%} -> {row['probe_fgsm']:.1%}"
            )
        chance = 1 / self._outputs()
        if training_attack is None or training_attack < chance + (1 - chance) / 10:
            return None
        half = training_attack / 2
        if pgd < half - 2 * np.sqrt(half * (1 - half) / len(self.x)):
            return (
                f"accuracy {training_attack:.1%} under the attack of the training, "
                f"{pgd:.1%} under PGD"
            )
        return None
