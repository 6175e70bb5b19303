"""Trainable activation functions as Keras layers: Kaf and Kwta, and activation(name) for all.

Kaf: Scardapane, Van Vaerenbergh, Totaro & Uncini 2019, "Kafnets: kernel-based non-parametric
activation functions for neural networks" (arXiv 1707.04035). Kwta: Xiao, Zhong & Zheng 2020 (ICLR,
arXiv 1905.10510). Importing this module registers both, so that keras.models.load_model finds them.
"""

import keras
import numpy as np
from keras import ops

from kernel_expansion import (
    KERNELS,
    equally_spaced_dictionary,
    gaussian_expansion,
    moving_gaussian_expansion,
    plain_expansion,
    ridge_coefficients,
    rule_of_thumb_bandwidth,
)


@keras.saving.register_keras_serializable(package="robust_activations")
class Kaf(keras.layers.Layer):
    """Kernel activation function: one trainable function per channel (the last axis).

        g(x) = sum_{i=1..D} alpha_i kappa(x, d_i)

    (Kafnets, eq. 13), with D mixing coefficients alpha per channel over a dictionary of D points,
    equally spaced on [-boundary, boundary]. Dense and convolutional inputs are the same case.

    The sum runs in float32 under mixed precision too (a ridge start has coefficients that cancel;
    in float16 they left noise of 0.1), in float64 under the float64 policy. With the Gaussian
    kernel, g is 0 far outside the dictionary.

    Args:
        D: number of dictionary points, at least 2.
        ridge: function that g starts as, by a kernel ridge fit on the dictionary: the name of a
            Keras activation ("relu", "elu", "swish", "tanh", ...) or a function that Keras can
            serialise. None: alpha starts from `alpha_initializer`.
        moving: whether the dictionary (D per channel) and, for the Gaussian kernel, the bandwidth
            (1 per channel, trained as its logarithm) are trained as well. Goes with `ridge`.
        boundary: end of the dictionary, 3 in the thesis reproduced here.
        kernel: "gaussian", or "relu" (a linear spline) and "softplus" of the KAF authors' code.
        bandwidth: gamma of exp(-gamma (x - d)^2). None: 1 / (6 step^2), Kafnets eq. 15; the
            authors' code has 1 / (8 step^2).
        alpha_initializer: used without `ridge`; "random_normal" has standard deviation 0.05.
        alpha_regularizer, alpha_constraint: of alpha (D, C).

    Input shape: (batch, ..., C), at least rank 2, C known. Output shape: the same.

    Raises:
        ValueError: for settings outside these ranges, or an input whose last axis is unknown.
    """

    def __init__(
        self,
        D=20,
        ridge=None,
        moving=False,
        boundary=3.0,
        kernel="gaussian",
        bandwidth=None,
        alpha_initializer="random_normal",
        alpha_regularizer=None,
        alpha_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(D, int | np.integer) or D < 2:
            raise ValueError(f"Kaf needs an integer D of at least 2 points; received D={D!r}.")
        if not 0 < boundary < np.inf:
            raise ValueError(f"Kaf needs a positive, finite boundary; received {boundary!r}.")
        if kernel not in KERNELS:
            raise ValueError(f"Kaf knows the kernels {', '.join(KERNELS)}; received {kernel!r}.")
        if bandwidth is not None and (kernel != "gaussian" or not 0 < bandwidth < np.inf):
            raise ValueError(
                "Kaf's bandwidth must be positive and finite, and goes with the Gaussian kernel; "
                f"received bandwidth={bandwidth!r}, kernel={kernel!r}."
            )
        self.D = int(D)
        self.ridge = _serialisable_function(ridge)
        self.moving = bool(moving)
        self.boundary = float(boundary)
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.alpha_initializer = keras.initializers.get(alpha_initializer)
        self.alpha_regularizer = keras.regularizers.get(alpha_regularizer)
        self.alpha_constraint = keras.constraints.get(alpha_constraint)
        self.supports_masking = True
        self._initial_gamma = (
            float(bandwidth) if bandwidth else rule_of_thumb_bandwidth(self.D, self.boundary)
        )
        self._ridge_alpha = None
        if self.ridge is not None:
            self._ridge_alpha = ridge_coefficients(
                self.ridge, self._initial_dictionary, self._initial_gamma, kernel
            )

    @property
    def _initial_dictionary(self):
        return equally_spaced_dictionary(self.D, self.boundary)

    def build(self, input_shape):
        channels = input_shape[-1] if len(input_shape) >= 2 else None
        if channels is None:
            raise ValueError(
                "Kaf keeps one function per channel, so the input needs a batch axis and a last "
                f"axis of known size; received input_shape={tuple(input_shape)}. Give the Input "
                "layer a fixed channel count."
            )
        self.alpha = self.add_weight(
            name="alpha",
            shape=(self.D, channels),
            initializer=self.alpha_initializer
            if self._ridge_alpha is None
            else _per_channel(self._ridge_alpha),
            regularizer=self.alpha_regularizer,
            constraint=self.alpha_constraint,
            autocast=False,
        )
        if self.moving:
            self.dictionary = self.add_weight(
                name="dictionary",
                shape=(self.D, channels),
                initializer=_per_channel(self._initial_dictionary),
                autocast=False,
            )
            if self.kernel == "gaussian":
                self.log_gamma = self.add_weight(
                    name="log_gamma",
                    shape=(channels,),
                    initializer=keras.initializers.Constant(float(np.log(self._initial_gamma))),
                    autocast=False,
                )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: channels})
        super().build(input_shape)

    @property
    def gamma(self):
        """Bandwidth: a number, or (C,) and positive where it is trained; None without one."""
        if self.kernel != "gaussian":
            return None
        return ops.exp(self.log_gamma) if self.moving else self._initial_gamma

    def call(self, inputs):
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        x = ops.cast(inputs, dtype)
        alpha = ops.convert_to_tensor(self.alpha)
        if self.kernel != "gaussian":
            d = self.dictionary if self.moving else self._initial_dictionary
            y = plain_expansion(x, alpha, ops.convert_to_tensor(d, dtype), None, self.kernel)
        elif self.moving:
            d = ops.convert_to_tensor(self.dictionary)
            y = moving_gaussian_expansion(x, alpha, d, self.gamma)
        else:
            y = gaussian_expansion(x, alpha, boundary=self.boundary, gamma=self.gamma)
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    @classmethod
    def from_config(cls, config):
        return super().from_config(_without_conv(config))

    def get_config(self):
        return {
            **super().get_config(),
            "D": self.D,
            "ridge": None if self.ridge is None else keras.activations.serialize(self.ridge),
            "moving": self.moving,
            "boundary": self.boundary,
            "kernel": self.kernel,
            "bandwidth": self.bandwidth,
            "alpha_initializer": keras.initializers.serialize(self.alpha_initializer),
            "alpha_regularizer": keras.regularizers.serialize(self.alpha_regularizer),
            "alpha_constraint": keras.constraints.serialize(self.alpha_constraint),
        }


def _without_conv(config):
    """A config as it is now; older ones hold `conv`, which never had an effect."""
    return {name: value for name, value in config.items() if name != "conv"}


def _serialisable_function(function):
    """An activation by name, config or itself; refused unless Keras can save and load it."""
    if function is None:
        return None
    try:
        function = keras.activations.get(function)
        restored = keras.activations.get(keras.activations.serialize(function))
    except Exception as error:
        restored, reason = None, f" ({' '.join(str(error).split())[:120]})"
    else:
        reason = ""
    if restored is not function:
        raise ValueError(
            "Kaf's ridge must be a function that can be saved: a Keras activation's name, or a "
            "function registered with keras.saving.register_keras_serializable; "
            f"received {function!r}{reason}."
        )
    return function


def _per_channel(values):
    """Initializer that gives every channel the same column `values` (D,)."""

    def initializer(shape, dtype=None):
        return ops.convert_to_tensor(np.broadcast_to(values[:, None], shape).copy(), dtype)

    return initializer


def kth_largest(x, k):
    """The k-th largest value of each row; (B, 1) of x (B, size), for a scalar k in 1..size.

    By bisection until no other floating-point number lies between the bounds, hence exact. Some 30
    to 40 passes that only compare and count: on a CPU a quarter of the time of sorting the rows.
    A row with NaN or infinite values may get any threshold.
    """

    def number_from(threshold):
        return ops.sum(ops.cast(x >= threshold, "int32"), axis=-1, keepdims=True)

    def midpoint(low, high):
        return 0.5 * low + 0.5 * high

    def is_open(low, high):
        middle = midpoint(low, high)
        return ops.any(ops.logical_and(low < middle, middle < high))

    def halve(low, high):
        middle = midpoint(low, high)
        is_enough = number_from(middle) >= k
        return ops.where(is_enough, middle, low), ops.where(is_enough, high, middle)

    least, most = ops.min(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)
    # At least k values are >= low, and fewer than k are >= high, unless k equal the largest.
    low, _ = ops.while_loop(is_open, halve, (least, most))
    return ops.where(number_from(most) >= k, most, low)


@keras.saving.register_keras_serializable(package="robust_activations")
class Kwta(keras.layers.Layer):
    """k-winners-take-all: keeps the k = ceil(ratio * size) largest values of an example.

    Over the whole layer (all of C x H x W), each value in its place; the rest becomes 0. Exactly k
    values are kept: of equal ones, the first. Xiao, Zhong & Zheng 2020 (arXiv 1905.10510).

    Broken as a defence, and here as a cautionary baseline only: it masks gradients. Tramer,
    Carlini, Brendel & Madry 2020 ("On adaptive attacks to adversarial example defenses") take it to
    0.16 % by an adaptive attack; RobustBench lists 18.5 % under AutoAttack.

    Args:
        ratio: fraction kept, in (0, 1]. Kept as a non-trainable weight, which is saved;
            `AnnealKwta` lowers it during training.
        data_format: accepted and checked; the winners are the same in either order.
    """

    def __init__(self, ratio=0.2, data_format="channels_last", **kwargs):
        super().__init__(**kwargs)
        if not 0 < ratio <= 1:
            raise ValueError(f"Kwta's ratio is a fraction in (0, 1]; received {ratio!r}.")
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format is 'channels_last' or 'channels_first'; received {data_format!r}."
            )
        self.initial_ratio = float(ratio)
        self.data_format = data_format
        self.supports_masking = True

    def build(self, input_shape):
        self.ratio = self.add_weight(
            name="ratio",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_ratio),
            trainable=False,
            autocast=False,
            dtype="float32",
        )
        super().build(input_shape)

    def call(self, inputs):
        x = ops.reshape(inputs, (ops.shape(inputs)[0], -1))  # (B, size)
        size = ops.cast(ops.shape(x)[-1], "float32")
        # 0.15 * 100 is 15.000001 in float32 and must count as 15.
        k = ops.cast(ops.ceil(ops.convert_to_tensor(self.ratio) * size * (1 - 1e-6)), "int32")
        threshold = kth_largest(ops.stop_gradient(x), k)  # (B, 1)
        is_above = x > threshold
        is_tied = ops.equal(x, threshold)
        places_left = k - ops.sum(ops.cast(is_above, "int32"), axis=-1, keepdims=True)
        place = ops.cumsum(ops.cast(is_tied, "int32"), axis=-1)
        is_winner = ops.logical_or(is_above, ops.logical_and(is_tied, place <= places_left))
        is_kept = ops.logical_or(is_winner, ops.isnan(x))  # a diverged network shall show
        return ops.reshape(ops.where(is_kept, x, ops.zeros_like(x)), ops.shape(inputs))

    def compute_output_shape(self, input_shape):
        return input_shape

    @classmethod
    def from_config(cls, config):
        return super().from_config(_without_conv(config))

    def get_config(self):
        return {
            **super().get_config(),
            "ratio": self.initial_ratio,
            "data_format": self.data_format,
        }


class AnnealKwta(keras.callbacks.Callback):
    """Lowers the ratio of every Kwta layer: by `step` every `every` epochs, down to `final`.

    Xiao et al. train at 0.30, then fine-tune with the ratio lowered by 0.01 every second epoch to
    0.15. Give `start` the epoch at which the fine-tuning begins.
    """

    def __init__(self, step=0.01, every=2, final=0.15, start=0):
        super().__init__()
        if step <= 0 or every < 1 or not 0 < final <= 1:
            raise ValueError(
                "AnnealKwta needs step > 0, every >= 1 and final in (0, 1]; "
                f"received step={step}, every={every}, final={final}."
            )
        self.step, self.every, self.final, self.start = step, every, final, start

    def on_train_begin(self, logs=None):
        self.layers = [layer for layer in self.model._flatten_layers() if isinstance(layer, Kwta)]

    def on_epoch_begin(self, epoch, logs=None):
        if epoch > self.start and (epoch - self.start) % self.every == 0:
            for layer in self.layers:
                ratio = float(ops.convert_to_numpy(layer.ratio))
                layer.ratio.assign(max(ratio - self.step, min(self.final, ratio)))


ACTIVATIONS = {
    "relu": lambda: keras.layers.Activation("relu"),
    "elu": lambda: keras.layers.Activation("elu"),
    "swish": lambda: keras.layers.Activation("swish"),
    "kaf": lambda: Kaf(),
    "kaf_relu": lambda: Kaf(ridge="relu"),
    "kaf_elu": lambda: Kaf(ridge="elu"),
    "kaf_swish": lambda: Kaf(ridge="swish"),
    "kaf_free": lambda: Kaf(moving=True),
    "kwta": lambda: Kwta(),
}


def activation(name):
    """A fresh layer for each name in this study's tables: relu, elu, swish, kaf, kaf_relu, ...

    Raises:
        ValueError: for an unknown name; it lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}. Choose one of: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()
