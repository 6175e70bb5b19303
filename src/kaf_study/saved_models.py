"""Open any saved classifier as one thing that can be attacked: a function from images to logits.

A model may come as a model folder of this project, a `.keras` or `.h5` file, a SavedModel folder
or a `.zip` of one of these, ours or foreign. Nothing found in it is trusted: archives are unpacked
only inside their own temporary folder, Keras' safe mode stays on (no pickled code is run), and
whatever cannot be attacked honestly is refused with the reason, as an `InputError` of one line.

Attacks need logits: a saturated softmax has a zero gradient, which looks like robustness. Outputs
that are probabilities are therefore turned back into logits (`logits_of`), and it is said how.
"""

import hashlib
import importlib
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from kaf_study import InputError
from kaf_study.files import file_sha256
from kaf_study.model_folder import ModelFolder
from kaf_study.records import read_training

KINDS = "a model folder, a .keras or .h5 file, a SavedModel folder, or a .zip of one of these"

# Far above any classifier of 32x32 images (ResNet-18 is 45 MB), far below what fills a disk.
MAX_UNPACKED_BYTES = 2 * 1024**3
MAX_UNPACKED_FILES = 10_000

# What can be said about the numbers that are attacked.
LOGITS = "logits"
SOFTMAX_REMOVED = "softmax removed"
PROBABILITIES = "probabilities"


@dataclass(frozen=True)
class LoadedModel:
    """A saved classifier, opened.

    `model(x, training=False)` maps images (B, H, W, C) in [0, 1] to (B, classes), logits or
    probabilities. `folder` is set for a model folder of ours, `training` where it has a record.
    """

    name: str
    path: Path
    model: Callable
    sha256: str
    folder: Path | None = None
    training: dict | None = None

    @property
    def dataset(self):
        """The data set named by the training record, or None."""
        return self.training and self.training["settings"]["dataset"]


@contextmanager
def open_model(path):
    """Load the model at `path`; what a `.zip` unpacks to exists only inside the `with` block."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"expected {KINDS}, got {str(path)!r}, which does not exist")
    if path.suffix.lower() != ".zip":
        yield _load(path, path.resolve().name if path.is_dir() else path.stem)
        return
    with tempfile.TemporaryDirectory(prefix="robustness_eval_") as folder:
        unpack(path, Path(folder))
        inside = _load(_only_model_in(Path(folder), path), path.stem)
        # The folder is about to vanish: results go beside the archive.
        yield LoadedModel(path.stem, path, inside.model, file_sha256(path), None, inside.training)


def _load(path, name):
    training, folder, file = None, None, path
    if path.is_dir() and (path / "model.keras").is_file():
        folder, file, training = path, path / "model.keras", _training_record(path)
    if file.is_dir():
        if not (file / "saved_model.pb").is_file():
            raise InputError(
                f"{str(path)!r} holds neither model.keras nor saved_model.pb; expected {KINDS}"
            )
        return LoadedModel(name, path, _load_saved_model(file), folder_sha256(file))
    if file.suffix.lower() not in (".keras", ".h5", ".hdf5"):
        raise InputError(f"expected {KINDS}, got {str(path)!r}")
    return LoadedModel(name, path, _load_keras(file), file_sha256(file), folder, training)


def _training_record(folder):
    record = ModelFolder(folder).record
    return read_training(record) if record.exists() else None


# --------------------------------------------------------------------------- Keras files


def _load_keras(file):
    # Registers this project's layers (Kaf, Kwta) and its trained model class with Keras.
    importlib.import_module("activationsf")
    importlib.import_module("fbfadvtrain")
    if file.suffix.lower() == ".keras" and not zipfile.is_zipfile(file):
        raise InputError(
            f"{str(file)!r} is not a Keras archive, whatever its name; expected what "
            "model.save('NAME.keras') writes"
        )
    try:
        model = keras.models.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises a dozen types for a bad file
        raise InputError(
            f"{str(file)!r} is not a Keras model that can be loaded ({_first_line(error)}); "
            "save it again with model.save(...), custom layers registered with Keras"
        ) from None
    if not model.built:
        raise InputError(
            f"{str(file)!r} was saved before it was built, so it has no weights; call it on images "
            "(or give it an Input) and train it before model.save(...)"
        )
    counts = [len(getattr(model, side, None) or [0]) for side in ("inputs", "outputs")]
    if counts != [1, 1]:
        raise InputError(
            f"{str(file)!r} has {counts[0]} inputs and {counts[1]} outputs; "
            "expected a classifier with one of each"
        )
    for weight in model.weights:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(weight).astype("float32"))):
            raise InputError(
                f"{str(file)!r} has NaN or infinite weights (first in {weight.path}); train again"
            )
    return model


# --------------------------------------------------------------------------- logits


def logits_of(model, x):
    """A model's logits as `f(x, training=False)`, and how they were obtained.

    Args:
        model: Keras model or callable with Keras' `training` argument.
        x: some images (B, H, W, C), to look at what the model gives for them.

    Returns:
        The function, and LOGITS (the outputs themselves), SOFTMAX_REMOVED (a Keras model, up to
        its softmax) or PROBABILITIES (the logarithm of outputs that are probabilities).
    """
    model, outputs = without_softmax(model)
    p = np.asarray(model(tf.constant(x), training=False), dtype="float64")
    if p.min() < 0 or p.max() > 1 or not np.allclose(p.sum(axis=-1), 1, atol=1e-3):
        return model, outputs

    # softmax(log p) = p: the cross-entropy of log p taken as logits is the model's own loss. The
    # floor is the smallest normal float32; a higher one (Keras uses 1e-7) zeroes more gradients.
    floor = np.finfo("float32").tiny

    def log_probabilities(x, training=False):
        return tf.math.log(tf.maximum(tf.cast(model(x, training=training), tf.float32), floor))

    return log_probabilities, PROBABILITIES


def without_softmax(model):
    """`model` up to its logits, sharing its weights, and what was done: LOGITS or SOFTMAX_REMOVED.

    Recognised at the end of a functional or Sequential model: a layer whose activation is softmax
    (it is rebuilt without one), a Softmax or Activation layer, and `keras.ops.softmax`. A softmax
    hidden elsewhere (in a nested or subclassed model) shows in the numbers: `logits_of`.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "outputs", None):
        return model, LOGITS
    last, node, _ = model.outputs[0]._keras_history
    before = last._inbound_nodes[node].input_tensors[0] if last._inbound_nodes else None
    is_softmax = getattr(last, "activation", None) is keras.activations.softmax
    if type(last).__name__ == "Softmax" or (
        is_softmax and isinstance(last, keras.layers.Activation)
    ):
        return keras.Model(model.inputs, before), SOFTMAX_REMOVED
    if not is_softmax:
        return model, LOGITS
    config = last.get_config() | {"activation": "linear", "name": f"{last.name}_logits"}
    linear = type(last).from_config(config)
    logits = linear(before)
    linear.set_weights(last.get_weights())
    return keras.Model(model.inputs, logits), SOFTMAX_REMOVED


# --------------------------------------------------------------------------- SavedModel folders


def _load_saved_model(folder):
    """A SavedModel's serving signature (or the object itself) as `f(x, training=False)`."""
    try:
        _refuse_unsaved_gradients(folder)
        loaded = tf.saved_model.load(str(folder))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{str(folder)!r} is not a SavedModel that can be loaded ({_first_line(error)}); "
            "export it again with model.export(...)"
        ) from None
    signature = getattr(loaded, "signatures", {}).get("serving_default")
    if signature is None:
        if not callable(loaded):
            raise InputError(
                f"{str(folder)!r} has no serving_default signature and cannot be called; "
                "export it again with model.export(...)"
            )

        def call(x, training=False):
            return loaded(x)

        return call

    _, inputs = signature.structured_input_signature
    outputs = signature.structured_outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise InputError(
            f"the signature of {str(folder)!r} has {len(inputs)} inputs and {len(outputs)} "
            "outputs; expected a classifier with one of each"
        )
    ((argument, spec),), (output,) = inputs.items(), outputs
    if not spec.dtype.is_floating:
        raise InputError(
            f"{str(folder)!r} takes {spec.dtype.name} images, through which no gradient passes; "
            "export it with float inputs in [0, 1]"
        )
    if spec.shape.rank is not None and spec.shape.rank > 0 and spec.shape[0] is not None:
        raise InputError(
            f"{str(folder)!r} takes batches of exactly {spec.shape[0]}; "
            "export it with an unknown batch size (None)"
        )

    def call(x, training=False):
        return signature(**{argument: tf.cast(x, spec.dtype)})[output]

    call.input_shape = tuple(spec.shape) if spec.shape.rank is not None else None
    call.loaded = loaded  # a signature does not keep its variables alive by itself
    return call


def _refuse_unsaved_gradients(folder):
    """Refuse a SavedModel with custom gradients (older TensorFlow's Swish, say) but not their code.

    TensorFlow only warns. Asked for a gradient it then fails or, worse, takes whatever custom
    gradient of this process happens to have the same number ("CustomGradient-47"): a wrong one.
    """
    graphs = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    for graph in (meta.graph_def for meta in graphs.meta_graphs):
        saved = {gradient.registered_op_type for gradient in graph.library.registered_gradients}
        for function in graph.library.function:
            for node in function.node_def:
                needed = node.attr["_gradient_op_type"].s.decode()
                if needed and not node.op.endswith("PartitionedCall") and needed not in saved:
                    raise InputError(
                        f"{str(folder)!r} was saved without gradient information: the custom "
                        f"gradient of {node.name} ({needed}) is not in it, so it cannot be "
                        "attacked by gradients; export it again with a newer TensorFlow, or give "
                        "its .keras or .h5 file"
                    )


# --------------------------------------------------------------------------- archives and hashes


def unpack(archive, folder):
    """Unpack a zip into `folder`, or refuse it before anything has been written.

    Refused: absolute paths, `..`, drive letters, symbolic links and other special files, encrypted
    entries, and archives that say they are larger than a model can be.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = file.infolist()
            for entry in entries:
                _refuse_unsafe(archive, entry)
            size = sum(entry.file_size for entry in entries)
            if size > MAX_UNPACKED_BYTES or len(entries) > MAX_UNPACKED_FILES:
                raise InputError(
                    f"{str(archive)!r} unpacks to {len(entries)} files of {size:,} bytes; at most "
                    f"{MAX_UNPACKED_FILES} files of {MAX_UNPACKED_BYTES:,} bytes are accepted"
                )
            for entry in entries:
                _extract(file, entry, folder)
    except InputError:
        raise
    except Exception as error:  # zipfile and zlib raise several types for a bad file
        raise InputError(
            f"{str(archive)!r} is not a zip archive that can be read ({_first_line(error)})"
        ) from None


def _refuse_unsafe(archive, entry):
    name = entry.filename.replace("\\", "/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]:
        reason = "points outside the archive's own folder"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a symbolic link or a special file"
    elif entry.flag_bits & 1:
        reason = "is encrypted"
    else:
        return
    raise InputError(
        f"{str(archive)!r} is refused: its entry {entry.filename!r} {reason}; "
        "pack the model's files alone"
    )


def _extract(file, entry, folder):
    target = folder / entry.filename.replace("\\", "/")
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # zipfile stops at the size the entry declares, so the limit above is kept.
    with file.open(entry) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _only_model_in(folder, archive):
    """The one model in an unpacked archive: at its root, or alone one folder down."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        if (place / "model.keras").is_file() or (place / "saved_model.pb").is_file():
            return place
        files = [p for p in sorted(place.iterdir()) if p.suffix.lower() in (".keras", ".h5")]
        if len(files) == 1:
            return files[0]
    raise InputError(
        f"{str(archive)!r} holds no model, or several; pack one model folder, .keras or .h5 file, "
        "or SavedModel folder"
    )


def folder_sha256(folder):
    """One hash for a folder: of its files' relative paths and contents, in sorted order.

    `robustness/` is left out: results written beside a model do not make it another model.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        relative = file.relative_to(folder)
        if relative.parts[0] != "robustness":
            digest.update(f"{relative.as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _first_line(error, width=160):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."
