"""Attack a classifier image by image: IBM ART's attacks, run so that no work is wasted.

`PGD` and `FGSM`, `DeepFool` and `CarliniWagner` are ART's; what ART lacks for TensorFlow is in
`kaf_study.attacks.apgd` and `kaf_study.attacks.square`, on the `BatchAttack` here. All have
`run(x, y, images, restart, ...) -> Run`.

The mathematics of PGD is ART's own: it is its `ProjectedGradientDescentTensorFlowV2`
(Madry et al. 2018, arXiv 1706.06083) with another outer loop. What is different from calling it
plainly, and why the verdict is the same:

- One compiled function gives the loss gradient in the images alone and, from the same forward
  pass, the logits. ART's eager tape differentiates in every weight too and throws that away. The
  logits tell which images have fallen, without a prediction of their own.
- A pool of `batch_size` images is stepped together, each at its own iteration: whatever falls
  leaves at once and the next image takes its place. The pool is padded to a few fixed sizes.
- Once an image's iterates repeat (a fixed point or a cycle of two) the rest of its run is known,
  and left out. On a ResNet20 of this project every image still standing after 50 steps had come to
  that, half of them by step 27: 45 % of their steps.
- Each image has its own random start, drawn from (seed, image, restart): what happens to it does
  not depend on the batch size or on which other images are still standing (float rounding inside
  a convolution may differ in the last bit between batch sizes; nothing else does).

Measured on 2 CPU cores with a ResNet20 of 128 images, per gradient: ART's eager call 650 ms, a
compiled function of the logits under ART's tape 330 ms, this 210 ms, this with jit_compile 240 ms
and 2 s more for every new batch size. So there is no jit_compile here.
"""

import warnings
from dataclasses import dataclass
from itertools import islice
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from kaf_study import InputError

# Importing ART sets up logging for the whole process, which closes other libraries' log streams
# (absl's, and with it a captured stderr), and warns that PyTorch, which is not used, is missing.
with warnings.catch_warnings(), mock.patch("logging.config.dictConfig"):
    warnings.simplefilter("ignore")
    from art.attacks.evasion import (
        CarliniLInfMethod,
        ProjectedGradientDescentTensorFlowV2,
    )
    from art.attacks.evasion import DeepFool as ArtDeepFool
    from art.estimators.classification import TensorFlowV2Classifier


class CompiledClassifier(TensorFlowV2Classifier):
    """ART's view of a model of logits, compiled, in inference mode, images in [0, 1].

    The loss is the sum over images, not ART's usual mean: an image's gradient then does not depend
    on how many others are in the batch.

    Attributes:
        last_logits: (B, classes), of the forward pass of the last `loss_gradient`.
        gradient_calls: how many gradients were computed, in batches.
        forward_calls: how many batches were predicted without a gradient.
    """

    def __init__(self, model, classes, input_shape):
        super().__init__(
            model=model,
            nb_classes=classes,
            input_shape=tuple(input_shape),
            loss_object=keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum"),
            clip_values=(0.0, 1.0),
            preprocessing=None,
        )
        self.last_logits = None
        self.gradient_calls = 0
        self.forward_calls = 0
        self._class_gradient = None
        images = tf.TensorSpec((None, *input_shape), tf.float32)
        targets = tf.TensorSpec((None, classes), tf.float32)

        @tf.function(input_signature=[images])
        def logits(x):
            return tf.cast(model(x, training=False), tf.float32)

        @tf.function(input_signature=[images, targets])
        def logits_and_gradient(x, y):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                predictions = tf.cast(model(x, training=False), tf.float32)
                loss = self.loss_object(y, predictions)
            return predictions, tape.gradient(loss, x)

        self._logits, self._logits_and_gradient = logits, logits_and_gradient

    def loss_gradient(self, x, y, training_mode=False, **kwargs):
        """Gradient of the summed cross-entropy in x (B, H, W, C), y one-hot (B, classes)."""
        self.gradient_calls += 1
        self.last_logits, gradient = self._logits_and_gradient(
            tf.convert_to_tensor(x, tf.float32), tf.convert_to_tensor(y, tf.float32)
        )
        return gradient.numpy() if isinstance(x, np.ndarray) else gradient

    def predict(self, x, batch_size=128, training_mode=False, **kwargs):
        """Logits (N, classes), in chunks (ART's own `predict` ignores `batch_size`)."""
        chunks = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
        self.forward_calls += len(chunks)
        return np.concatenate([self._logits(tf.constant(c, tf.float32)).numpy() for c in chunks])

    def differentiable(self, loss):
        """Compile a loss of the logits for use on batches, each call counted as a gradient.

        Args:
            loss: function (logits (B, classes), *labels (B,) int) -> (B,).

        Returns:
            Function (x (B, H, W, C), *labels) -> loss (B,), logits (B, classes), and the gradient
            of the summed loss in x, NumPy arrays.
        """

        @tf.function(reduce_retracing=True)
        def compiled(x, *labels):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                logits = tf.cast(self.model(x, training=False), tf.float32)
                losses = loss(logits, *labels)
            return losses, logits, tape.gradient(losses, x)

        def loss_logits_gradient(x, *labels):
            self.gradient_calls += 1
            labels = (tf.constant(label, tf.int32) for label in labels)
            return [v.numpy() for v in compiled(tf.constant(x, tf.float32), *labels)]

        return loss_logits_gradient

    def class_gradient(self, x, label=None, training_mode=False, **kwargs):
        """Gradient of logits in x, (B, K, H, W, C): of class(es) `label` (K = 1), or of all."""
        if self._class_gradient is None:
            self._class_gradient = self.differentiable(
                lambda logits, y: tf.gather(logits, y, batch_dims=1)
            )
        classes = range(self.nb_classes) if label is None else [label]
        gradients = [
            self._class_gradient(x, np.broadcast_to(np.asarray(c), len(x)))[2] for c in classes
        ]
        return np.stack(gradients, axis=1)

    def check_gradient(self, x, y):
        """Refuse a model through which no gradient passes, with the reason. x (B, ...), y (B,)."""
        try:
            _, gradient = self._logits_and_gradient(
                tf.constant(x, tf.float32), tf.one_hot(y, self.nb_classes)
            )
        except (LookupError, ValueError, TypeError) as error:
            raise InputError(
                "the model was saved without gradient information (probably a custom gradient "
                f"that older TensorFlow did not save: {' '.join(str(error).split())[:120]}); "
                "export it again from the original code, or give the .keras or .h5 file"
            ) from None
        if gradient is None:
            raise InputError(
                "no gradient passes from the model's outputs to its images, so it cannot be "
                "attacked by gradients; give a differentiable version of it"
            )
        if not np.all(np.isfinite(gradient)):
            raise InputError("the model's gradient in its images has NaN or infinite values")


class PGD(ProjectedGradientDescentTensorFlowV2):
    """ART's projected gradient descent in the L-inf ball, one iteration at a time."""

    def __init__(self, classifier, *, epsilon, alpha, steps):
        super().__init__(
            classifier, eps=float(epsilon), eps_step=float(alpha), max_iter=steps, verbose=False
        )

    def start(self, x, image, restart, seed):
        """First iterate for one image x (H, W, C)."""
        return random_start(x, epsilon=self.eps, seed=seed, image=image, restart=restart)

    def run(self, x, y, images, restart, *, seed, batch_size, judge_every=True, progress=None):
        """One restart on N images, `images` (N,) being their numbers, as `run_restart` does it."""

        def start(i):
            return self.start(x[i], int(images[i]), restart, seed)

        return run_restart(
            self, x, start, y, batch_size=batch_size, judge_every=judge_every, progress=progress
        )

    def step(self, x_adv, x, targets):
        """One iteration: gradient, signed step of alpha, clip to [0, 1], project to the ball.

        Args:
            x_adv, x: current and original images (B, H, W, C), float32 in [0, 1].
            targets: one-hot labels (B, classes) whose loss is raised.

        Returns:
            The next x_adv, and the logits (B, classes) of the x_adv given.
        """
        stepped = self._compute_tf(
            tf.constant(x_adv),
            tf.constant(x),
            tf.constant(targets),
            mask=None,
            eps=self.eps,
            eps_step=self.eps_step,
            momentum=None,
            random_init=False,
        )
        # x + (x_adv - x) may leave [0, 1] by one rounding; ART does not mind, we check for it.
        return np.clip(stepped.numpy(), 0.0, 1.0), self.estimator.last_logits.numpy()


class FGSM(PGD):
    """One signed step of epsilon from the clean image (Goodfellow et al. 2015, arXiv 1412.6572)."""

    def __init__(self, classifier, *, epsilon):
        # ART wants a step above 0; projection makes it 0 where epsilon is.
        super().__init__(classifier, epsilon=epsilon, alpha=max(epsilon, 1e-9), steps=1)

    def start(self, x, image, restart, seed):
        return x


def project(x_adv, x, epsilon):
    """Nearest point of the epsilon-ball around x (..., H, W, C) and of [0, 1]; float32."""
    return np.clip(np.clip(x_adv, x - epsilon, x + epsilon), 0.0, 1.0).astype("float32")


class BatchAttack:
    """An attack that looks at points one after the other; images that fall leave the batch.

    Subclasses say where it begins, what it looks at, and where it goes next. All they keep for B
    images is a dict of arrays (B, ...), of which `x`, `y` and `x_adv` must be there, so that
    what is left of a batch is the same as a smaller batch.

    Args:
        steps: points after the first.
    """

    def __init__(self, classifier, *, epsilon, steps):
        self.classifier, self.epsilon, self.steps = classifier, float(epsilon), steps

    def begin(self, x, y, images, restart, seed):
        """The state (dict of arrays) with the first point, `x_adv` (B, H, W, C)."""
        raise NotImplementedError

    def look(self, state):
        """Logits (B, classes) at `x_adv`, and whatever else `propose` needs, a dict of (B, ...)."""
        raise NotImplementedError

    def propose(self, state, found, iteration):
        """Change `state` so that `x_adv` is the next point; `iteration` (from 0) was the last."""
        raise NotImplementedError

    def run(self, x, y, images, restart, *, seed, batch_size, judge_every=True, progress=None):
        """Attack N images; each falls at the first point where it is not predicted as y (N,).

        Args:
            images: numbers (N,) of the images, which name their random draws.
            judge_every: must be True; here for the same call as PGD's.
            progress: as in `run_restart`.
        """
        if not judge_every:
            raise InputError("only pgd and fgsm can be judged at the last iterate alone")
        run = Run(
            np.empty_like(x), np.empty(len(x), int), np.zeros(len(x), int), np.zeros(len(x), bool)
        )
        sizes = pool_sizes(batch_size)
        for first in range(0, len(x), batch_size):
            at = np.arange(first, min(first + batch_size, len(x)))  # positions in x
            state = self.begin(x[at], y[at], images[at], restart, seed)
            for iteration in range(self.steps + 1):
                size = min(s for s in sizes if s >= len(at))
                seen = state
                if size > len(at):
                    padded = _pad(np.arange(len(at)), size)
                    seen = {name: value[padded] for name, value in state.items()}
                logits, found = self.look(seen)
                if not np.all(np.isfinite(logits)):
                    raise InputError("the model gives NaN or infinite outputs under attack")
                predictions = logits[: len(at)].argmax(axis=-1)
                fell = predictions != y[at]
                leaving = fell | (iteration == self.steps)
                run.fell[at[fell]] = True
                run.iterations[at[leaving]] = iteration
                run.x_adv[at[leaving]] = state["x_adv"][leaving]
                run.predictions[at[leaving]] = predictions[leaving]
                if progress is not None:
                    spared = int(fell.sum()) * (self.steps - iteration)
                    progress(len(at) + spared, int(fell.sum()))
                found = {name: value[: len(at)][~leaving] for name, value in found.items()}
                if leaving.any():
                    state = {name: value[~leaving] for name, value in state.items()}
                    at = at[~leaving]
                if not len(at):
                    break
                self.propose(state, found, iteration)
        return run


class _MinimalPerturbation:
    """ART attacks that look for a small perturbation and know no epsilon: cut to the ball after.

    `iterations` of their runs is the number they were allowed.
    """

    def __init__(self, classifier, *, epsilon, steps):
        self.classifier, self.epsilon, self.steps = classifier, float(epsilon), steps

    def perturbed(self, x, y):
        """ART's x_adv (B, H, W, C) for images x with labels y (B,), not yet in the ball."""
        raise NotImplementedError

    def run(self, x, y, images, restart, *, seed, batch_size, judge_every=True, progress=None):
        """Attack N images, `batch_size` at a time; nothing is random."""
        run = Run(x.copy(), y.copy(), np.full(len(x), self.steps), np.zeros(len(x), bool))
        for first in range(0, len(x), batch_size):
            at = slice(first, first + batch_size)
            x_adv = np.clip(
                self.perturbed(x[at], y[at]), x[at] - self.epsilon, x[at] + self.epsilon
            )
            run.x_adv[at] = np.clip(x_adv, 0.0, 1.0)
            run.predictions[at] = self.classifier.predict(run.x_adv[at], batch_size).argmax(axis=-1)
            run.fell[at] = run.predictions[at] != y[at]
            if progress is not None:
                progress(len(x[at]) * (self.steps + 1), int(run.fell[at].sum()))
        return run


class DeepFool(_MinimalPerturbation):
    """ART's DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599), an L2 attack."""

    def perturbed(self, x, y):
        attack = ArtDeepFool(
            self.classifier,
            max_iter=self.steps,
            nb_grads=self.classifier.nb_classes,
            batch_size=len(x),
            verbose=False,
        )
        return attack.generate(x)


class CarliniWagner(_MinimalPerturbation):
    """ART's L-inf attack of Carlini & Wagner 2017 (arXiv 1608.04644), at tau = epsilon.

    ART lowers tau from 1 until it finds no adversarial example, minutes for an image; whether there
    is one within epsilon needs tau = epsilon alone. The paper also searches the constant c; in ART
    1.20.1 c is no part of the gradient and only says when to stop, so it is 1 here.
    """

    def perturbed(self, x, y):
        attack = CarliniLInfMethod(self.classifier, max_iter=self.steps, verbose=False)
        one_hot = np.eye(self.classifier.nb_classes, dtype="float32")[y]
        x_adv = x.copy()
        for i in range(len(x)):
            x_adv[i] = attack._generate_single(
                x[i : i + 1], one_hot[i : i + 1], 0.0, 1.0, const=1.0, tau=self.epsilon
            )[0]
        return x_adv


def random_start(x, *, epsilon, seed, image, restart):
    """Uniform start in the epsilon-ball around one image x (H, W, C), clipped to [0, 1].

    As in ART (`random_sphere`, norm inf), but from a generator named by (seed, image, restart).
    """
    generator = np.random.default_rng((seed, image, restart))
    delta = generator.uniform(-epsilon, epsilon, x.shape).astype("float32")
    return np.clip(x + delta, 0.0, 1.0)


@dataclass
class Run:
    """What one restart did to N images.

    x_adv (N, H, W, C): where each image fell, else its last iterate; predictions (N,) there;
    iterations (N,): the number of that iterate, 0 being the start; fell (N,) bool.
    """

    x_adv: np.ndarray
    predictions: np.ndarray
    iterations: np.ndarray
    fell: np.ndarray


def run_restart(attack, x, start, targets, *, batch_size, judge_every=True, progress=None):
    """Attack N images once, each from its own start, and say which moved off their target class.

    Args:
        attack: has `step(x_adv, x, targets)`, `max_iter` and `estimator`, e.g. `PGD`.
        x: original images (N, H, W, C), float32 in [0, 1]; left as they are.
        start: function from a position in x to that image's first iterate (H, W, C).
        targets: classes (N,) whose loss is raised; an image falls when it is predicted otherwise.
        judge_every: an image falls at the first iterate (start included) that is misclassified
            and is then left alone; this fells every image that judging the last iterate fells, or
            more. False: only the last iterate is judged, as ART does.
        progress: called after every step with how many image iterations are settled by it (those
            an image need no longer go through included) and how many images fell.
    """
    run = Run(
        np.empty_like(x), np.empty(len(x), int), np.zeros(len(x), int), np.zeros(len(x), bool)
    )
    one_hot = np.eye(attack.estimator.nb_classes, dtype="float32")[targets]
    sizes = pool_sizes(batch_size)
    queue = iter(range(len(x)))
    pool = np.empty(0, int)  # positions in x that are being attacked
    x_adv = np.empty((0, *x.shape[1:]), "float32")
    previous = x_adv  # the iterates before these; NaN, equal to nothing, where there is none
    while True:
        entering = list(islice(queue, batch_size - len(pool)))
        if entering:
            pool = np.append(pool, entering)
            x_adv = np.concatenate([x_adv, np.stack([start(i) for i in entering])])
            none = np.full((len(entering), *x.shape[1:]), np.nan, "float32")
            previous = np.concatenate([previous, none])
        if not len(pool):
            return run
        padded = _pad(np.arange(len(pool)), min(s for s in sizes if s >= len(pool)))
        stepped, logits = attack.step(x_adv[padded], x[pool[padded]], one_hot[pool[padded]])
        if not np.all(np.isfinite(logits)):
            raise InputError("the model gives NaN or infinite outputs under attack; train again")
        predictions = logits[: len(pool)].argmax(axis=-1)

        last = run.iterations[pool] == attack.max_iter
        fell = (predictions != targets[pool]) & (last | judge_every)
        leaving = fell | last
        run.fell[pool[fell]] = True
        run.x_adv[pool[leaving]] = x_adv[leaving]
        run.predictions[pool[leaving]] = predictions[leaving]
        spared = int((attack.max_iter - run.iterations[pool[fell]]).sum())
        settled, fallen = len(pool) + spared, int(fell.sum())

        run.iterations[pool[~leaving]] += 1
        stepped = stepped[: len(pool)][~leaving]
        before, previous = previous[~leaving], x_adv[~leaving]
        pool, x_adv = pool[~leaving], stepped
        skipped = _whole_cycles(before, previous, x_adv, attack.max_iter - run.iterations[pool])
        run.iterations[pool] += skipped
        if progress is not None:
            progress(settled + int(skipped.sum()), fallen)


def _whole_cycles(before, previous, x_adv, left):
    """How many of the iterations `left` (B,) repeat what has been, and can be left out.

    Signed steps of one size inside a box end, after a while, in a fixed point or go to and fro
    between two: an iterate equal to the last or the last but one starts a cycle of 1 or 2, which
    the rest of the run repeats. Whole cycles are left out; what remains ends at the same iterate.
    """
    period = np.zeros(len(x_adv), int)
    for earlier, length in ((before, 2), (previous, 1)):
        is_same = (x_adv == earlier).all(axis=(1, 2, 3))
        period[is_same] = length
    return np.where(period > 0, left - left % np.maximum(period, 1), 0)


def pool_sizes(batch_size):
    """The batch shapes that occur: batch_size and its halves down to an eighth."""
    return sorted({max(1, batch_size // part) for part in (1, 2, 4, 8)})


def _pad(positions, size):
    """`positions` (B,) lengthened to (size,) by repeating the first."""
    return np.concatenate([positions, np.zeros(size - len(positions), int)])


def check_perturbation(x, x_adv, epsilon):
    """Raise if an attack left what it was allowed; return |x_adv - x|_inf per image (N,).

    Allowed: within epsilon + 1e-6, in [0, 1], finite.
    """
    if not np.all(np.isfinite(x_adv)):
        raise RuntimeError("the attack produced NaN or infinite pixels")
    if x_adv.size and (x_adv.min() < 0 or x_adv.max() > 1):
        raise RuntimeError(f"the attack left [0, 1]: {x_adv.min()} to {x_adv.max()}")
    linf = np.abs(x_adv - x).reshape(len(x), -1).max(axis=1, initial=0)
    if len(linf) and linf.max() > epsilon + 1e-6:
        raise RuntimeError(f"the attack left the ball: {linf.max()} > {epsilon}")
    return linf
