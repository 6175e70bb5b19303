"""A classifier as the attacks see it: compiled logits, and gradients of losses of the logits.

One compiled function gives the gradient in the images alone (not in the weights) and, from the same
forward pass, the logits: they tell which images have fallen without a prediction of their own.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from kaf_study import InputError


def cross_entropy(logits: tf.Tensor, y: tf.Tensor, *_) -> tf.Tensor:
    """(B,): of the labels y (B,), logits (B, classes)."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)


def logit(logits: tf.Tensor, of: tf.Tensor) -> tf.Tensor:
    """(B,): the logit of one class each, `of` (B,)."""
    return tf.gather(logits, of, batch_dims=1)


def logit_difference(logits: tf.Tensor, y: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """(B,): z_target - z_y, positive where the target is ahead of the label."""
    return logit(logits, target) - logit(logits, y)


def likeliest_other(logits: np.ndarray, y: np.ndarray, rank: int = 1) -> np.ndarray:
    """The class (B,) that is `rank`-th likeliest (from 1) of those other than y (B,)."""
    others = logits.copy()
    others[np.arange(len(y)), y] = -np.inf
    return np.argsort(-others, axis=-1, kind="stable")[:, rank - 1]


FEW = 8  # images that are not worth cutting in two


def in_halves(function: Callable, *signature: tf.TensorSpec) -> Callable:
    """A compiled function of batches, called on either half of one: the two at the same time.

    One operation on a batch keeps several cores busy for part of its time only; two halves go side
    by side through all of them. A GPU gets the batch whole.

    Args:
        function: of tensors (B, ...), returns one or a list of them, or of None.
        signature: what `function` takes.
    """

    @tf.function(input_signature=signature)
    def both(*batch):
        half = tf.shape(batch[0])[0] // 2
        first, second = (
            function(*[t[part] for t in batch]) for part in (slice(half), slice(half, None))
        )
        return tf.nest.map_structure(
            lambda *parts: None if parts[0] is None else tf.concat(parts, 0), first, second
        )

    # Traced by a call, one for each attack of a suite would be warned of by TensorFlow.
    traced = functools.cache(both.get_concrete_function)

    def of_any_size(*batch):
        return (function if len(batch[0]) <= FEW else traced())(*batch)

    return function if tf.config.list_physical_devices("GPU") else of_any_size


class CompiledClassifier:
    """A model of logits, compiled, in inference mode, images in [0, 1].

    Losses are summed over images, not averaged: an image's gradient then does not depend on how
    many others are in the batch.

    Args:
        model: Keras model, or callable f(x, training=False), giving logits.
        classes: how many logits it gives.
        input_shape: (H, W, C) of its images.
        given: the model that `model` is a twin of, if it is one.

    Attributes:
        gradient_calls: how many gradients were computed, in batches.
    """

    def __init__(
        self,
        model: Callable,
        classes: int,
        input_shape: tuple[int, ...],
        *,
        given: Callable | None = None,
    ):
        self.model, self.classes = model, classes
        self.given = model if given is None else given
        self.gradient_calls = 0
        self._graphs: dict[tuple[Callable, int], Callable] = {}
        self._images = tf.TensorSpec((None, *input_shape), tf.float32)

        @tf.function(input_signature=[self._images])
        def logits(x):
            return tf.cast(model(x, training=False), tf.float32)

        self._logits = logits
        self._logits_in_halves = in_halves(logits, self._images)

    @functools.cached_property
    def is_compiled_by_shape(self) -> bool:
        """Whether XLA compiles some of the model, as it does KAFs: anew for each batch size."""
        graph = self._logits.get_concrete_function().graph.as_graph_def()
        return any("_XlaMustCompile" in function.attr for function in graph.library.function)

    def predict(self, x: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """Logits (N, classes) of images (N, H, W, C), `batch_size` at a time."""
        chunks = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
        logits_of = self._logits_in_halves
        return np.concatenate([logits_of(tf.constant(c, tf.float32)).numpy() for c in chunks])

    def predict_as_given(self, x: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """`predict` by the model that was given, as it is: neither its twin nor compiled."""
        chunks = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
        return np.concatenate(
            [np.asarray(self.given(tf.constant(c, tf.float32), training=False)) for c in chunks]
        )

    def differentiable(self, loss: Callable) -> Callable[..., list[np.ndarray]]:
        """A loss of the logits, compiled once, for use on batches; a call counts as a gradient.

        Args:
            loss: function (logits (B, classes), *labels (B,) int) -> (B,).

        Returns:
            Function (x (B, H, W, C), *labels) -> loss (B,), logits (B, classes), and the gradient
            of the summed loss in x, NumPy arrays. Where the gradient is NaN it is 0, as in ART: a
            pixel that gives no direction is left where it is.
        """

        def loss_logits_gradient(x, *labels):
            *values, gradient = self._differentiated(loss, x, *labels)
            return [*values, np.nan_to_num(gradient, nan=0.0)]

        return loss_logits_gradient

    def _differentiated(self, loss, x, *labels):
        """What a function made by `differentiable` returns, the gradient as the model gives it."""
        self.gradient_calls += 1
        labels = [tf.constant(label, tf.int32) for label in labels]
        found = self._traced(loss, len(labels))(tf.constant(x, tf.float32), *labels)
        if found[-1] is None:
            raise InputError(
                "no gradient passes from the model's outputs to its images, so it cannot be "
                "attacked by gradients; give a differentiable version of it"
            )
        return [v.numpy() for v in found]

    def _traced(self, loss, labels):
        """The graph of a loss with so many labels: one for all batch sizes."""
        if (loss, labels) not in self._graphs:
            signature = [self._images, *[tf.TensorSpec((None,), tf.int32)] * labels]

            @tf.function(input_signature=signature)
            def graph(x, *labels):
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(x)
                    logits = tf.cast(self.model(x, training=False), tf.float32)
                    losses = loss(logits, *labels)
                return losses, logits, tape.gradient(losses, x)

            self._graphs[loss, labels] = in_halves(graph, *signature)
        return self._graphs[loss, labels]

    def class_gradients(self, x: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Gradients in x (B, H, W, C) of the logits `classes` (B, K) int: (B, K, H, W, C)."""
        gradient_of = self.differentiable(logit)
        return np.stack([gradient_of(x, of)[2] for of in classes.T], axis=1)

    def check_gradient(self, x: np.ndarray, y: np.ndarray) -> None:
        """Refuse a model through which no gradient passes, with the reason. x (B, ...), y (B,)."""
        try:
            *_, gradient = self._differentiated(cross_entropy, x, y)
        except InputError:
            raise
        except (LookupError, ValueError, TypeError) as error:
            raise InputError(
                "the model was saved without gradient information (probably a custom gradient "
                f"that older TensorFlow did not save: {' '.join(str(error).split())[:120]}); "
                "give the model's .keras or .h5 file"
            ) from None
        if not np.all(np.isfinite(gradient)):
            raise InputError("the model's gradient in its images has NaN or infinite values")
