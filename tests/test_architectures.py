"""The networks have the published sizes, return logits, and give each place its own activation."""

import keras
import numpy as np
import pytest

from activationsf import Kaf
from kaf_study import InputError
from kaf_study.architectures import build, light_cnn, resnet, vgg

# Parameter counts as published for the original networks.
PUBLISHED = {
    ("resnet20", "relu"): 294_922,
    ("resnet20", "elu"): 294_922,
    ("resnet20", "swish"): 294_922,
    ("resnet20", "kaf"): 308_682,
    ("resnet56", "relu"): 882_250,
    ("light_cnn", "relu"): 75_946,
}


@pytest.mark.parametrize(("name", "activation"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, activation):
    assert build(name, activation).count_params() == PUBLISHED[name, activation]


def test_light_cnn_with_sixteen_kernels_has_the_published_count():
    assert light_cnn(lambda: Kaf(D=16)).count_params() == 81_066


def test_vgg_count_follows_from_its_layers():
    convolutions = sum(9 * i * o + o for i, o in [(3, 32), (32, 32), (32, 64), (64, 64)])
    convolutions += 9 * 64 * 128 + 128 + 9 * 128 * 128 + 128
    batch_norm = 4 * 2 * (32 + 64 + 128)
    dense = 4 * 4 * 128 * 128 + 128 + 128 * 10 + 10
    assert vgg("relu").count_params() == convolutions + batch_norm + dense


@pytest.mark.parametrize("name", ["light_cnn", "vgg", "resnet8"])
def test_outputs_are_logits(name):
    model = build(name, "relu")
    x = np.random.default_rng(0).random((4, 32, 32, 3), dtype=np.float32)
    logits = keras.ops.convert_to_numpy(model(100 * x))
    assert logits.shape == (4, 10)
    assert (logits < 0).any()
    assert np.abs(logits.sum(axis=1) - 1).max() > 1e-3
    assert model.name == name


def test_every_place_has_its_own_activation_layer():
    model = resnet(keras.layers.PReLU, depth=20)
    activations = [layer for layer in model.layers if isinstance(layer, keras.layers.PReLU)]
    assert len(activations) == 19  # one after each of the 18 block convolutions and the first
    alphas = [id(weight) for layer in activations for weight in layer.weights]
    assert len(set(alphas)) == len(alphas) == 19


def test_resnet_regularises_every_kernel_and_nothing_else():
    model = resnet("relu", depth=8, l2=5e-4)
    kernels = [w for w in model.trainable_weights if w.name == "kernel"]
    expected = 5e-4 * sum(float(np.sum(np.square(kernel.numpy()))) for kernel in kernels)
    assert len(model.losses) == len(kernels)
    np.testing.assert_allclose(float(sum(model.losses)), expected, rtol=1e-4)
    assert not resnet("relu", depth=8, l2=0).losses


@pytest.mark.parametrize(("name", "kernels"), [("light_cnn", 2), ("vgg", 2)])
def test_vgg_like_networks_regularise_dense_kernels_only(name, kernels):
    model = build(name, "relu")
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    expected = 0.0012 * sum(float(np.sum(np.square(layer.kernel.numpy()))) for layer in dense)
    assert len(model.losses) == len(dense) == kernels
    np.testing.assert_allclose(float(sum(model.losses)), expected, rtol=1e-4)


def test_resnet_halves_the_resolution_twice():
    shapes = {layer.output.shape[1:] for layer in resnet("relu", depth=8).layers[1:-2]}
    assert shapes == {(32, 32, 16), (16, 16, 32), (8, 8, 64)}


def test_dropout_rates_are_those_of_the_thesis():
    def rates(model):
        return [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert rates(vgg("relu")) == [0.2, 0.25, 0.3, 0.4]
    assert rates(light_cnn("relu")) == [0.2, 0.3, 0.4]


def test_a_saved_model_needs_keras_alone(tmp_path):
    model = light_cnn("swish")
    x = np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(x).numpy(), loaded(x).numpy())
    assert all(type(layer).__module__.startswith("keras.") for layer in [loaded, *loaded.layers])


@pytest.mark.parametrize("depth", [0, 2, 18, 21, 1208, "20", 20.0])
def test_a_depth_that_is_not_6n_plus_2_or_too_large_is_refused(depth):
    with pytest.raises(InputError, match=r"6n \+ 2, from 8 to 1202; received depth="):
        resnet("relu", depth=depth)
    if isinstance(depth, int):
        with pytest.raises(InputError, match=r"6n \+ 2, from 8 to 1202; received depth="):
            build(f"resnet{depth}", "relu")


@pytest.mark.parametrize("name", ["resnet", "resnet-8", "wrn", None])
def test_an_unknown_architecture_lists_the_known_ones(name):
    with pytest.raises(InputError, match="light_cnn, vgg, resnet20, resnet56"):
        build(name, "relu")


def test_shared_or_missing_activation_layers_are_refused():
    layer = keras.layers.PReLU(shared_axes=[1, 2])
    with pytest.raises(InputError, match="layer of its own"):
        light_cnn(layer)
    with pytest.raises(InputError, match="twice"):
        light_cnn(lambda: layer)
    with pytest.raises(InputError, match="must return a Keras layer"):
        light_cnn(lambda: keras.activations.relu)
