"""Keras files: `.keras` and `.h5`, of Keras 3 or (through tf_keras) Keras 2, without running code.

Keras' safe mode refuses pickled code, but that of an `.h5` is not safe with tf_keras, which runs
Lambda layers from it. So the file's config is read first, and what brings code is refused.
"""

import importlib
import json
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import h5py
import keras
import numpy as np
import tensorflow as tf

from kaf_study import InputError
from kaf_study.saved_models.archives import one_line
from kaf_study.saved_models.graphs import attackable

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
LEGACY = "its Keras 2 package, pip install 'kaf-robustness[legacy]' (tf_keras), may open it"
RAISED = "it computes in {}, raised to float32"
BY_TF_KERAS = "it is of Keras {}, opened by tf_keras"

# Where Keras 2 names the classes of its own objects. Other modules of the file's choice would be
# imported by tf_keras, and their functions called.
OWN_MODULES = re.compile(
    r"(tf_)?keras(\.src)?(\.(engine|models|layers|activations|initializers|regularizers"
    r"|constraints|mixed_precision)(\.\w+)*)?"
)
# Functions of TensorFlow that a Keras 2 file may call: computations, nothing that touches files.
OWN_FUNCTIONS = re.compile(
    r"((math|nn|image|linalg|__operators__|compat\.v1\.nn)\.\w+|cast|reshape|transpose|concat|split"
    r"|stack|unstack|pad|tile|squeeze|expand_dims|identity|clip_by_value|convert_to_tensor|where"
    r"|zeros_like|ones_like|reverse|roll|gather|slice|strided_slice|shape|abs|add|subtract|multiply"
    r"|divide|negative|square|sqrt|exp|pow|sign|round|maximum|minimum|matmul|tensordot|einsum"
    r"|reduce_(sum|mean|max|min|prod)|sigmoid|tanh|norm)"
)


@dataclass(frozen=True)
class Network:
    """One of this project's networks, for files that hold weights alone."""

    architecture: str
    activation: str
    image_shape: tuple[int, int, int] = (32, 32, 3)
    classes: int = 10


def import_modules(names: Iterable[str]) -> list[ModuleType]:
    """Import the modules that define a user's own layers, from the working directory as well."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except Exception as error:  # whatever the module itself raises
            raise InputError(
                f"--import {name}: {type(error).__name__}: {one_line(error)}; give the name of a "
                "module in the working directory or among the installed packages"
            ) from None
    return modules


def load_keras(
    file: Path, modules: Iterable[ModuleType] = (), network: Network | None = None
) -> tuple[Callable, list[str]]:
    """The classifier in a file as `f(x, training=False)`, and what was done to open it.

    Args:
        modules: imported for the layers they define, registered with Keras or not.
        network: builds what a file of weights alone belongs to.
    """
    # Registers this project's layers (Kaf, Kwta) and its trained model class with Keras.
    importlib.import_module("activationsf")
    importlib.import_module("fbfadvtrain")
    config, version = _read_config(file)
    if config is None:
        return _load_weights(file, network), []
    if network is not None:
        raise InputError(
            f"{str(file)!r} holds a whole model; --architecture and --activation are for files of "
            "weights alone"
        )
    _refuse_lambda(file, config)
    model, reason = _load_keras_3(file, _defined(modules))
    if model is not None and model.built:
        _check(file, model, model.weights)
        return _one_output(model), _raise_to_float32(model)
    if version.partition(".")[0] in ("1", "2"):
        return _load_keras_2(file, config, version, modules, reason)
    if model is None:
        raise InputError(_why_not(file, version, reason))
    raise InputError(
        f"{str(file)!r} was saved before it was built, so it has no weights; call it on images "
        "(or give it an Input) and train it before model.save(...)"
    )


# --------------------------------------------------------------------------- what the file says


def _read_config(file):
    """The config in a Keras file (None: it holds weights alone) and the version that wrote it."""
    is_archive = file.suffix.lower() == ".keras"
    try:
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                config = json.loads(archive.read("config.json"))
                written_by = json.loads(archive.read("metadata.json"))
        else:
            with h5py.File(file) as h5:
                config, written_by = h5.attrs.get("model_config"), dict(h5.attrs)
                config = None if config is None else json.loads(config)
                if config is None and not {"layers", "layer_names"} & {*h5, *h5.attrs}:
                    raise ValueError("no model in it")
    except Exception as error:  # h5py, zipfile and json raise several types for a bad file
        kind = "archive, whatever its name" if is_archive else "model that can be loaded"
        writer = "NAME.keras" if is_archive else "NAME.h5"
        raise InputError(
            f"{str(file)!r} is not a Keras {kind} ({one_line(error)}); "
            f"expected what model.save({writer!r}) writes"
        ) from None
    version = written_by.get("keras_version", "")
    return config, version.decode() if isinstance(version, bytes) else str(version)


def _parts(config) -> Iterator[dict]:
    """Every object in a config, however deep; the optimizer and losses are not loaded."""
    if isinstance(config, dict):
        yield config
        config = [value for key, value in config.items() if key != "compile_config"]
    if isinstance(config, list):
        for value in config:
            yield from _parts(value)


def _class_name(part):
    return str(part.get("class_name", "")).split(">")[-1]


def _refuse_lambda(file, config):
    for part in _parts(config):
        if _class_name(part) in ("Lambda", "__lambda__"):
            inner = part.get("config")
            name = inner.get("name") if isinstance(inner, dict) else None
            raise InputError(
                f"{str(file)!r} has a Lambda layer ({name or 'unnamed'}), that is pickled code, "
                "which is never run from a file; write it as a layer class in a module, save the "
                "model with that, and name the module by --import MODULE"
            )


def _refuse_foreign_code(file, config, modules):
    """Refuse a Keras 2 file that names modules or functions beyond Keras' own and the user's."""
    allowed = {module.__name__ for module in modules}
    for part in _parts(config):
        inner, module = part.get("config"), part.get("module")
        name = _class_name(part)
        if name in ("TFOpLambda", "SlicingOpLambda"):
            function = inner.get("function") if isinstance(inner, dict) else inner
            if not OWN_FUNCTIONS.fullmatch(str(function)):
                raise InputError(
                    f"{str(file)!r} calls tf.{function}, which is not among the computations that "
                    "are accepted from a file"
                )
        elif module is not None and name and module not in allowed:
            if not OWN_MODULES.fullmatch(str(module)):
                raise InputError(
                    f"{str(file)!r} needs {name!r} from the module {module!r}, which is not "
                    f"imported on a file's behalf; if you trust it, give --import {module}"
                )


def _defined(modules):
    """The classes and functions that modules define, by name."""
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    }


def _why_not(file, version, error):
    """One line of why a file cannot be loaded: the innermost cause, and the class it is about."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    text = str(error).rpartition("Exception encountered:")[2]
    missing = re.search(
        r"(?:Could not locate (?:class|function)|Unknown (?:layer|object|[\w ]*function):?|"
        r"Cannot deserialize object of type) [`'\"]?(\w+)",
        text,
    )
    start = f"{str(file)!r} is not a Keras model that can be loaded"
    if missing:
        return (
            f"{start}: it needs {missing[1]!r}, which Keras does not know; name the module that "
            "defines it by --import MODULE"
        )
    return f"{start} (of Keras {version or 'unknown'}; {type(error).__name__}: {one_line(text)})"


# --------------------------------------------------------------------------- loading


def _load_keras_3(file, custom_objects):
    """The model, or None and the exception that says why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the model was written: it is as it is
            return keras.models.load_model(
                file, custom_objects=custom_objects, compile=False, safe_mode=True
            ), None
    except Exception as error:  # Keras raises a dozen types for a bad file
        return None, error


def _load_keras_2(file, config, version, modules, reason):
    try:
        import tf_keras
    except ImportError:
        why = "it has no weights before it is built" if reason is None else one_line(reason, 80)
        raise InputError(
            f"{str(file)!r} is of Keras {version}, and Keras 3 cannot open it ({why}); {LEGACY}"
        ) from None
    _refuse_foreign_code(file, config, modules)
    try:
        model = tf_keras.models.load_model(
            file, custom_objects=_defined(modules), compile=False, safe_mode=True
        )
    except Exception as error:  # as many types as Keras 3
        raise InputError(_why_not(file, version, error)) from None
    _check(file, model, model.weights)
    (spec,) = model.inputs
    spec = tf.TensorSpec((None, *spec.shape[1:]), spec.dtype)
    function = tf.function(lambda x: model(x, training=False), autograph=False)
    classifier, remarks = attackable(function.get_concrete_function(spec))
    return classifier, [BY_TF_KERAS.format(version), *remarks]


def _load_weights(file, network):
    from kaf_study.architectures import build

    if network is None:
        raise InputError(
            f"{str(file)!r} holds weights alone, not the network they belong to; save the whole "
            "model with model.save(...), or give --architecture and --activation for one of this "
            "project's networks"
        )
    model = build(
        network.architecture,
        network.activation,
        input_shape=network.image_shape,
        classes=network.classes,
    )
    try:
        model.load_weights(file)
        _refuse_unread(file, model)
    except Exception as error:  # Keras and h5py raise several types
        raise InputError(
            f"the weights in {str(file)!r} are not those of {network.architecture} with "
            f"{network.activation} ({one_line(error)})"
        ) from None
    _check(file, model, model.weights)
    return model


def _refuse_unread(file, model):
    """Keras reads the weights it needs and is silent about others in the file."""

    def arrays(path):
        found = []
        with h5py.File(path) as h5:
            h5.visititems(lambda name, part: found.append((name, isinstance(part, h5py.Dataset))))
        return {name for name, is_array in found if is_array and name.startswith("layers/")}

    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own.weights.h5"
        model.save_weights(own)
        unread = sorted(arrays(file) - arrays(own))
    if unread:
        raise ValueError(f"there is no place for {unread[0]}")


def _check(file, model, weights):
    """One input, one output, finite weights."""
    counts = [len(getattr(model, side, None) or [0]) for side in ("inputs", "outputs")]
    if counts != [1, 1]:
        raise InputError(
            f"{str(file)!r} has {counts[0]} inputs and {counts[1]} outputs; "
            "expected a classifier with one of each"
        )
    for weight in weights:
        if not np.all(np.isfinite(np.asarray(weight.numpy(), "float32"))):
            name = getattr(weight, "path", weight.name)
            raise InputError(
                f"{str(file)!r} has NaN or infinite weights (first in {name}); train again"
            )


def _one_output(model):
    """A model whose one output comes in a dict or list gives the output itself."""
    if getattr(model, "outputs", None):
        outputs = model.compute_output_spec(model.inputs[0])
        is_plain = isinstance(outputs, keras.KerasTensor)
        return model if is_plain else keras.Model(model.inputs, model.outputs[0])

    def call(x, training=False):
        (outputs,) = tf.nest.flatten(model(x, training=training))
        return outputs

    return call


def _raise_to_float32(model):
    """Let float32 weights compute in float32 where the file's policy is float16; the remark."""
    half = {}
    for layer in model._flatten_layers():
        if layer.compute_dtype in ("float16", "bfloat16") and layer.variable_dtype == "float32":
            half[layer.compute_dtype] = True
            layer.dtype_policy = "float32"
    return [RAISED.format(" and ".join(half))] if half else []
