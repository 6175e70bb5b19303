"""A model with KAFs, exported, gives the same outputs in the runtimes of other formats."""

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import tf2onnx
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph

import kernel_expansion
from activationsf import Kaf
from kernel_expansion import plain_formula


def run_saved_model(path, x):
    exported = tf.saved_model.load(path)  # its variables live as long as it does
    return exported.serve(x)


def run_litert(path, x):
    interpreter = tf.lite.Interpreter(path)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


FORMATS = {
    "tf_saved_model": ("exported", run_saved_model),
    "litert": ("exported.tflite", run_litert),
    "onnx": ("exported.onnx", run_onnx),
}


@pytest.fixture(
    scope="module",
    params=[{"ridge": "swish"}, {"moving": True, "base": "relu"}],
    ids=["fixed", "moving"],
)
def model(request):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = Kaf(**request.param)(keras.layers.Conv2D(4, 3)(inputs))
    x = Kaf(**request.param)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    generator = np.random.default_rng(0)
    model.set_weights([w + generator.normal(0, 0.1, w.shape) for w in model.get_weights()])
    return model


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_what_the_model_gives(model, form, tmp_path):
    name, run = FORMATS[form]
    path = str(tmp_path / name)
    x = 2 * np.random.default_rng(1).normal(size=(5, 8, 8, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    model.export(path, format=form, verbose=False)
    np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=1e-5)


def test_tf2onnx_called_by_itself_gives_what_the_model_gives(model):
    x = 2 * np.random.default_rng(1).normal(size=(5, 8, 8, 3)).astype("float32")
    expected = model.predict(x, verbose=0)  # its compiled trace is not the one that is exported
    signature = (tf.TensorSpec((None, 8, 8, 3), name="x"),)
    traced = tf.function(lambda x: model(x))  # a new one, traced by tf2onnx
    exported, _ = tf2onnx.convert.from_function(traced, input_signature=signature)
    np.testing.assert_allclose(
        run_onnx(exported.SerializeToString(), x), expected, rtol=0, atol=1e-5
    )


def test_tf2onnx_still_needs_the_plain_formula(tmp_path, monkeypatch):
    """If this fails, the converter has learnt what it could not do: the plain formula may go."""
    model = keras.Sequential([keras.Input((3,)), Kaf()])
    x = np.zeros((1, 3), "float32")
    model.predict(x, verbose=0)
    monkeypatch.setattr(kernel_expansion, "ONNX_EXPORTERS", ())
    model.export(str(tmp_path / "m.onnx"), format="onnx", verbose=False)
    with pytest.raises(InvalidGraph):
        run_onnx(tmp_path / "m.onnx", x)


def test_the_plain_formula_ends_with_its_block():
    layer, x = Kaf(ridge="elu"), np.linspace(-4, 4, 60, dtype="float32").reshape(20, 3)
    fast = layer(x)

    def operations():
        graph = tf.function(lambda x: layer(x)).get_concrete_function(tf.constant(x)).graph
        return {operation.type for operation in graph.get_operations()}

    compiled = {"PartitionedCall", "StatefulPartitionedCall"}
    with plain_formula():
        assert not operations() & compiled
        np.testing.assert_allclose(layer(x), fast, atol=1e-5)
    assert operations() & compiled
    with pytest.raises(ZeroDivisionError), plain_formula():
        raise ZeroDivisionError
    assert operations() & compiled
