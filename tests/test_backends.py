"""Kaf and Kwta under whichever backend Keras runs on; needs nothing but that, NumPy and pytest.

    KERAS_BACKEND=jax python -m pytest tests/test_backends.py

in an environment without TensorFlow runs what one who wants the layers alone would.
"""

import itertools
import pathlib
import sys

import keras
import numpy as np
import pytest
from keras import ops

from activationsf import Kaf, Kwta, activation, replace_activations
from kernel_expansion import gaussian_expansion, moving_gaussian_expansion, plain_expansion

BACKEND = keras.backend.backend()
KERNELS = ["gaussian", "relu", "softplus"]
D, GAMMA = 6, 0.8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def swish(x):
    return x / (1 + np.exp(-x))


def formula(x, alpha, d, gamma, kernel="gaussian", base=None):
    difference = x[..., None, :] - d
    kappa = {
        "gaussian": lambda: np.exp(-gamma * difference**2),
        "relu": lambda: np.maximum(difference, 0),
        "softplus": lambda: np.logaddexp(0, difference),
    }[kernel]()
    return (alpha * kappa).sum(-2) + (swish(x) if base else 0)


def gradients(function, arguments, upstream, how="eager"):
    """y and the gradients of sum(upstream y) in all arguments, by the backend's own means."""
    if BACKEND == "jax":
        import jax

        def total(*arguments):
            y = function(*arguments)
            return (y * upstream).sum(), y

        differentiate = jax.value_and_grad(total, tuple(range(len(arguments))), has_aux=True)
        if how == "compiled":
            differentiate = jax.jit(differentiate)
        (_, y), found = differentiate(*arguments)
        return y, *found
    if BACKEND == "torch":
        import torch

        tensors = [torch.tensor(a, requires_grad=True) for a in arguments]
        y = function(*tensors)
        (y * torch.tensor(upstream)).sum().backward()
        return y.detach(), *[t.grad for t in tensors]
    import tensorflow as tf

    def differentiate(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = function(*arguments)
        return y, *tape.gradient(y, arguments, tf.constant(upstream))

    if how == "compiled":
        differentiate = tf.function(differentiate)
    return differentiate(*map(tf.constant, arguments))


def agree_with_finite_differences(results, exact, arguments, upstream):
    y, *found = map(numpy, results)
    arguments = [a.astype("float64") for a in arguments]
    np.testing.assert_allclose(y, exact(*arguments), atol=3e-5, rtol=3e-5)
    for i, gradient in enumerate(found):
        direction, h, ends = normal(*arguments[i].shape, seed=7), 1e-6, []
        for sign in (1, -1):
            moved = list(arguments)
            moved[i] = arguments[i] + sign * h * direction
            ends.append((upstream * exact(*moved)).sum())
        products = gradient * direction
        slope = (ends[0] - ends[1]) / (2 * h)
        assert abs(products.sum() - slope) < 1e-4 * abs(products).sum(), i


@pytest.mark.skipif(BACKEND == "tensorflow", reason="this is of the others")
def test_tensorflow_is_not_needed():
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3), (2, 3, 4, 3)], ids=lambda s: f"rank{len(s)}")
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("base", [None, "swish"])
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_expansions_and_their_gradients_equal_the_formula(moving, base, how, shape):
    function = keras.activations.get(base) if base else None
    x, upstream, alpha = 2 * normal(*shape), normal(*shape, seed=1), normal(D, 3, seed=2)
    d = np.linspace(-3, 3, D)[:, None]
    if moving:
        dictionary = (d + 0.3 * normal(D, 3, seed=3)).astype("float32")
        arguments = [x, alpha, dictionary, np.array([0.5, 0.8, 1.3], "float32")]
        results = gradients(
            lambda *a: moving_gaussian_expansion(*a, function), arguments, upstream, how
        )

        def exact(*a):
            return formula(*a, base=base)
    else:
        arguments = [x, alpha]
        results = gradients(
            lambda *a: gaussian_expansion(*a, boundary=3.0, gamma=GAMMA, base=function),
            *(arguments, upstream, how),
        )

        def exact(x, alpha):
            return formula(x, alpha, d, GAMMA, base=base)

    agree_with_finite_differences(results, exact, arguments, upstream)


def kept_for_the_backward_pass(function, x, alpha):
    """Elements of the tensors that the backend keeps."""
    if BACKEND == "jax":
        import jax

        _, backward = jax.vjp(jax.jit(function), x, alpha)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))
    import torch

    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = max(tensor.untyped_storage().nbytes() // 4, 1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*(torch.tensor(a, requires_grad=True) for a in (x, alpha)))
    return sum(kept.values())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="in test_kernel_expansion")
def test_x_alone_is_kept_for_the_backward_pass():
    x, alpha = normal(1000, 3), normal(D, 3)
    d = ops.convert_to_tensor(np.linspace(-3, 3, D).astype("float32"))
    kept = kept_for_the_backward_pass(
        lambda x, alpha: gaussian_expansion(x, alpha, boundary=3.0, gamma=GAMMA), x, alpha
    )
    assert x.size <= kept <= x.size + 3 * alpha.size
    plain = kept_for_the_backward_pass(lambda *a: plain_expansion(*a, d, GAMMA), x, alpha)
    assert plain > D * x.size  # the measure sees it


def test_a_network_that_tensorflow_saved_has_the_same_functions_here():
    folder = pathlib.Path(__file__).parents[1] / "models/cifar10_light_cnn_kaf_seed0"
    model = keras.models.load_model(folder / "model.keras")
    layer = next(layer for layer in model.layers if isinstance(layer, Kaf))
    x = 2 * normal(50, layer.alpha.shape[-1])
    d = np.linspace(-3, 3, layer.D)[:, None]
    gamma = 1 / (6 * (6 / (layer.D - 1)) ** 2)
    expected = formula(x.astype("float64"), numpy(layer.alpha), d, gamma)
    np.testing.assert_allclose(numpy(layer(x)), expected, atol=2e-5)
    logits = numpy(model(np.random.default_rng(0).random((2, 32, 32, 3), "float32")))
    assert logits.shape == (2, 10) and np.isfinite(logits).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_plain_formula_equals_numpy(kernel):
    x, alpha, d = 2 * normal(2, 4, 3), normal(D, 3, seed=2), np.linspace(-3, 3, D)
    y = plain_expansion(*map(ops.convert_to_tensor, (x, alpha, d.astype("float32"))), GAMMA, kernel)
    np.testing.assert_allclose(
        numpy(y), formula(x, alpha, d[:, None], GAMMA, kernel), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("D", [2, 20, 45])
def test_any_length_of_dictionary_and_inputs_far_out(D):
    x = np.concatenate([4 * normal(100, 1), [[1e4], [-1e4], [1e6], [np.inf], [-np.inf]]])
    x, alpha, gamma = x.astype("float32"), normal(D, 1), 1 / (6 * (6 / (D - 1)) ** 2)
    y = gaussian_expansion(
        ops.convert_to_tensor(x), ops.convert_to_tensor(alpha), boundary=3.0, gamma=gamma
    )
    d = np.linspace(-3, 3, D)[:, None]
    np.testing.assert_allclose(numpy(y), formula(x.astype("float64"), alpha, d, gamma), atol=5e-5)


@pytest.mark.parametrize("kernel, moving", list(itertools.product(KERNELS, [False, True])))
@pytest.mark.parametrize("base", ["relu", "elu", "swish"])
def test_a_base_is_where_the_layer_starts(base, kernel, moving):
    layer = Kaf(base=base, kernel=kernel, moving=moving)
    sizes = [0, 0.5, 3.2, 20, 1e6, np.inf, np.nan]
    x = np.array([[size, -size] for size in sizes], "float32")
    expected = numpy(keras.activations.get(base)(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_parameters_stay_float32_under_half_precision_and_training_lowers_the_loss(policy):
    mixed = Kaf(ridge="relu", dtype=policy)
    t = np.linspace(-3, 3, 100, dtype="float32")[:, None]
    y = mixed(t)
    assert keras.backend.standardize_dtype(y.dtype) == mixed.compute_dtype
    assert {keras.backend.standardize_dtype(w.dtype) for w in mixed.weights} == {"float32"}
    assert abs(numpy(ops.cast(y, "float32")) - np.maximum(t, 0)).max() < 0.08
    model = keras.Sequential([keras.Input((1,)), mixed])
    model.compile(keras.optimizers.SGD(0.3), "mse")
    losses = model.fit(t, np.abs(t), epochs=5, batch_size=25, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_a_network_trains_is_saved_and_keeps_k_winners(tmp_path):
    layers = [keras.Input((8, 8, 2)), keras.layers.Conv2D(3, 3), Kaf(D=4, moving=True)]
    layers += [Kwta(0.5), keras.layers.Flatten(), Kaf(D=4, base="elu"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    before = [numpy(w) + 0 for w in model.trainable_weights]
    x, y = normal(5, 8, 8, 2, seed=0), normal(5, 1, seed=1)
    history = model.fit(x, y, batch_size=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert all((a != numpy(b)).any() for a, b in zip(before, model.trainable_weights, strict=True))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(again(x)), numpy(model(x)))
    assert (numpy(layers[3](layers[2](layers[1](x)))) != 0).sum() == 5 * 54


def test_activations_of_a_network_are_exchanged():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "relu")])
    copy = replace_activations(model, lambda function: Kaf(D=3, base=function))
    x = 3 * normal(6, 5)
    np.testing.assert_allclose(numpy(copy(x)), numpy(model(x)), atol=1e-5)
    assert isinstance(copy.layers[-1], Kaf)
    assert isinstance(activation("kaf_on_swish"), Kaf)


def test_a_model_whose_inputs_leave_the_dictionary_warns_once():
    model = keras.Sequential([keras.Input((4,)), Kaf(D=3)])
    with pytest.warns(UserWarning, match="lie outside its dictionary"):
        model(10 + normal(3, 4))
