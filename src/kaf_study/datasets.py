"""Images as arrays in [0, 1], their fixed splits, and one epoch of (augmented) batches.

cifar10 (Krizhevsky 2009) is read from its official python layout; digits, scikit-learn's 1,797
handwritten digits (UCI) enlarged to 32x32x3, is embedded: always there, for a first try and for
tests. The validation split comes from the training images, with a seed of its own; the test split
is for final figures only.
"""

import hashlib
import os
import pickle
import socket
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from kaf_study import InputError

DATASETS = ("cifar10", "digits")
Split = tuple[np.ndarray, np.ndarray]  # images, labels

SPLIT_SEED = 2020  # of the splits only: the same images for every run, whatever its seed
CIFAR10_BATCH = 10_000  # images in each of the six files
CIFAR10_VALIDATION = 2_000
DIGITS_TEST, DIGITS_VALIDATION = 360, 180

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_TEST_FILE = "test_batch"
CIFAR10_FILES = (*CIFAR10_TRAIN_FILES, CIFAR10_TEST_FILE)
CIFAR10_WAYS = (
    f"To provide CIFAR-10, give its folder {CIFAR10_FOLDER} with --data-dir or CIFAR10_DIR, "
    "or put it into Keras' cache (~/.keras/datasets), or connect to the network and let Keras "
    "download it."
)
# As in keras.datasets.cifar10, whose cache is shared; its reader is not used (see _RestrictedRead).
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_CACHE = "cifar-10-batches-py-target"

PAD = 4  # pixels of zeros on each side of an image that is cropped at random, He et al. 2016


def load(name: str, data_dir: str | Path | None = None) -> tuple[Split, Split, Split]:
    """Train, validation and test split of a dataset.

    Args:
        name: "cifar10" (48,000 / 2,000 / 10,000 images) or "digits" (1,257 / 180 / 360).
        data_dir: for cifar10, the folder cifar-10-batches-py or its parent; without it the
            environment variable CIFAR10_DIR, then Keras' cache, then Keras' download. A folder
            given but unusable is an error, never a reason to look elsewhere. digits needs none.

    Returns:
        train, validation, test: each (x, y) with x (N, 32, 32, 3) float32 in [0, 1], y (N,) int64.
    """
    _check_name(name)
    if name == "digits":
        return _load_digits()
    folder = _find_cifar10(data_dir)
    pixels, labels, train, validation = _read_cifar10_training(folder)
    return (
        (_to_images(pixels[train]), labels[train]),
        (_to_images(pixels[validation]), labels[validation]),
        _cifar10_test(folder),
    )


def load_validation(name: str, data_dir: str | Path | None = None) -> Split:
    """The validation split of `load` alone, without the images to train on."""
    _check_name(name)
    if name == "digits":
        return _load_digits()[1]
    pixels, labels, _, validation = _read_cifar10_training(_find_cifar10(data_dir))
    return _to_images(pixels[validation]), labels[validation]


def load_test(name: str, data_dir: str | Path | None = None) -> Split:
    """The test split of `load` alone: one of six files is read."""
    _check_name(name)
    return _load_digits()[2] if name == "digits" else _cifar10_test(_find_cifar10(data_dir))


def class_names(name: str) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels."""
    _check_name(name)
    return CIFAR10_CLASSES if name == "cifar10" else tuple("0123456789")


def is_augmentable(name: str) -> bool:
    """Whether random crop and flip keep the class: not for digits, a mirrored digit is none."""
    _check_name(name)
    return name == "cifar10"


def fingerprint(x: np.ndarray, y: np.ndarray) -> str:
    """sha256 (hex) of a split: its values, shapes and types."""
    digest = hashlib.sha256()
    for array in (x, y):
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Batches


def batches(
    x: np.ndarray,
    y: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: bool,
    shuffle: bool = True,
) -> tf.data.Dataset:
    """The batches of one epoch, the last short one included.

    Order and augmentation are a pure function of (seed, epoch): a run that is resumed at an epoch
    sees what an uninterrupted run would have seen.

    Args:
        x: images (N, H, W, C), float32; stays where it is, only batches are copied.
        y: labels (N,).
        seed, epoch: non-negative integers below 2**31.
        augment: random crop and horizontal flip, see `random_crop_and_flip`.

    Returns:
        tf.data.Dataset of (x (B, H, W, C), y (B,)), ceil(N / batch_size) batches long.
    """
    count = len(x)
    if count == 0 or len(y) != count:
        raise InputError(
            f"batches needs as many labels as images, at least one; received {count} images and "
            f"{len(y)} labels."
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; received {batch_size}.")
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(count)
    else:
        order = np.arange(count)
    starts = range(0, count, batch_size)

    def copy_batches():
        for start in starts:
            index = order[start : start + batch_size]
            yield x[index], y[index]

    dataset = tf.data.Dataset.from_generator(
        copy_batches,
        output_signature=(
            tf.TensorSpec((None, *x.shape[1:]), x.dtype),
            tf.TensorSpec((None,), y.dtype),
        ),
    ).apply(tf.data.experimental.assert_cardinality(len(starts)))
    if augment:
        epoch_seed = np.array([seed, epoch], np.int32)

        def augment_batch(batch, data):
            images, labels = data
            batch_seed = tf.random.fold_in(epoch_seed, tf.cast(batch, tf.int32))
            return random_crop_and_flip(images, batch_seed), labels

        dataset = dataset.enumerate().map(augment_batch)
    return dataset.prefetch(2)


def random_crop_and_flip(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Random crop out of the zero-padded image, and a horizontal flip of every second one.

    The crop and the flip are index arithmetic on whole batches: rows are gathered, then columns,
    in descending order where the image is mirrored.

    Args:
        images: (B, H, W, C).
        seed: two integers; the same seed gives the same crops and flips.

    Returns:
        (B, H, W, C)
    """
    batch, height, width = tf.unstack(tf.shape(images)[:3])
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    offset = tf.random.stateless_uniform(
        (batch, 2), crop_seed, minval=0, maxval=2 * PAD + 1, dtype=tf.int32
    )
    is_flipped = tf.random.stateless_uniform((batch, 1), flip_seed) < 0.5
    column = tf.range(width)
    rows = offset[:, :1] + tf.range(height)  # (B, H)
    columns = offset[:, 1:] + tf.where(is_flipped, column[::-1], column)  # (B, W)
    padded = tf.pad(images, [[0, 0], [PAD, PAD], [PAD, PAD], [0, 0]])
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)  # (B, H, W + 2 PAD, C)
    cropped = tf.gather(cropped, columns, axis=2, batch_dims=1)
    return tf.ensure_shape(cropped, images.shape)


# ---------------------------------------------------------------------------------------------
# digits


def _load_digits():
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype(np.float32) / 16  # grey levels 0..16
    # Enlarging four times, bilinear weights are multiples of 1/8: exact, so the same everywhere.
    x = tf.image.resize(x, (32, 32), method="bilinear").numpy()
    x = np.repeat(x, 3, axis=-1)  # (N, 32, 32, 3)
    y = y.astype(np.int64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    test, validation, train = np.split(order, [DIGITS_TEST, DIGITS_TEST + DIGITS_VALIDATION])
    return tuple((x[np.sort(part)], y[np.sort(part)]) for part in (train, validation, test))


# ---------------------------------------------------------------------------------------------
# CIFAR-10


def _read_cifar10_training(folder):
    """Pixels and labels of the five files, and the positions of train and validation in them."""
    parts = [_read_cifar10_file(folder / name) for name in CIFAR10_TRAIN_FILES]
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
    validation = np.sort(order[:CIFAR10_VALIDATION])
    train = np.sort(order[CIFAR10_VALIDATION:])
    return pixels, labels, train, validation


def _cifar10_test(folder):
    pixels, labels = _read_cifar10_file(folder / CIFAR10_TEST_FILE)
    return _to_images(pixels), labels


def _to_images(pixels):
    # (N, 3072) uint8, channels first -> (N, 32, 32, 3) float32 in [0, 1]
    x = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.divide(x, np.float32(255), dtype=np.float32, order="C")


def _find_cifar10(data_dir):
    """The folder with the six files: named, cached, or downloaded, in this order."""
    if data_dir is None and os.environ.get("CIFAR10_DIR"):
        return _named_folder(os.environ["CIFAR10_DIR"], "CIFAR10_DIR")
    if data_dir is not None:
        return _named_folder(data_dir, "--data-dir")
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    for cached in (CIFAR10_CACHE, ""):  # Keras 3; Keras 2
        folder = keras_home / "datasets" / cached / CIFAR10_FOLDER
        # An extraction that was interrupted leaves fewer: the download below repeats it.
        if all((folder / name).is_file() for name in CIFAR10_FILES):
            return folder
    return _download_cifar10()


def _named_folder(path, source):
    path = Path(path).expanduser()
    for folder in (path, path / CIFAR10_FOLDER):
        if (folder / CIFAR10_TEST_FILE).is_file():
            return folder
    raise InputError(
        f"{source} must name the folder {CIFAR10_FOLDER} or its parent; "
        f"no {CIFAR10_TEST_FILE} in {path}. {CIFAR10_WAYS}"
    )


def _download_cifar10():
    try:
        with _network_timeout(30):
            path = keras.utils.get_file(
                fname=CIFAR10_CACHE, origin=CIFAR10_URL, extract=True, file_hash=CIFAR10_SHA256
            )
    except Exception as error:  # get_file raises bare Exception for a failed download
        raise InputError(
            f"CIFAR-10 could not be downloaded ({_one_line(error)}). {CIFAR10_WAYS}"
        ) from error
    return Path(path) / CIFAR10_FOLDER


@contextmanager
def _network_timeout(seconds):
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _read_cifar10_file(path):
    """Pixels (n, 3072) uint8 and labels (n,) int64 of one of the six files."""
    try:
        with open(path, "rb") as file:
            content = _RestrictedRead(file, encoding="bytes").load()
        # bytes keys in the official files (written by Python 2), str keys in copies
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = content["data"], np.asarray(content["labels"])
    except FileNotFoundError as error:
        raise InputError(f"The CIFAR-10 file {path} is missing. {CIFAR10_WAYS}") from error
    except Exception as error:  # whatever a damaged or hostile pickle can provoke
        raise InputError(
            f"{path} is not a CIFAR-10 batch: damaged, cut short or of another kind "
            f"({type(error).__name__}: {_one_line(error)}). {CIFAR10_WAYS}"
        ) from error
    is_batch = (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape == (CIFAR10_BATCH, 3072)
        and labels.shape == (CIFAR10_BATCH,)
        and labels.dtype.kind in "iu"
        and labels.min() >= 0
        and labels.max() < len(CIFAR10_CLASSES)
    )
    if not is_batch:
        raise InputError(
            f"{path} is not a CIFAR-10 batch: expected {CIFAR10_BATCH} images of 3,072 bytes with "
            f"labels 0 to 9; received data {getattr(pixels, 'shape', type(pixels).__name__)} and "
            f"labels {labels.shape}. {CIFAR10_WAYS}"
        )
    return pixels, labels.astype(np.int64)


def _one_line(error):
    return " ".join(str(error).split())[:200]


def _latin1_bytes(text, encoding):
    """How pickle protocol 2 stores bytes: _codecs.encode(text, 'latin1')."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _reconstruct_array(cls, shape, dtype):
    if cls is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of class {cls!r}")
    return np.ndarray.__new__(np.ndarray, shape, dtype)


def _array_from_buffer(buffer, dtype, shape, order, axis_order=None):
    """Pickle protocol 5 of a contiguous array."""
    if axis_order is not None:
        raise pickle.UnpicklingError("an array in permuted order")
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


class _RestrictedRead(pickle.Unpickler):
    """Reads arrays, numbers, bytes, text, lists and dicts; refuses all else.

    A pickle names functions to be called with its own arguments, so an ordinary `pickle.load` of
    a foreign file runs foreign code. Here a name leads to one of these harmless ones or to an
    error.
    """

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1_bytes,
    } | {
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")  # before and since NumPy 2
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct_array),
            ("numeric", "_frombuffer", _array_from_buffer),
        )
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _check_name(name):
    if name not in DATASETS:
        raise InputError(f"Unknown dataset {name!r}. Choose one of: {', '.join(DATASETS)}.")
