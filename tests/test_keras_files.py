"""Keras files of others open, of Keras 2 as well, without running code that they bring."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from kaf_study import InputError
from kaf_study.architectures import build
from kaf_study.saved_models import Network, Opening, logits_of, open_model
from kaf_study.saved_models.keras_files import RAISED
from kaf_study.saved_models.pixel_range import has_rescaling

KERAS_2 = Path(__file__).parent / "data" / "keras2"  # made by the make.py there
SHAPE, CLASSES = (6, 6, 3), 3

needs_tf_keras = pytest.mark.skipif(
    importlib.util.find_spec("tf_keras") is None,
    reason="the optional tf_keras is not installed",
)


def refused(path, **how):
    with pytest.raises(InputError) as error, open_model(path, Opening(**how)):
        pass
    message = str(error.value)
    assert "\n" not in message
    return message


def classifier(*layers):
    return keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), *layers])


# --- Keras 2


@needs_tf_keras
@pytest.mark.parametrize(
    ("name", "version", "kind"),
    [
        ("sequential_without_input.h5", "2.2.4", "softmax removed"),
        ("functional.keras", "2.13.1", "logits"),
        ("separable_over_255.h5", "2.21.0", "logits"),
        ("nested.h5", "2.21.0", "softmax removed"),
        ("mixed_float16_with_flip.h5", "2.21.0", "softmax removed"),
    ],
)
def test_keras_2_file_opens_through_tf_keras(name, version, kind):
    expected = np.load(KERAS_2 / "expected.npz")
    images = tf.constant(expected["images"])
    with open_model(KERAS_2 / name) as opened:
        logits, outputs = logits_of(opened.model, expected["images"])
        assert outputs == kind
        assert version in opened.remarks[0]
        assert has_rescaling(opened.model) == ("255" in name)
        is_half = "float16" in name
        assert (RAISED.format("float16") in opened.remarks) == is_half
        found = logits(images) if kind == "logits" else tf.nn.softmax(logits(images))
    np.testing.assert_allclose(found, expected[Path(name).stem], atol=1e-3 if is_half else 1e-6)


@pytest.mark.parametrize("name", ["sequential_without_input.h5", "functional.keras"])
def test_without_tf_keras_the_refusal_names_it_and_the_version(name, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    message = refused(KERAS_2 / name)
    assert not [w for w in recwarn if "input_shape" in str(w.message)]  # advice to its author
    assert "[legacy]" in message
    assert ("2.2.4" if name.endswith("h5") else "2.13.1") in message


def edited(name, target, edit):
    """A copy of a Keras 2 .h5 whose config was changed by hand."""
    target.write_bytes((KERAS_2 / name).read_bytes())
    with h5py.File(target, "r+") as h5:
        config = json.loads(h5.attrs["model_config"])
        edit(config["config"]["layers"])
        h5.attrs["model_config"] = json.dumps(config)
    return target


@needs_tf_keras
def test_keras_2_file_calls_only_computations(tmp_path):
    def write_a_file(layers):
        (op,) = (layer for layer in layers if layer["class_name"] == "TFOpLambda")
        op["config"]["function"] = "io.write_file"

    message = refused(edited("separable_over_255.h5", tmp_path / "a.h5", write_a_file))
    assert "tf.io.write_file" in message


@needs_tf_keras
def test_keras_2_file_imports_nothing_of_its_choice(tmp_path):
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(KERAS_2 / "functional.keras") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    config["config"]["layers"][1] |= {"module": "subprocess", "class_name": "Popen"}
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert "module 'subprocess'" in refused(path)


# --- code


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_lambda_layer_is_refused_with_what_to_do(suffix, tmp_path):
    inner = [keras.Input((CLASSES,)), keras.layers.Lambda(lambda z: z * 2)]
    model = classifier(keras.layers.Dense(CLASSES), keras.Sequential(inner))
    model.save(tmp_path / f"a.{suffix}")
    for path in (tmp_path / f"a.{suffix}", KERAS_2 / "with_lambda.h5"):
        message = refused(path)
        assert "Lambda" in message
        assert "--import MODULE" in message


MODULE = """
import keras

class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_layers_of_the_users_own_module(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"own_layers_{suffix}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(name)
    model = classifier(keras.layers.Dense(40), module.Doubled(), keras.layers.Dense(CLASSES))
    path = tmp_path / f"a.{suffix}"
    model.save(path)
    images = np.random.default_rng(0).uniform(size=(4, *SHAPE)).astype("float32")
    with open_model(path, Opening(imports=(name,))) as opened:
        np.testing.assert_allclose(opened.model(images), model(images), atol=1e-6)
    message = refused(path)
    assert "'Doubled'" in message
    assert "--import MODULE" in message
    assert "No module named 'nowhere'" in refused(path, imports=("nowhere",))


@needs_tf_keras
def test_layers_of_the_users_own_module_in_a_keras_2_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_keras_2.py").write_text(
        "import tf_keras\n\nclass Own(tf_keras.layers.Dense):\n    pass\n"
    )
    path = edited(
        "nested.h5", tmp_path / "a.h5", lambda layers: layers[-1].update(class_name="Own")
    )
    message = refused(path)
    assert "'Own'" in message
    assert "--import MODULE" in message
    expected = np.load(KERAS_2 / "expected.npz")
    with open_model(path, Opening(imports=("own_keras_2",))) as opened:
        np.testing.assert_allclose(opened.model(expected["images"]), expected["nested"], atol=1e-6)


# --- weights alone


def test_weights_alone_are_named_and_open_with_their_network(tmp_path):
    model = build("light_cnn", "kaf", classes=4)
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    message = refused(path)
    assert "weights alone" in message
    assert "--architecture" in message
    with open_model(path, Opening(network=Network("light_cnn", "kaf", classes=4))) as opened:
        for found, expected in zip(opened.model.weights, model.weights, strict=True):
            np.testing.assert_array_equal(found, expected)
    other = Network("light_cnn", "relu", classes=4)
    assert "not those of light_cnn with relu" in refused(path, network=other)
    whole = tmp_path / "whole.keras"
    classifier(keras.layers.Dense(CLASSES)).save(whole)
    assert "whole model" in refused(whole, network=other)


# --- precision


def test_mixed_float16_of_keras_3_computes_in_float32(tmp_path):
    half = dict(dtype="mixed_float16")
    model = classifier(keras.layers.Dense(8, "relu", **half), keras.layers.Dense(CLASSES, **half))
    model.save(tmp_path / "a.keras")
    images = np.random.default_rng(0).uniform(size=(4, *SHAPE)).astype("float32")
    with open_model(tmp_path / "a.keras") as opened:
        assert opened.remarks == (RAISED.format("float16"),)
        outputs = opened.model(images)
    assert outputs.dtype == tf.float32
    a, b, c, d = (np.asarray(w) for w in model.get_weights())
    expected = np.maximum(images.reshape(4, -1) @ a + b, 0) @ c + d
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
