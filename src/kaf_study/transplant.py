"""Learned shapes, frozen, in a network that is trained anew: do they matter, or their training?

Each layer of the new network has one function in all its channels: the mean of the functions that
the Kafs of the same layer of a trained network ended with. It is not trained; everything else is.
"""

from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray

from activationsf import Kaf, kaf_layers
from kaf_study import InputError
from kaf_study.architectures import build
from kaf_study.files import file_sha256
from kaf_study.model_folder import ModelFolder, TrainedModel


def mean_shapes(model: keras.Model) -> list[NDArray[np.float32]]:
    """The mean over channels of each Kaf layer's functions, first to last: coefficients (D,).

    A Kaf is linear in its coefficients, so that of the mean coefficients is the mean function.

    Raises:
        InputError: the model has no Kaf layers, or they have dictionaries of their own.
    """
    layers = kaf_layers(model)
    if not layers or any(layer.moving for layer in layers):
        raise InputError(
            f"{model.name!r} has {'moving dictionaries' if layers else 'no Kaf layers'}: there are "
            "no shapes in common dictionaries to take the mean of"
        )
    return [keras.ops.convert_to_numpy(layer.alpha).mean(axis=1) for layer in layers]


def network_of_shapes(architecture: str, shapes_of: Path | str, **kwargs) -> keras.Model:
    """A network to be trained, with the frozen mean shapes of a trained one.

    Args:
        architecture, kwargs: of `architectures.build`.
        shapes_of: model folder of a finished training of this architecture with Kafs.
    """
    source = TrainedModel.read(shapes_of)
    if source.settings["architecture"] != architecture:
        raise InputError(
            f"{shapes_of} is of architecture {source.settings['architecture']}, whose layers are "
            f"not those of {architecture}; name another model folder"
        )
    model = ModelFolder(source.folder).model
    if not model.is_file():
        raise InputError(
            f"{shapes_of} must hold the trained network; there is a training.json but no "
            f"{model.name}: train it again with --force, or name another model folder"
        )
    trained = keras.models.load_model(model, compile=False)
    shapes = mean_shapes(trained)
    config = kaf_layers(trained)[0].get_config()
    # The start is given below; what the trained one started as says nothing of these.
    del config["name"]
    config |= {"ridge": None, "alpha_initializer": "zeros"}
    network = build(architecture, lambda: Kaf.from_config(config), **kwargs)
    for layer, shape in zip(kaf_layers(network), shapes, strict=True):
        layer.alpha.assign(np.repeat(shape[:, None], layer.alpha.shape[1], axis=1))
        layer.trainable = False
    return network


def shapes_sha256(shapes_of: Path | str) -> str:
    """Of the network whose shapes were taken."""
    return file_sha256(ModelFolder(shapes_of).model)
