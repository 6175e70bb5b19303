"""Trainable activation functions as Keras layers: Kaf and Kwta, activation(name) for all by name.

replace_activations puts them in place of a network's own.

Kaf: Scardapane, Van Vaerenbergh, Totaro & Uncini 2019, "Kafnets: kernel-based non-parametric
activation functions for neural networks" (arXiv 1707.04035). Kwta: Xiao, Zhong & Zheng 2020 (ICLR,
arXiv 1905.10510). Importing this module registers both, so that keras.models.load_model finds them.
"""

import functools
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from kernel_expansion import (
    KERNELS,
    equally_spaced_dictionary,
    gaussian_expansion,
    moving_gaussian_expansion,
    plain_expansion,
    plus,
    ridge_coefficients,
    rule_of_thumb_bandwidth,
)

Function = str | Callable | dict  # an activation as Keras has it: by name, itself, its config
Shape = tuple[int | None, ...]


@keras.saving.register_keras_serializable(package="robust_activations")
class Kaf(keras.layers.Layer):
    """Kernel activation function: one trainable function per channel (the last axis).

        g(x) = base(x) + sum_{i=1..D} alpha_i kappa(x, d_i)

    with D mixing coefficients alpha per channel over a dictionary of D points, equally spaced on
    [-boundary, boundary]. Dense and convolutional inputs are the same case.

    Without a base this is Kafnets, eq. 13, and with the Gaussian kernel g is 0 far outside the
    dictionary. With one, which the KAF literature does not have, g goes on there as its base, and
    starts as exactly that: FastKAN (Li 2024, arXiv 2405.06721) and KAN (Liu et al. 2024, arXiv
    2404.19756, eq. 2.10) add such a base, SiLU, to Gaussian kernels and to splines.

    Parameters and sums are float32 under half precision too (a ridge start has coefficients that
    cancel; in float16 they left noise of 0.1), float64 under the float64 policy.

    Under TensorFlow Keras' `model.export` takes it as it is: to SavedModel, LiteRT and ONNX.

    Args:
        D: number of dictionary points, at least 2.
        ridge: function that g starts as, by a kernel ridge fit on the dictionary: the name of a
            Keras activation ("relu", "elu", "swish", "tanh", ...) or a function that Keras can
            serialise. None: alpha starts from `alpha_initializer`.
        base: function that the kernels are added to, named as for `ridge`; elementwise. None: no
            base. Goes with `moving`, not with `ridge`.
        moving: whether the dictionary (D per channel) and, for the Gaussian kernel, the bandwidth
            (1 per channel, trained as its logarithm) are trained as well. Goes with `ridge`.
        boundary: end of the dictionary, 3 in the thesis reproduced here.
        kernel: "gaussian", or "relu" (a linear spline) and "softplus" of the KAF authors' code.
        bandwidth: gamma of exp(-gamma (x - d)^2). None: 1 / (6 step^2), Kafnets eq. 15; the
            authors' code has 1 / (8 step^2).
        alpha_initializer: used without `ridge`. None: zeros with a base, else "random_normal",
            which has standard deviation 0.05.
        alpha_regularizer, alpha_constraint: of alpha (D, C).

    Input shape: (batch, ..., C), at least rank 2, C known. Output shape: the same.

    Raises:
        ValueError: for settings outside these ranges, or an input whose last axis is unknown.
    """

    def __init__(
        self,
        D: int = 20,
        ridge: Function | None = None,
        base: Function | None = None,
        moving: bool = False,
        boundary: float = 3.0,
        kernel: str = "gaussian",
        bandwidth: float | None = None,
        alpha_initializer: str | keras.Initializer | None = None,
        alpha_regularizer: str | keras.Regularizer | None = None,
        alpha_constraint: str | Callable | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not _is_number(D, numbers.Integral) or D < 2:
            raise ValueError(f"Kaf needs an integer D of at least 2 points; received D={D!r}.")
        if not (_is_number(boundary) and 0 < boundary < np.inf):
            raise ValueError(f"Kaf needs a positive, finite boundary; received {boundary!r}.")
        if not (isinstance(kernel, str) and kernel in KERNELS):
            raise ValueError(f"Kaf knows the kernels {', '.join(KERNELS)}; received {kernel!r}.")
        if bandwidth is not None and (
            kernel != "gaussian" or not (_is_number(bandwidth) and 0 < bandwidth < np.inf)
        ):
            raise ValueError(
                "Kaf's bandwidth must be positive and finite, and goes with the Gaussian kernel; "
                f"received bandwidth={bandwidth!r}, kernel={kernel!r}."
            )
        if not isinstance(moving, bool | np.bool_):
            raise ValueError(f"Kaf's moving is True or False; received {moving!r}.")
        if ridge is not None and base is not None:
            raise ValueError(
                "Kaf takes a base, which the kernels are added to, or a ridge, which they are "
                f"fitted to, not both; received base={base!r}, ridge={ridge!r}."
            )
        self.D = int(D)
        self.ridge = _serialisable_function("ridge", ridge)
        self.base = _serialisable_function("base", base)
        self.moving = bool(moving)
        self.boundary = float(boundary)
        self.kernel = kernel
        self.bandwidth = None if bandwidth is None else float(bandwidth)
        self.alpha_initializer = keras.initializers.get(
            alpha_initializer or ("random_normal" if base is None else "zeros")
        )
        self.alpha_regularizer = keras.regularizers.get(alpha_regularizer)
        self.alpha_constraint = keras.constraints.get(alpha_constraint)
        self.supports_masking = True
        self._initial_gamma = self.bandwidth or rule_of_thumb_bandwidth(self.D, self.boundary)
        # other kernels, and a base, go on outside the dictionary
        self._is_range_checked = kernel != "gaussian" or base is not None
        self._ridge_alpha = None
        if self.ridge is not None:
            self._ridge_alpha = ridge_coefficients(
                self.ridge, self._initial_dictionary, self._initial_gamma, kernel
            )

    @property
    def _initial_dictionary(self):
        return equally_spaced_dictionary(self.D, self.boundary)

    def build(self, input_shape: Shape) -> None:
        channels = input_shape[-1] if len(input_shape) >= 2 else None
        if channels is None:
            raise ValueError(
                "Kaf keeps one function per channel, so the input needs a batch axis and a last "
                f"axis of known size; received input_shape={tuple(input_shape)}. Give the Input "
                "layer a fixed channel count."
            )
        stored = {"dtype": self._sum_dtype, "autocast": False}
        self.alpha = self.add_weight(
            name="alpha",
            shape=(self.D, channels),
            initializer=self.alpha_initializer
            if self._ridge_alpha is None
            else _per_channel(self._ridge_alpha),
            regularizer=self.alpha_regularizer,
            constraint=self.alpha_constraint,
            **stored,
        )
        if self.moving:
            self.dictionary = self.add_weight(
                name="dictionary",
                shape=(self.D, channels),
                initializer=_per_channel(self._initial_dictionary),
                **stored,
            )
            if self.kernel == "gaussian":
                self.log_gamma = self.add_weight(
                    name="log_gamma",
                    shape=(channels,),
                    initializer=keras.initializers.Constant(float(np.log(self._initial_gamma))),
                    **stored,
                )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: channels})
        super().build(input_shape)

    @property
    def gamma(self) -> Any:
        """Bandwidth: a number, or (C,) and positive where it is trained; None without one."""
        if self.kernel != "gaussian":
            return None
        return ops.exp(self.log_gamma) if self.moving else self._initial_gamma

    @property
    def _sum_dtype(self):
        return "float64" if self.compute_dtype == "float64" else "float32"

    def share_outside(self, x: Any) -> float:
        """Share of the values of x (..., C) that lie outside the dictionary; the layer is built."""
        d = ops.convert_to_numpy(self.dictionary) if self.moving else self._initial_dictionary
        x = ops.convert_to_numpy(x)
        return float(np.mean((x < d.min(axis=0)) | (x > d.max(axis=0))))

    def _check_range(self, x):
        """Warn, on the first values that a model hands in outside of a compiled function."""
        if self._is_range_checked or not _is_concrete(x) or not _is_inside_a_model(self):
            return
        self._is_range_checked = True
        share = self.share_outside(x)
        if share > 0.05:
            warnings.warn(
                f"{share:.0%} of the inputs of {self.name!r} lie outside its dictionary, "
                "where a Kaf without a base falls to 0: normalise them, take a larger boundary "
                '(and D), or Kaf(base="relu").',
                stacklevel=2,
            )

    def call(self, inputs: Any) -> Any:
        x = ops.cast(inputs, self._sum_dtype)
        self._check_range(x)
        alpha = ops.convert_to_tensor(self.alpha)
        if self.kernel != "gaussian":
            d = self.dictionary if self.moving else self._initial_dictionary
            d = ops.convert_to_tensor(d, self._sum_dtype)
            # these kernels grow with x: alpha = 0 must be 0 at infinity too
            finite = x if self.base is None else ops.clip(x, -1e30, 1e30)
            y = plus(self.base, x, plain_expansion(finite, alpha, d, None, self.kernel))
        elif self.moving:
            d = ops.convert_to_tensor(self.dictionary)
            y = moving_gaussian_expansion(x, alpha, d, self.gamma, self.base)
        else:
            y = gaussian_expansion(
                x, alpha, boundary=self.boundary, gamma=self.gamma, base=self.base
            )
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return super().from_config(_without_conv(config))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "D": self.D,
            "ridge": None if self.ridge is None else keras.activations.serialize(self.ridge),
            "base": None if self.base is None else keras.activations.serialize(self.base),
            "moving": self.moving,
            "boundary": self.boundary,
            "kernel": self.kernel,
            "bandwidth": self.bandwidth,
            "alpha_initializer": keras.initializers.serialize(self.alpha_initializer),
            "alpha_regularizer": keras.regularizers.serialize(self.alpha_regularizer),
            "alpha_constraint": keras.constraints.serialize(self.alpha_constraint),
        }


def _is_concrete(x):
    """Whether x holds numbers now, rather than standing for some in a graph."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return hasattr(x, "numpy")
    if backend == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer)
    import torch

    return not (x.is_meta or torch.compiler.is_compiling())


def _is_inside_a_model(layer):
    """Whether a model called it, not the user: a plot, say, may well look far out."""
    return layer._get_call_context().entry_layer is not layer


def _without_conv(config):
    """A config as it is now; older ones hold `conv`, which never had an effect."""
    return {name: value for name, value in config.items() if name != "conv"}


def _is_number(value, kind=numbers.Real):
    """Of Python or NumPy; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _serialisable_function(argument, function):
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
            f"Kaf's {argument} must be a function that can be saved: a Keras activation's name, or "
            "a function registered with keras.saving.register_keras_serializable; "
            f"received {function!r}{reason}."
        )
    return function


def _per_channel(values):
    """Initializer that gives every channel the same column `values` (D,)."""

    def initializer(shape, dtype=None):
        return ops.convert_to_tensor(np.broadcast_to(values[:, None], shape).copy(), dtype)

    return initializer


def kth_largest(x: Any, k: Any) -> Any:
    """The k-th largest value of each row; (B, 1) of x (B, size), for a scalar k in 1..size.

    By bisection until no other floating-point number lies between the bounds, hence exact: passes
    that only compare and count take less time than sorting the rows.
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

    def __init__(self, ratio: float = 0.2, data_format: str = "channels_last", **kwargs: Any):
        super().__init__(**kwargs)
        if not (_is_number(ratio) and 0 < ratio <= 1):
            raise ValueError(f"Kwta's ratio is a fraction in (0, 1]; received {ratio!r}.")
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format is 'channels_last' or 'channels_first'; received {data_format!r}."
            )
        self.initial_ratio = float(ratio)
        self.data_format = data_format
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        self.ratio = self.add_weight(
            name="ratio",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_ratio),
            trainable=False,
            autocast=False,
            dtype="float32",
        )
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
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

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return super().from_config(_without_conv(config))

    def get_config(self) -> dict[str, Any]:
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

    def __init__(self, step: float = 0.01, every: int = 2, final: float = 0.15, start: int = 0):
        super().__init__()
        if step <= 0 or every < 1 or not 0 < final <= 1:
            raise ValueError(
                "AnnealKwta needs step > 0, every >= 1 and final in (0, 1]; "
                f"received step={step}, every={every}, final={final}."
            )
        self.step, self.every, self.final, self.start = step, every, final, start

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.layers = [layer for layer in self.model._flatten_layers() if isinstance(layer, Kwta)]

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
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
    "kaf_on_relu": lambda: Kaf(base="relu"),
    "kaf_on_elu": lambda: Kaf(base="elu"),
    "kaf_on_swish": lambda: Kaf(base="swish"),
    "kwta": lambda: Kwta(),
}


def activation(name: str) -> keras.layers.Layer:
    """A fresh layer for each name in this study's tables: relu, elu, swish, kaf, kaf_relu, ...

    Raises:
        ValueError: for an unknown name; it lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {name!r}. Choose one of: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


def kaf_layers(model: keras.Model) -> list[Kaf]:
    """All Kaf layers of a model, those of models within it too, first to last."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, Kaf)]


# Layers whose `activation` is the last thing they do
ENDING_IN_ACTIVATION = (
    *(keras.layers.Dense, keras.layers.EinsumDense),
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
    *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
    *(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D),
)


def replace_activations(
    model: keras.Model,
    to: str | Callable[[Callable], keras.layers.Layer],
    exchanged: Sequence[str | Callable] = ("relu", "elu", "swish", "gelu"),
) -> keras.Model:
    """A copy of `model`, weights included, with its activations exchanged.

    Layers that are an activation (Activation, ReLU, ELU) are exchanged, and so is the `activation`
    of dense and convolutional layers, which becomes a layer behind them; in nested models too.
    Activations inside recurrent, attention and wrapping layers stay.

        replace_activations(model, lambda function: Kaf(base=function))

    computes what `model` does until it is trained; `Kaf(ridge=function)` does so within its
    dictionary only.

    Args:
        model: functional or built Sequential, channels last.
        to: a name that `activation` knows, or a function that takes the activation exchanged (a
            function) and returns a new layer.
        exchanged: Keras activations, by name or themselves.

    Raises:
        ValueError: where there is nothing to exchange, or `model` is of another kind.
    """
    make = (lambda function: activation(to)) if isinstance(to, str) else to
    exchange = _Exchange(make, [keras.activations.get(name) for name in exchanged])
    result = exchange.copy_of_model(model)
    if not exchange.count:
        raise ValueError(
            f"{model.name!r} has none of the activations {', '.join(map(str, exchanged))}, as "
            "layers or as arguments of dense and convolutional layers; `exchanged` names others."
        )
    return result


class _Exchange:
    """Copies layers and models, with layers that `make` returns for the activation `functions`."""

    def __init__(self, make, functions):
        self.make, self.functions, self.count = make, functions, 0

    def copy_of_model(self, model):
        copies_of = functools.cache(self._copies)
        followers = {}

        def first_copy(layer):
            first, *followers[id(first)] = copies_of(layer)
            return first

        def call(first, *args, **kwargs):
            outputs = first(*args, **kwargs)
            for follower in followers[id(first)]:
                outputs = follower(outputs)
            return outputs

        if isinstance(model, keras.Sequential) and model.built:
            x = keras.Input(batch_shape=model.inputs[0].shape, dtype=model.inputs[0].dtype)
            layers = [copy for layer in model.layers for copy in copies_of(layer)]
            result = keras.Sequential([x, *layers], name=model.name, trainable=model.trainable)
            if model.compiled:
                result.compile_from_config(model.get_compile_config())
        elif not isinstance(model, keras.Sequential) and getattr(model, "outputs", None):
            result = keras.models.clone_model(model, clone_function=first_copy, call_function=call)
        else:
            raise ValueError(
                "replace_activations sees the layers of functional and of built Sequential models; "
                f"received {model!r}. A Sequential is built by an Input or by its first call."
            )
        for layer in model.layers:
            first = copies_of(layer)[0]
            if type(first) is type(layer) and not isinstance(layer, keras.Model):
                first.set_weights(layer.get_weights())
                if hasattr(first, "finalize_state"):  # Normalization computes with a copy
                    first.finalize_state()
        return result

    def _copies(self, layer):
        """What takes the place of a layer: its copy, a new activation, or both in turn."""
        if isinstance(layer, keras.Model):
            return [self.copy_of_model(layer)]
        function = _last_activation(layer)
        if function not in self.functions:
            return [type(layer).from_config(layer.get_config())]
        self.count += 1
        new = self.make(function)
        if not isinstance(new, keras.layers.Layer):
            raise ValueError(
                f"replace_activations needs a function that returns a Keras layer; got {new!r}."
            )
        new.dtype_policy, new.trainable = layer.dtype_policy, layer.trainable
        if not isinstance(layer, ENDING_IN_ACTIVATION):
            new.name = layer.name
            return [new]
        new.name = f"{layer.name}_activation"
        return [type(layer).from_config({**layer.get_config(), "activation": "linear"}), new]


def _last_activation(layer):
    """The activation function that a layer is or ends in; None for other layers."""
    if isinstance(layer, (keras.layers.Activation, *ENDING_IN_ACTIVATION)):
        return layer.activation
    config = layer.get_config()
    if type(layer) is keras.layers.ELU and config["alpha"] == 1:
        return keras.activations.elu
    bends = [config.get(name) for name in ("max_value", "negative_slope", "threshold")]
    if type(layer) is keras.layers.ReLU and not any(bends[1:]):
        return {None: keras.activations.relu, 6: keras.activations.relu6}.get(bends[0])
    return None
