"""The networks of the study: from an activation to a plain Keras model of logits.

light_cnn and vgg are small VGG-like networks (Simonyan & Zisserman 2015) with batch normalisation;
resnet is the CIFAR variant of He, Zhang, Ren & Sun 2016 (section 4.2), depth 6n + 2. All of them
take images in [0, 1] as they are and return logits, without a softmax: attacks need the logits.

Convolution, batch normalisation, activation come in this order everywhere, and every convolution
keeps its bias (redundant before batch normalisation, but part of the parameter counts reproduced).
"""

import re
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from activationsf import activation as activation_by_name
from kaf_study import InputError

MOST_DEPTH = 1202  # of a resnet: the deepest of He et al. 2016
DENSE_L2 = 0.0012  # light_cnn and vgg: on the dense kernels only

Activation = str | Callable[[], keras.layers.Layer]


def light_cnn(
    activation: Activation, input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10
) -> keras.Model:
    """Two convolution blocks and a small head; 75,946 parameters with a fixed activation."""
    act = _activation_factory(activation)
    inputs = keras.Input(input_shape)
    x = _conv_block(inputs, 32, act, dropout=0.2)
    x = _conv_block(x, 64, act, dropout=0.3)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = _dense_head(x, act, classes)
    return keras.Model(inputs, outputs, name="light_cnn")


def vgg(
    activation: Activation, input_shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10
) -> keras.Model:
    """Three convolution blocks and a dense layer on the flattened features."""
    act = _activation_factory(activation)
    inputs = keras.Input(input_shape)
    x = _conv_block(inputs, 32, act, dropout=0.2)
    x = _conv_block(x, 64, act, dropout=0.25)
    x = _conv_block(x, 128, act, dropout=0.3)
    x = layers.Flatten()(x)
    outputs = _dense_head(x, act, classes)
    return keras.Model(inputs, outputs, name="vgg")


def resnet(
    activation: Activation,
    depth: int = 20,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    classes: int = 10,
    *,
    l2: float = 5e-4,
    kernel_initializer: str = "glorot_uniform",
) -> keras.Model:
    """ResNet for 32x32 images: 3 stages of n blocks, depth = 6n + 2.

    He et al. 2016, except that the skip into stages 2 and 3 is a 3x3 convolution of stride 2 (the
    paper pads with zeros, or projects by a 1x1 convolution). ResNet20: 294,922 parameters with a
    fixed activation; ResNet56: 882,250.

    Args:
        depth: 6n + 2: 8, 14, 20, 26, 32, ..., 56, ...
        l2: coefficient of Keras' l2 (no factor 1/2) on every kernel, the dense one included; 0 for
            none.
        kernel_initializer: of the convolutions; the dense kernel starts from he_normal.
    """
    blocks = _blocks(depth)
    act = _activation_factory(activation)
    regularizer = keras.regularizers.L2(l2) if l2 else None

    like_all = {
        "kernel_size": 3,
        "padding": "same",
        "kernel_initializer": kernel_initializer,
        "kernel_regularizer": regularizer,
    }

    def conv(x, filters, strides=1):
        return layers.Conv2D(filters, strides=strides, **like_all)(x)

    def batch_norm(x):
        return layers.BatchNormalization()(x)

    def block(x, filters, strides):
        skip = x if strides == 1 else conv(x, filters, strides)
        x = act(batch_norm(conv(x, filters, strides)))
        x = conv(x, filters)
        return act(batch_norm(layers.Add()([x, skip])))

    inputs = keras.Input(input_shape)
    x = act(batch_norm(conv(inputs, 16)))
    for stage, filters in enumerate((16, 32, 64)):
        for index in range(blocks):
            x = block(x, filters, strides=2 if stage > 0 and index == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(
        classes,
        kernel_initializer="he_normal",
        kernel_regularizer=regularizer,
        name="logits",
        dtype="float32",
    )(x)
    return keras.Model(inputs, outputs, name=f"resnet{depth}")


def _blocks(depth):
    """How many blocks each stage of a ResNet of this depth has."""
    if not isinstance(depth, int) or not 8 <= depth <= MOST_DEPTH or (depth - 2) % 6 != 0:
        raise InputError(
            f"A CIFAR ResNet has depth 6n + 2, from 8 to {MOST_DEPTH}; "
            f"received depth={depth!r}. Use 20, 32, 44, 56 or another such number."
        )
    return (depth - 2) // 6


def build(name: str, activation: Activation, **kwargs: Any) -> keras.Model:
    """The architecture called `name`: light_cnn, vgg, resnet20, resnet56 or any resnet(6n + 2).

    `kwargs` go to the architecture's function.
    """
    if name in ("light_cnn", "vgg"):
        return {"light_cnn": light_cnn, "vgg": vgg}[name](activation, **kwargs)
    if match := re.fullmatch(r"resnet(\d+)", str(name)):
        return resnet(activation, depth=int(match[1]), **kwargs)
    raise InputError(
        f"Unknown architecture {name!r}. "
        "Choose light_cnn, vgg, resnet20, resnet56 or another resnet of depth 6n + 2."
    )


def _conv_block(x, filters, act, *, dropout):
    """[conv3x3 - BN - activation] x 2, maxpool 2x2, dropout."""
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_uniform")(x)
        x = layers.BatchNormalization()(x)
        x = act(x)
    x = layers.MaxPooling2D(2)(x)
    return layers.Dropout(dropout)(x)


def _dense_head(x, act, classes):
    """dense 128, activation, dropout 0.4, logits."""
    x = layers.Dense(
        128,
        kernel_initializer="he_uniform",
        kernel_regularizer=keras.regularizers.L2(DENSE_L2),
    )(x)
    x = act(x)
    x = layers.Dropout(0.4)(x)
    # Logits stay in float32 under mixed precision, where a float16 cross-entropy would overflow.
    return layers.Dense(
        classes,
        kernel_initializer="he_uniform",
        kernel_regularizer=keras.regularizers.L2(DENSE_L2),
        name="logits",
        dtype="float32",
    )(x)


def _activation_factory(activation: Activation):
    """A function that passes a tensor through a fresh activation layer at each call."""
    if isinstance(activation, keras.layers.Layer) or not (
        isinstance(activation, str) or callable(activation)
    ):
        raise InputError(
            "activation must be a name ('relu', 'kaf', ...) or a function without arguments that "
            f"returns a new layer; received {activation!r}. Each place in the network needs a "
            "layer of its own: write lambda: Kaf(D=16) rather than Kaf(D=16)."
        )
    used: list[keras.layers.Layer] = []  # kept, so that identities stay unique

    def apply(x):
        layer = activation_by_name(activation) if isinstance(activation, str) else activation()
        if not isinstance(layer, keras.layers.Layer):
            raise InputError(
                "The activation factory must return a Keras layer; "
                f"received {layer!r}. Wrap a function in keras.layers.Activation."
            )
        if any(layer is other for other in used):
            raise InputError(
                f"The activation factory returned the layer {layer.name!r} twice, which would "
                "share its weights. Return a new layer at each call: lambda: Kaf(D=16)."
            )
        used.append(layer)
        return layer(x)

    return apply
