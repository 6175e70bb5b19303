"""Fast adversarial training: one signed gradient step from a random start, then an ordinary step.

Wong, Rice & Kolter 2020, "Fast is better than free: revisiting adversarial training" (ICLR, arXiv
2001.03994). `FastBetterFreeTrainedModel` is a keras.Model that trains this way, `RobustnessProbe`
the callback that watches for its known failure, catastrophic overfitting.

Images are in [0, 1] everywhere; epsilon and alpha are in the same units.
"""

import keras
import numpy as np
from keras import ops

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


# Attacks follow the sign of the gradient alone, so its scale is free. In float16 it matters: where
# 128 images are classified with confidence, a quarter of the pixels' gradients of the mean loss lie
# below the smallest number. A power of two changes no sign and, in float32, no digit.
GRADIENT_SCALE = 2.0**10


def input_gradient(model, loss_fn, x, y, *, training):
    """GRADIENT_SCALE times the gradient of the loss in the images; (B, H, W, C) like x.

    No weight gradients.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        loss = GRADIENT_SCALE * loss_fn(y, model(x, training=training))
    return tape.gradient(loss, x)


def fgsm_random_start(model, loss_fn, x, y, *, epsilon, alpha, seed_generator):
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
    delta = keras.random.uniform(ops.shape(x), -epsilon, epsilon, seed=seed_generator)
    delta = ops.clip(x + delta, 0.0, 1.0) - x
    gradient = input_gradient(model, loss_fn, x + delta, y, training=True)
    delta = ops.clip(delta + alpha * ops.sign(gradient), -epsilon, epsilon)
    return ops.clip(x + delta, 0.0, 1.0)


class _MeanLoss(keras.losses.Loss):
    """A loss given by name or as a function: its mean over the batch, as keras.Model has it."""

    def __init__(self, function):
        super().__init__(name="mean_loss")
        self.call = function


@keras.saving.register_keras_serializable(package="robust_activations")
class FastBetterFreeTrainedModel(keras.Model):
    """A functional Keras model whose training step is that of fast adversarial training.

    Used like any keras.Model: compile, fit, evaluate, save, load. Needs the TensorFlow backend.
    `fit` reports the loss on the perturbed batch alone (regularisers are minimised but not
    reported) and metrics on the perturbed batch; `evaluate` and `predict` see images as they are.

    Batch norm is in training mode in both passes of a step and its moving statistics are updated in
    both (Wong et al. tried evaluation mode for the attack pass: 44.3 against 44.9 % robust).

    Args:
        inputs, outputs: of the model, images in [0, 1] to logits.
        eps: L-infinity radius of the perturbation.
        alpha: length of the gradient step; 1.25 eps in the paper.
        seed: of the random starts; None draws one.
    """

    def __init__(self, inputs, outputs, eps=8 / 255, alpha=10 / 255, seed=None, **kwargs):
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "FastBetterFreeTrainedModel needs Keras' TensorFlow backend; "
                f"this is {keras.backend.backend()}. Set KERAS_BACKEND=tensorflow."
            )
        if eps < 0 or alpha < 0:
            raise ValueError(f"eps and alpha must not be negative; received {eps} and {alpha}.")
        super().__init__(inputs, outputs, **kwargs)
        self.eps = float(eps)
        self.alpha = float(alpha)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def compile(self, optimizer="sgd", loss=None, *args, jit_compile=False, **kwargs):
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

    def compile_from_config(self, config):
        # Keras leaves a loaded model uncompiled where `compile` is overridden.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x_adv = fgsm_random_start(
            self,
            self.loss_fn,
            x,
            y,
            epsilon=self.eps,
            alpha=self.alpha,
            seed_generator=self.seed_generator,
        )
        with tf.GradientTape() as tape:
            logits = self(x_adv, training=True)
            loss = self.loss_fn(y, logits, sample_weight=sample_weight)
            objective = self.optimizer.scale_loss(sum(self.losses, start=loss))
        gradients = tape.gradient(objective, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self._loss_tracker.update_state(loss, sample_weight=ops.shape(x)[0])
        return self.compute_metrics(x_adv, y, logits, sample_weight)

    def inference_model(self):
        """The plain keras.Model of the same layers, to save and to attack."""
        return keras.Model(self.input, self.output, name=self.name)

    def get_config(self):
        return {
            "model": keras.saving.serialize_keras_object(self.inference_model()),
            "eps": self.eps,
            "alpha": self.alpha,
            "seed": self.seed_generator.get_config()["seed"],
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(
            config.pop("model"), custom_objects=custom_objects
        )
        return cls(model.input, model.output, **config)


def pgd(model, loss_fn, x, y, *, start, epsilon, alpha, steps):
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


class RobustnessProbe(keras.callbacks.Callback):
    """Clean, FGSM and PGD-10 accuracy on a few validation images, at the end of each epoch.

    Adds probe_clean, probe_fgsm and probe_pgd (fractions) to the epoch's logs; list it before the
    callbacks that read them (CSVLogger, ModelCheckpoint). Every epoch uses the same random starts.
    For any model compiled with one loss of class labels (Sparse...).

    Catastrophic overfitting (Wong et al., section 5.4): the model learns to answer the one-step
    attack alone. It is seen from the second epoch on, where PGD accuracy falls below half of its
    best while FGSM accuracy rises, or, by more than two standard errors of so few images, below
    half of that under the attack of the training (of a FastBetterFreeTrainedModel). Both are
    measured on the same images in inference mode: the training's own accuracy runs ahead of PGD's
    in the first epochs of a sound training as well, while the moving averages of batch norm lag.
    The probe says so in one line, stops the training, restores the weights of the epoch before.

    Args:
        x, y: validation images (N, H, W, C) in [0, 1] and true labels (N,) or (N, 1); 512 tell
            enough.
        epsilon: radius; FGSM makes one step of epsilon from the image, PGD `steps` steps of `alpha`
            from a uniform start.
        history: rows (dicts with probe_fgsm, probe_pgd) of earlier epochs, where a run is resumed.
    """

    def __init__(
        self,
        x,
        y,
        *,
        epsilon=8 / 255,
        alpha=2 / 255,
        steps=10,
        batch_size=128,
        seed=0,
        history=(),
    ):
        super().__init__()
        self.x = np.asarray(x, "float32")
        self.y = np.asarray(y)
        if self.y.shape == (len(self.x), 1):  # as keras.datasets gives them
            self.y = self.y[:, 0]
        if self.y.shape != (len(self.x),):
            raise ValueError(
                f"RobustnessProbe expects one class number per image, y of shape {(len(self.x),)}; "
                f"received {self.y.shape}. Of one-hot labels take y.argmax(axis=-1)."
            )
        noise = np.random.default_rng(seed).uniform(-epsilon, epsilon, self.x.shape)
        self.start = np.clip(self.x + noise.astype("float32"), 0.0, 1.0)
        self.epsilon, self.alpha, self.steps = epsilon, alpha, steps
        self.batch_size = batch_size
        self.best = max(history, key=lambda row: row["probe_pgd"], default=None)
        self.overfitted_in_epoch = None

    def on_train_begin(self, logs=None):
        self.good_weights = self.model.get_weights()
        loss_fn = getattr(self.model, "loss_fn", None) or keras.losses.get(self.model.loss)

        @tf.function(reduce_retracing=True)
        def correct(x, y, start):
            def is_correct(x):
                return ops.equal(ops.argmax(self.model(x, training=False), axis=-1), y)

            def attack(start, alpha, steps):
                return pgd(
                    self.model,
                    loss_fn,
                    x,
                    y,
                    start=start,
                    epsilon=self.epsilon,
                    alpha=alpha,
                    steps=steps,
                )

            attacked = [attack(x, self.epsilon, 1), attack(start, self.alpha, self.steps)]
            if isinstance(self.model, FastBetterFreeTrainedModel):
                attacked.append(attack(start, self.model.alpha, 1))
            return [ops.sum(ops.cast(is_correct(z), "int32")) for z in (x, *attacked)]

        self._correct = correct

    def accuracies(self):
        """Fractions of the probe images: clean, under FGSM, under PGD."""
        return self.measure()[0]

    def measure(self):
        """`accuracies`, and the fraction under the attack of the training (None: it has none)."""
        batches = [slice(i, i + self.batch_size) for i in range(0, len(self.x), self.batch_size)]
        counts = [
            [int(n) for n in self._correct(self.x[batch], self.y[batch], self.start[batch])]
            for batch in batches
        ]
        clean, fgsm, pgd, *rest = (np.sum(counts, axis=0) / len(self.x)).tolist()
        row = {"probe_clean": clean, "probe_fgsm": fgsm, "probe_pgd": pgd}
        return row, rest[0] if rest else None

    def on_epoch_end(self, epoch, logs=None):
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

    def overfitting(self, row, best, training_attack=None):
        """The evidence in words, or None."""
        pgd = row["probe_pgd"]
        if pgd < best["probe_pgd"] / 2 and row["probe_fgsm"] > best["probe_fgsm"]:
            return (
                f"PGD accuracy {best['probe_pgd']:.1%} -> {pgd:.1%} while FGSM accuracy "
                f"{best['probe_fgsm']:.1%} -> {row['probe_fgsm']:.1%}"
            )
        if training_attack is None:
            return None
        half = training_attack / 2
        if pgd < half - 2 * np.sqrt(half * (1 - half) / len(self.x)):
            return (
                f"accuracy {training_attack:.1%} under the attack of the training, "
                f"{pgd:.1%} under PGD"
            )
        return None
