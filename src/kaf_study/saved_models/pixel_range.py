"""The pixel range a model was trained on, where it is not [0, 1].

Attacks see images in [0, 1], and epsilon is in those; a model of another range gets them rescaled.
A wrong range says nothing: the network is merely worse. So on loading its clean accuracy is held
against what the common ranges would give.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kaf_study import InputError
from kaf_study.saved_models.graphs import Graph

N = 200  # images on which ranges are compared
MUCH_BETTER = 0.05  # in accuracy, beside 3 standard errors of the paired difference

NUMBERS = r"-?[\d.]+(?:,-?[\d.]+)*"


@dataclass(frozen=True)
class PixelRange:
    """x in [0, 1] -> scale * x + offset, per channel (or one number for all)."""

    name: str  # as it is given to --input
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "PixelRange":
        """Of "0..1", "0..255", "-1..1", or "mean=R,G,B,std=R,G,B": (x - mean) / std.

        A mean above 1 is one of pixels in 0..255, and so is its std.
        """
        if text in PLAIN:
            return cls(text, *PLAIN[text])
        match = re.fullmatch(f"mean=({NUMBERS}),std=({NUMBERS})", text.replace(" ", ""))
        try:
            numbers = [np.array(group.split(","), float) for group in match.groups()]  # type: ignore
            mean, std = np.broadcast_arrays(*numbers)
        except (AttributeError, ValueError):
            raise InputError(
                "--input expects 0..1, 0..255, -1..1 or mean=R,G,B,std=R,G,B (one number each, or "
                f"one per channel); got {text!r}"
            ) from None
        if not np.all(std > 0):
            raise InputError(f"--input expects a std above 0; got {text!r}")
        unit = 255 if mean.max() > 1 else 1
        return cls(text, tuple(unit / std), tuple(-mean / std))


PLAIN = {"0..1": ((1.0,), (0.0,)), "0..255": ((255.0,), (0.0,)), "-1..1": ((2.0,), (-1.0,))}
COMMON = (
    *PLAIN,
    "mean=0.4914,0.4822,0.4465,std=0.2470,0.2435,0.2616",  # CIFAR-10's own
    "mean=0.4914,0.4822,0.4465,std=0.2023,0.1994,0.2010",  # a wide-spread miscalculation of it
    "mean=0.485,0.456,0.406,std=0.229,0.224,0.225",  # ImageNet's
    "mean=0.4914,0.4822,0.4465,std=1",  # the mean alone, as in Keras' ResNet example
)


@dataclass(frozen=True)
class Rescaled:
    """A model that is given images in [0, 1] in the range it was trained on."""

    model: Callable
    range: PixelRange

    def __call__(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.model(self.pixels(x), training=training)

    def pixels(self, x: tf.Tensor) -> tf.Tensor:
        """Images in [0, 1] (B, H, W, C) in the model's own range."""
        if len(self.range.scale) not in (1, x.shape[-1]):
            raise InputError(
                f"--input {self.range.name} has {len(self.range.scale)} channels, the images "
                f"have {x.shape[-1]}"
            )
        return x * tf.constant(self.range.scale, x.dtype) + tf.constant(self.range.offset, x.dtype)

    @property
    def input_shape(self) -> tuple[int | None, ...] | None:
        return getattr(self.model, "input_shape", None)


def refuse_other_range(path: Path, model: Callable, x: np.ndarray, y: np.ndarray) -> None:
    """Refuse a model that another of the common ranges fits much better than [0, 1].

    Args:
        path: of the model, for the message.
        model: f(x, training=False), fed with [0, 1]. One that cannot be called on such images is
            left to the evaluation, which says why.
        x: images (N, H, W, C) in [0, 1]; the first 200 are looked at. y: true labels (N,).
    """
    x, y = x[:N], y[:N]
    try:
        found = {name: _correct(model, name, x, y) for name in COMMON}
    except Exception:  # whatever a foreign model raises
        return
    as_fed = found.pop("0..1")
    best = max(found, key=lambda name: found[name].sum())
    gained, lost = (int((a & ~b).sum()) for a, b in ((found[best], as_fed), (as_fed, found[best])))
    is_better = gained - lost > max(MUCH_BETTER * len(x), 3 * np.sqrt(gained + lost))
    reason = ""
    if has_rescaling(model) and found["0..255"].sum() > as_fed.sum():
        best, is_better, reason = "0..255", True, "has a Rescaling(1/255) inside and "
    if is_better:
        raise InputError(
            f"{str(path)!r} {reason}classifies {found[best].mean():.1%} of {len(x)} images "
            f"correctly when fed with {best}, {as_fed.mean():.1%} with 0..1: give --input={best}, "
            "or --input=0..1 if that is what it was trained on"
        )


def _correct(model, name, x, y):
    """Which images (N,) are classified correctly when fed in a range."""
    outputs = Rescaled(model, PixelRange.parse(name))(tf.constant(x), training=False)
    return np.asarray(outputs).argmax(axis=-1) == y


def has_rescaling(model: Callable) -> bool:
    """Whether a Keras model or a graph brings pixels of 0..255 into its own range by itself."""
    scales: list = []
    if isinstance(model, keras.Model):
        layers = model._flatten_layers()
        scales = [layer.scale for layer in layers if isinstance(layer, keras.layers.Rescaling)]
    elif isinstance(model, Graph):
        scales = model.factors
    return any(np.allclose(scale, known) for scale in scales for known in (1 / 255, 2 / 255))
