"""How the files here were made: `python make.py` in an environment with tf_keras (2.21.0).

Classifiers of images (6, 6, 3) with three classes, as Keras 2 saves them, and in expected.npz what
they give for `images`.
"""

import json
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import tf_keras
from tf_keras import layers

HERE = Path(__file__).parent
SHAPE, CLASSES = (6, 6, 3), 3
images = np.random.default_rng(0).uniform(0, 1, (4, *SHAPE)).astype("float32")


def sequential_without_input():
    return tf_keras.Sequential(
        [
            layers.Conv2D(2, 3, activation="swish", input_shape=SHAPE),
            layers.Flatten(),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def as_keras_2_2(file):
    """Up to Keras 2.3 a Sequential was written without its InputLayer: the commonest kind."""
    with h5py.File(file, "r+") as h5:
        config = json.loads(h5.attrs["model_config"])
        config["config"]["layers"] = [
            layer for layer in config["config"]["layers"] if layer["class_name"] != "InputLayer"
        ]
        h5.attrs["model_config"] = json.dumps(config)
        h5.attrs["keras_version"] = "2.2.4"


def functional():
    x = tf_keras.Input(SHAPE)
    y = layers.Flatten()(layers.BatchNormalization()(layers.Conv2D(2, 3)(x)))
    return tf_keras.Model(x, layers.Dense(CLASSES)(y))


def separable_over_255():
    x = tf_keras.Input(SHAPE)
    y = layers.SeparableConv2D(2, 3, activation="relu")(x / 255)
    return tf_keras.Model(x, layers.Dense(CLASSES)(layers.Flatten()(y)))


def nested():
    base = tf_keras.Sequential([layers.Flatten(input_shape=SHAPE), layers.Dense(4, "relu")])
    return tf_keras.Sequential([base, layers.Dense(CLASSES, activation="softmax")])


def mixed_float16_with_flip():
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    x = tf_keras.Input(SHAPE)
    y = layers.Dense(CLASSES)(layers.Flatten()(layers.RandomFlip()(x)))
    model = tf_keras.Model(x, layers.Activation("softmax", dtype="float32")(y))
    tf_keras.mixed_precision.set_global_policy("float32")
    return model


def with_lambda():
    x = tf_keras.Input(SHAPE)
    y = layers.Dense(CLASSES)(layers.Flatten()(x))
    return tf_keras.Model(x, layers.Lambda(lambda z: z * 2)(y))


def as_keras_2_13(file):
    """Keras 2.13 to 2.15 wrote `.keras` files with the module names of that package."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["config.json"] = parts["config.json"].replace(b"tf_keras.src", b"keras.src")
    metadata = json.loads(parts["metadata.json"]) | {"keras_version": "2.13.1"}
    parts["metadata.json"] = json.dumps(metadata).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def trained_by(optimizer):
    """A SavedModel is to have the slots of an optimizer whose class is gone."""
    model = tf_keras.Sequential([layers.Flatten(input_shape=SHAPE), layers.Dense(CLASSES)])
    model.compile(optimizer, tf_keras.losses.SparseCategoricalCrossentropy(True))
    model.fit(images, np.array([0, 1, 2, 0]), verbose=0)
    return model


def save_zipped(model, name):
    """As Keras 2 wrote a SavedModel before 2.5: without keras_metadata.pb."""
    folder = HERE / name
    model.save(folder, save_format="tf")
    (folder / "keras_metadata.pb").unlink()
    shutil.make_archive(str(folder), "zip", HERE, name)
    shutil.rmtree(folder)


if __name__ == "__main__":
    tf_keras.utils.set_random_seed(0)
    expected = {"images": images}
    for make, suffix in (
        (sequential_without_input, "h5"),
        (functional, "keras"),
        (separable_over_255, "h5"),
        (nested, "h5"),
        (mixed_float16_with_flip, "h5"),
        (with_lambda, "h5"),
    ):
        model = make()
        model.save(HERE / f"{make.__name__}.{suffix}")
        expected[make.__name__] = model(images, training=False).numpy()
    as_keras_2_2(HERE / "sequential_without_input.h5")
    as_keras_2_13(HERE / "functional.keras")

    legacy = tf_keras.optimizers.legacy
    for name, optimizer in (
        ("legacy_adam", legacy.Adam()),
        ("momentum", legacy.SGD(momentum=0.9)),
    ):
        model = trained_by(optimizer)
        save_zipped(model, name)
        expected[name] = model(images).numpy()
    np.savez_compressed(HERE / "expected.npz", **expected)
