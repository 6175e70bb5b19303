"""Kaf is its formula under every setting, policy and backend; Kwta keeps exactly k winners."""

import itertools
import json
import math
import pathlib
import warnings
from fractions import Fraction

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import formula, normal, run_python

import activationsf
from activationsf import (
    ACTIVATIONS,
    AnnealKwta,
    Kaf,
    Kwta,
    activation,
    kaf_layers,
    replace_activations,
)

KERNEL_SETTINGS = [("gaussian", None), ("gaussian", 0.8), ("softplus", None), ("relu", None)]
STARTS = [{}, {"ridge": "elu"}, {"base": "elu"}]
SETTINGS = [
    {"kernel": kernel, "bandwidth": bandwidth, "moving": moving, **start}
    for (kernel, bandwidth), start, moving in itertools.product(
        KERNEL_SETTINGS, STARTS, [False, True]
    )
    if not (kernel == "relu" and "ridge" in start)
]


def layer_formula(layer, x):
    """The formula at a layer's weights."""
    weights = {w.name: keras.ops.convert_to_numpy(w).astype("float64") for w in layer.weights}
    d = weights.get("dictionary", np.linspace(-layer.boundary, layer.boundary, layer.D))
    gamma = layer.bandwidth or 1 / (6 * (2 * layer.boundary / (layer.D - 1)) ** 2)
    if "log_gamma" in weights:
        gamma = np.exp(weights["log_gamma"])
    y = formula(x, weights["alpha"], d, gamma, layer.kernel)
    if layer.base is not None:
        y += keras.ops.convert_to_numpy(layer.base(keras.ops.convert_to_tensor(x)))
    return y


def perturb(layer, scale=0.2):
    for i, weight in enumerate(layer.weights):
        weight.assign(np.asarray(weight) + scale * normal(*weight.shape, seed=50 + i))


# --- Kaf: the function and its gradients


@pytest.mark.parametrize("shape", [(6, 3), (2, 4, 3), (2, 3, 4, 3)], ids=lambda s: f"rank{len(s)}")
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("kernel", ["gaussian", "relu", "softplus"])
def test_kaf_equals_the_formula(kernel, moving, shape):
    layer = Kaf(D=6, kernel=kernel, moving=moving, boundary=2.5)
    layer.build(shape)
    perturb(layer)
    x = 2 * normal(*shape)
    y = layer(x)
    assert y.shape == shape and y.dtype == "float32"
    np.testing.assert_allclose(y, layer_formula(layer, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("kernel", ["gaussian", "softplus", "relu"])
@pytest.mark.parametrize("base", [None, "swish"])
def test_every_gradient_equals_finite_differences(kernel, moving, base):
    exact = Kaf(D=5, kernel=kernel, moving=moving, base=base, dtype="float64")
    fast = Kaf(D=5, kernel=kernel, moving=moving, base=base)
    x, upstream = 2 * normal(40, 3, dtype="float64"), normal(40, 3, seed=1, dtype="float64")
    for layer in (exact, fast):
        layer.build((None, 3))
    perturb(exact)
    fast.set_weights(exact.get_weights())

    def gradients(layer):
        x_ = tf.constant(x, layer.dtype)
        weights = [weight.value for weight in layer.trainable_weights]
        with tf.GradientTape() as tape:
            tape.watch(x_)
            y = layer(x_)
            assert y.dtype == layer.dtype
        return tape.gradient(y, [x_, *weights], tf.constant(upstream, layer.dtype))

    in_x, *in_weights = gradients(exact)
    assert len(in_weights) == {("gaussian", True): 3}.get((kernel, moving), 1 + moving)
    h = 1e-6

    def total(x):
        return upstream * np.asarray(exact(tf.constant(x)))

    np.testing.assert_allclose(in_x, (total(x + h) - total(x - h)) / (2 * h), atol=1e-7)
    for weight, gradient in zip(exact.trainable_weights, in_weights, strict=True):
        value = np.asarray(weight)
        for index in np.ndindex(value.shape):
            sums = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * h
                weight.assign(moved)
                sums.append(total(x).sum())
            weight.assign(value)
            slope = (sums[0] - sums[1]) / (2 * h)
            assert float(gradient[index]) == pytest.approx(slope, rel=1e-6, abs=1e-6), weight.name
    for a, b in zip(gradients(fast), [in_x, *in_weights], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("ridge", ["relu", "elu", "swish", "tanh", keras.activations.gelu])
def test_ridge_starts_as_its_function_in_every_channel(ridge, moving):
    layer = Kaf(ridge=ridge, moving=moving)
    x = np.repeat(np.linspace(-3, 3, 200, dtype="float32")[:, None], 2, axis=1)
    np.testing.assert_allclose(layer(x), keras.activations.get(ridge)(x), atol=0.06)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("kernel", ["gaussian", "softplus", "relu"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float16", "float64"])
@pytest.mark.parametrize("base", ["relu", "elu", "swish", keras.activations.gelu])
def test_with_a_base_it_starts_as_that_for_every_input(base, policy, kernel, moving):
    layer = Kaf(base=base, kernel=kernel, moving=moving, dtype=policy)
    sizes = [0, 1e-3, 0.5, 3.2, 20, 1e4, 1e6, np.inf, np.nan]
    x = tf.cast([[size, -size] for size in sizes], layer.compute_dtype)
    sum_dtype = "float64" if policy == "float64" else "float32"
    expected = tf.cast(keras.activations.get(base)(tf.cast(x, sum_dtype)), layer.compute_dtype)
    one_rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(layer.compute_dtype, 1e-6)
    np.testing.assert_allclose(
        *(tf.cast(y, "float64") for y in (layer(x), expected)), rtol=one_rounding, atol=1e-6
    )


def test_alpha_may_start_elsewhere_with_a_base():
    layer = Kaf(D=3, base="relu", alpha_initializer=keras.initializers.Constant(0.5))
    x = 2 * normal(6, 2)
    np.testing.assert_allclose(layer(x), layer_formula(layer, x), rtol=2e-5, atol=2e-5)
    assert (np.asarray(layer.alpha) == 0.5).all()


def test_the_random_start_has_the_thesis_spread():
    layer = Kaf()
    layer.build((None, 500))
    assert float(np.std(layer.alpha)) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    "settings, parameters",
    [
        ({}, 20 * 7),
        ({"D": 16, "ridge": "relu"}, 16 * 7),
        ({"moving": True}, 20 * 7 + 20 * 7 + 7),
        ({"moving": True, "kernel": "softplus"}, 2 * 20 * 7),
    ],
)
def test_kaf_counts_only_what_it_trains(settings, parameters):
    layer = Kaf(**settings)
    layer.build((None, 4, 4, 7))
    assert layer.count_params() == parameters
    assert len(layer.non_trainable_weights) == 0


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_half_precision_rounds_only_input_and_output(policy, moving):
    mixed, full = (Kaf(ridge="relu", moving=moving, dtype=d) for d in (policy, "float32"))
    x = tf.cast(2 * normal(300, 4), policy.removeprefix("mixed_"))
    y = mixed(x)
    assert y.dtype == x.dtype and {w.dtype for w in mixed.weights} == {"float32"}
    expected = full(tf.cast(x, "float32"))
    one_rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[x.dtype.name]
    np.testing.assert_allclose(tf.cast(y, "float32"), expected, rtol=1.01 * one_rounding, atol=1e-6)


# --- Kaf: settings, saving


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"D": 1}, "at least 2 points; received D=1"),
        ({"D": 5.0}, "integer D"),
        ({"D": True}, "integer D"),
        ({"D": "20"}, "integer D.*received D='20'"),
        ({"boundary": "3"}, "positive, finite boundary; received '3'"),
        ({"boundary": None}, "positive, finite boundary; received None"),
        ({"boundary": np.ones(2)}, "positive, finite boundary"),
        ({"bandwidth": "1"}, "bandwidth must be positive"),
        ({"bandwidth": True}, "bandwidth must be positive"),
        ({"kernel": ["gaussian"]}, "knows the kernels"),
        ({"moving": "no"}, "moving is True or False; received 'no'"),
        ({"base": lambda t: t}, "base must be a function that can be saved"),
        ({"base": "no_such_function"}, "base must be.* received 'no_such_function'"),
        ({"base": "relu", "ridge": "elu"}, "not both; received base='relu', ridge='elu'"),
        ({"boundary": 0}, "positive, finite boundary; received 0"),
        ({"boundary": math.inf}, "positive, finite boundary"),
        ({"boundary": math.nan}, "positive, finite boundary"),
        ({"kernel": "cauchy"}, "gaussian, relu, softplus; received 'cauchy'"),
        ({"bandwidth": -1}, "bandwidth must be positive"),
        ({"bandwidth": 0}, "bandwidth must be positive"),
        ({"bandwidth": math.nan}, "bandwidth must be positive"),
        ({"bandwidth": 1.0, "kernel": "softplus"}, "goes with the Gaussian kernel"),
        ({"ridge": "relu", "kernel": "relu"}, "ReLU kernel cannot start as a given function"),
        ({"ridge": lambda t: t}, "ridge must be a function that can be saved"),
        ({"ridge": "no_such_function"}, "received 'no_such_function'"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Kaf(**settings)


@pytest.mark.parametrize("shape", [(None, None), (None, 8, 8, None), (3,)])
def test_inputs_without_a_known_last_axis_are_refused(shape):
    with pytest.raises(ValueError, match="last axis of known size; received input_shape"):
        Kaf().build(shape)


def test_another_channel_count_than_built_for_is_refused():
    layer = Kaf(D=3)
    layer(normal(2, 4))
    with pytest.raises(ValueError, match=r"expected axis -1 of input shape to have value 4"):
        layer(normal(2, 5))
    with pytest.raises(ValueError, match="min_ndim=2"):
        layer(normal(4))


@keras.saving.register_keras_serializable(package="tests")
def leaky_sine(x):
    return 0.1 * x + keras.ops.sin(x)


FULL_SETTINGS = [
    *SETTINGS,
    pytest.param({"ridge": leaky_sine}, id="ridge_function"),
    pytest.param({"base": leaky_sine}, id="base_function"),
    pytest.param(
        {
            "D": 7,
            "boundary": 2.0,
            "bandwidth": 1.5,
            "alpha_initializer": keras.initializers.RandomUniform(-1, 1, seed=3),
            "alpha_regularizer": keras.regularizers.L2(0.1),
            "alpha_constraint": keras.constraints.MaxNorm(2.0),
            "name": "all_of_them",
            "dtype": "mixed_bfloat16",
            "trainable": False,
        },
        id="all_of_them",
    ),
    pytest.param(
        {
            "D": np.int64(4),
            "boundary": np.float32(2.5),
            "bandwidth": np.float32(0.5),
            "moving": np.bool_(True),
        },
        id="numpy_scalars",
    ),
]


@pytest.mark.parametrize("settings", FULL_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_layer_is_made_again_from_its_config(settings):
    layer = Kaf(**settings)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == layer.get_config()
    assert again.ridge is layer.ridge and again.base is layer.base
    assert again.trainable == layer.trainable
    names = {"D", "ridge", "base", "moving", "boundary", "kernel", "bandwidth"}
    for value in layer.get_config().values():
        assert not isinstance(value, np.generic)  # plain JSON
    names |= {"alpha_initializer", "alpha_regularizer", "alpha_constraint"}
    assert names <= set(layer.get_config())


@pytest.mark.parametrize("layer", [Kaf(D=4, ridge="elu"), Kwta(0.3)], ids=["kaf", "kwta"])
@pytest.mark.parametrize("conv", [None, True, False])
def test_configs_of_old_files_may_hold_conv_and_new_code_may_not(layer, conv):
    config = keras.saving.serialize_keras_object(layer)
    assert "conv" not in config["config"]
    old = {**config, "config": {**config["config"], "conv": conv}}
    assert keras.saving.deserialize_keras_object(old).get_config() == layer.get_config()
    with pytest.raises(ValueError, match="conv"):
        type(layer)(conv=conv)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model with a Kaf of every combination of settings and a Kwta; inputs and outputs."""
    folder = tmp_path_factory.mktemp("saved")
    inputs = keras.Input((3,))
    outputs = [Kaf(D=4, **settings)(inputs) for settings in SETTINGS] + [Kwta(0.5)(inputs)]
    model = keras.Model(inputs, outputs)
    for layer in model.layers:
        if isinstance(layer, Kaf):
            perturb(layer)
    model.layers[-1].ratio.assign(0.3)
    x = normal(5, 3)
    model.save(folder / "model.keras")
    np.savez(folder / "arrays.npz", x, *model(x))
    return folder


def test_saved_layers_of_every_setting_give_the_same_outputs(saved):
    x, *expected = np.load(saved / "arrays.npz").values()
    model = keras.models.load_model(saved / "model.keras")
    for layer, a, b in zip(model.layers[1:], model(x), expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(layer.get_config()))
        if isinstance(layer, Kaf):  # the weights were loaded, not made anew
            np.testing.assert_allclose(a, layer_formula(layer, x), atol=1e-5)


LOAD_AND_COMPARE = """
    import sys
    import keras
    import numpy as np
    import activationsf

    folder = sys.argv[1]
    x, *expected = np.load(folder + "/arrays.npz").values()
    outputs = keras.models.load_model(folder + "/model.keras")(x)
    for a, b in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(a), b, atol=2e-5)
    print(len(outputs))
"""


def test_saved_layers_load_in_a_fresh_process_that_imports_the_module(saved):
    assert int(run_python(LOAD_AND_COMPARE, saved)) == len(SETTINGS) + 1


def test_a_registered_function_is_a_ridge_target_and_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), Kaf(ridge=leaky_sine)])
    x = np.linspace(-3, 3, 40, dtype="float32").reshape(-1, 2)
    np.testing.assert_allclose(model(x), leaky_sine(x), atol=0.03)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].ridge is leaky_sine
    np.testing.assert_array_equal(loaded(x), model(x))


# --- Kaf: training and Keras' conventions


@pytest.mark.parametrize("how", ["jit", "graph", "eager"])
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_it_trains(how, moving):
    layer = Kaf(D=3, moving=moving)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), layer])
    model.compile("sgd", "mse", jit_compile=how == "jit", run_eagerly=how == "eager")
    before = [np.array(weight) for weight in model.trainable_weights]
    history = model.fit(normal(7, 2), normal(7, 3, seed=1), batch_size=4, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    for old, weight in zip(before, model.trainable_weights, strict=True):
        assert np.isfinite(weight).all() and not np.array_equal(old, weight), weight.path


def test_a_trained_bandwidth_stays_positive_whatever_the_steps():
    keras.utils.set_random_seed(0)
    layer = Kaf(D=4, moving=True)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(100.0, clipnorm=0.1), "mse")  # steps of 10
    start = np.asarray(layer.gamma)
    for seed in range(3):
        model.fit(normal(8, 3, seed=seed), normal(8, 3, seed=seed + 9), verbose=0)
    gamma = np.asarray(layer.gamma)
    assert (gamma > 0).all() and np.isfinite(gamma).all()
    assert abs(gamma - start).max() > start.max()  # steps that could have taken it below 0


def test_regulariser_and_constraint_of_alpha_apply():
    layer = Kaf(D=4, alpha_regularizer="l2", alpha_constraint="non_neg")
    model = keras.Sequential([keras.Input((3,)), layer])
    assert [float(loss) for loss in model.losses] == [
        pytest.approx(0.01 * np.square(layer.alpha).sum(), rel=1e-5)
    ]
    assert (np.asarray(layer.alpha) < 0).any()
    model.compile("sgd", "mse")
    model.fit(normal(4, 3), normal(4, 3), verbose=0)
    assert (np.asarray(layer.alpha) >= 0).all()


LAYERS = {"prelu": keras.layers.PReLU, "kaf": lambda: Kaf(D=3), "kwta": lambda: Kwta(0.5)}


@pytest.mark.parametrize("name", LAYERS)
def test_it_follows_the_conventions_of_prelu(name):
    make = LAYERS[name]
    assert make().supports_masking
    assert make().compute_output_shape((None, 5, 3)) == (None, 5, 3)
    symbolic = make()(keras.Input((4, 4, 3), dtype="float32"))
    assert symbolic.shape == (None, 4, 4, 3) and symbolic.dtype == "float32"
    model = keras.Sequential([keras.layers.Conv2D(2, 3), make(), keras.layers.Flatten()])
    assert model.predict(normal(3, 6, 6, 1), verbose=0).shape == (3, 32)
    # in TimeDistributed, a step at a time; and masks pass
    x = normal(2, 3, 4)
    layer = make()
    stepped = keras.layers.TimeDistributed(layer)(x)
    for step in range(3):
        np.testing.assert_allclose(stepped[:, step], layer(x[:, step]), atol=1e-6)
    masked = keras.layers.Masking()(tf.concat([x, tf.zeros((2, 1, 4))], 1))
    mask = keras.src.backend.get_keras_mask(make()(masked))
    np.testing.assert_array_equal(mask, [[True, True, True, False]] * 2)


def test_kaf_works_in_a_model_of_unknown_spatial_size():
    model = keras.Sequential([keras.Input((None, None, 2)), Kaf(D=3), Kwta(0.5)])
    assert model.output_shape == (None, None, None, 2)
    for size in (3, 5):
        y = model.predict(normal(2, size, 4, 2), verbose=0)
        assert (y != 0).sum() == 2 * size * 4


# --- Kaf: inputs outside the dictionary


def ranges_warned_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "outside its dictionary" in str(w.message)]


def wide(share):
    """100 values, of which this share lies outside [-3, 3]."""
    x = np.linspace(-3, 3, 100, dtype="float32")
    x[: round(100 * share)] = [-3.01, 4] * round(50 * share)
    return np.random.default_rng(0).permutation(x).reshape(25, 4)


def test_a_model_whose_inputs_leave_the_dictionary_warns_once():
    model = keras.Sequential([keras.Input((4,)), Kaf(D=3, name="early"), Kaf(D=3, name="late")])
    (said,) = ranges_warned_of(lambda: model(wide(0.06)))
    assert said.startswith("6% of the inputs of 'early' lie outside its dictionary")
    assert not ranges_warned_of(lambda: model(wide(0.5)))


def test_it_warns_of_the_first_values_only_and_not_where_there_is_no_cause():
    def model(**settings):
        return keras.Sequential([keras.Input((4,)), Kaf(D=3, **settings)])

    assert ranges_warned_of(lambda: model()(wide(0.06)))
    assert not ranges_warned_of(lambda: model()(wide(0.04)))
    assert ranges_warned_of(lambda: model(moving=True)(wide(0.06)))
    for settings in ({"base": "relu"}, {"kernel": "softplus"}, {"kernel": "relu"}, {"boundary": 5}):
        assert not ranges_warned_of(lambda s=settings: model(**s)(wide(0.06))), settings
    # a plot of the layer by itself, and a graph
    assert not ranges_warned_of(lambda: model().layers[0](wide(0.06)))
    assert not ranges_warned_of(lambda: model().predict(wide(0.06), verbose=0))


def test_the_share_outside_is_counted_per_channel_where_the_dictionary_moved():
    layer = Kaf(D=3, moving=True)
    layer.build((None, 2))
    layer.dictionary.assign([[-1, -9], [0, 0], [2, 9]])
    x = np.array([[-1, -9.1], [2, 9], [2.1, 0], [-1.1, 0]], "float32")
    assert layer.share_outside(x) == 3 / 8


# --- replace_activations


def on_its_base(function):
    return Kaf(D=4, base=function)


def logits_agree(model, copy, x):
    expected = np.asarray(model(x))
    assert expected.any()
    np.testing.assert_allclose(copy(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def spread_out(model):
    """Weights as in no fresh network, moving statistics included."""
    for i, weight in enumerate(model.weights):
        weight.assign(np.abs(np.asarray(weight) + 0.05 * normal(*weight.shape, seed=i)))


def network():
    """Every way to hold an activation, in a functional model with a nested and a shared part."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, "elu"), layers.ReLU(), layers.Dense(6, "tanh")]
    )
    shared = layers.Dense(6, "gelu", name="shared")
    inputs = keras.Input((8, 8, 3))
    normalise = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(normalise(inputs))
    x = layers.BatchNormalization()(layers.SeparableConv2D(6, 3, activation="swish")(x))
    x = layers.GlobalAveragePooling2D()(layers.Activation("swish", name="swish")(x))
    x = shared(shared(inner(x))) + keras.ops.sin(x)
    x = layers.ELU()(layers.ReLU(max_value=6)(layers.LeakyReLU()(x)))
    outputs = layers.Dense(3, "softmax")(layers.ELU(alpha=0.5)(x))
    return keras.Model(inputs, outputs)


def test_every_activation_is_exchanged_and_the_outputs_stay():
    model = network()
    spread_out(model)
    before = model.get_config(), model.get_weights()
    copy = replace_activations(model, on_its_base)
    x = normal(5, 8, 8, 3)
    logits_agree(model, copy, x)
    found = [(layer.name, layer.base.__name__) for layer in kaf_layers(copy)]
    assert sorted(base for _, base in found) == [
        "elu",
        "elu",
        "gelu",
        "relu",
        "relu",
        "silu",
        "silu",
    ]
    assert {("conv_activation", "relu"), ("swish", "silu"), ("shared_activation", "gelu")} <= {
        *found
    }
    assert copy.get_layer("conv").activation is keras.activations.linear
    # the original is as it was, and shares nothing
    assert model.get_config() == before[0]
    copy.get_layer("conv").kernel.assign(0 * copy.get_layer("conv").kernel)
    for a, b in zip(model.get_weights(), before[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_copy_trains_every_kaf_and_is_saved(tmp_path):
    copy = replace_activations(network(), on_its_base)
    copy.compile(keras.optimizers.SGD(0.1), "mse")
    copy.fit(normal(4, 8, 8, 3), normal(4, 3, seed=1), verbose=0)
    assert all(np.asarray(layer.alpha).any() for layer in kaf_layers(copy))
    copy.save(tmp_path / "model.keras")
    x = normal(2, 8, 8, 3)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), copy(x))


def test_other_activations_are_exchanged_where_they_are_named():
    copy = replace_activations(network(), on_its_base, ["relu6", keras.activations.tanh])
    assert sorted(layer.base.__name__ for layer in kaf_layers(copy)) == ["relu6", "tanh"]


def test_a_sequential_model_and_a_name_will_do():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(2)], name="mine"
    )
    model.compile("sgd", "mse")
    copy = replace_activations(model, "kwta")
    assert isinstance(copy.layers[1], Kwta) and copy.name == "mine" and copy.compiled
    x = normal(3, 5)
    hidden = model.layers[0](x)
    np.testing.assert_allclose(copy(x), model.layers[1](Kwta()(hidden.numpy() * 1)), atol=1e-6)


def test_policy_and_freezing_go_over_to_the_new_layer():
    frozen = keras.layers.Dense(2, "relu", trainable=False, dtype="mixed_bfloat16")
    copy = replace_activations(keras.Sequential([keras.Input((3,)), frozen]), on_its_base)
    assert copy.layers[1].compute_dtype == "bfloat16" and not copy.trainable_weights


def blocks():
    """A residual block as of ResNet50, then an inverted one as of MobileNetV3, small."""
    layers = keras.layers

    def normalised(layer, x):
        return layers.BatchNormalization()(layer(x))

    inputs = keras.Input((32, 32, 3))
    x = layers.ZeroPadding2D(3)(layers.Rescaling(1 / 127.5, offset=-1)(inputs))
    x = layers.Activation("relu")(normalised(layers.Conv2D(8, 7, strides=4), x))
    x = skip = layers.MaxPooling2D(3, strides=2)(layers.ZeroPadding2D(1)(x))
    x = layers.Activation("relu")(normalised(layers.Conv2D(4, 1), x))
    x = layers.Add()([skip, normalised(layers.Conv2D(8, 1), x)])
    x = skip = layers.Activation("relu")(x)
    x = layers.Activation("hard_silu")(normalised(layers.Conv2D(16, 1), x))
    x = layers.ReLU()(normalised(layers.DepthwiseConv2D(3, padding="same"), x))
    gate = layers.Conv2D(4, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x))
    gate = layers.ReLU(6.0)(layers.Conv2D(16, 1)(layers.ReLU()(gate)) + 3.0) * (1 / 6)
    x = normalised(layers.Conv2D(8, 1), layers.Multiply()([x, gate]))
    x = layers.GlobalAveragePooling2D(keepdims=True)(layers.Add()([skip, x]))
    x = layers.Conv2D(4, 1)(layers.Dropout(0.2)(x))
    return keras.Model(inputs, layers.Flatten()(x))


@pytest.mark.parametrize(
    "name, exchanged",
    [
        ("blocks", 5),
        pytest.param("MobileNetV3Small", 14, marks=pytest.mark.slow),
        pytest.param("ResNet50", 49, marks=pytest.mark.slow),
    ],
)
def test_the_networks_of_keras_applications_keep_their_outputs_and_train(name, exchanged):
    keras.utils.set_random_seed(0)
    if name == "blocks":
        model = blocks()
    else:
        make = getattr(keras.applications, name)
        model = make(weights=None, input_shape=(32, 32, 3), classes=4, classifier_activation=None)
    copy = replace_activations(model, lambda function: Kaf(D=2, base=function))
    assert len(kaf_layers(copy)) == exchanged
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    logits_agree(model, copy, x)
    copy.compile(keras.optimizers.SGD(1e-3, clipnorm=1e-3), "mse")  # gradients of a fresh network
    copy.fit(x, np.ones((2, 4), "float32"), verbose=0)
    changed = [np.asarray(layer.alpha).any() for layer in kaf_layers(copy)]
    assert all(changed) and np.isfinite(copy(x)).all()


def test_a_finished_network_of_this_project_keeps_its_logits():
    folder = pathlib.Path(__file__).parents[1] / "models/cifar10_light_cnn_relu_seed0"
    model = keras.models.load_model(folder / "model.keras")
    copy = replace_activations(model, on_its_base)
    assert len(kaf_layers(copy)) == 5
    logits_agree(model, copy, np.random.default_rng(0).random((8, 32, 32, 3), "float32"))


def test_what_cannot_be_exchanged_is_refused():
    layers = keras.layers
    with pytest.raises(ValueError, match=r"has none of the activations relu, elu, swish, gelu"):
        replace_activations(keras.Sequential([keras.Input((2,)), layers.Dense(2)]), on_its_base)
    with pytest.raises(ValueError, match="built by an Input or by its first call"):
        replace_activations(keras.Sequential([layers.Dense(2, "relu")]), on_its_base)
    with pytest.raises(ValueError, match="functional and of built Sequential models"):
        replace_activations(type("Own", (keras.Model,), {})(), on_its_base)
    relu = keras.Sequential([keras.Input((2,)), layers.ReLU()])
    with pytest.raises(ValueError, match="returns a Keras layer; got"):
        replace_activations(relu, lambda function: function)
    with pytest.raises(ValueError, match="Unknown activation 'tanh'"):
        replace_activations(relu, "tanh")


# --- Kwta


def exact_k(ratio, size):
    """ceil(ratio * size) for the ratio as written in decimals."""
    return math.ceil(Fraction(str(ratio)) * size)


@pytest.mark.parametrize("size", [1, 3, 10, 100, 1000, 16384])
def test_kwta_keeps_exactly_the_ceiling(size):
    layer = Kwta()
    x = np.random.default_rng(0).permutation(size).astype("float32")[None] + 1
    layer(x)
    for ratio in [0.01, 0.07, 0.1, 0.15, 0.2, 0.29, 0.3, 0.35, 0.5, 0.56, 0.57, 0.58, 0.7, 1.0]:
        layer.ratio.assign(ratio)
        k = exact_k(ratio, size)
        np.testing.assert_array_equal(layer(x), np.where(x > size - k, x, 0))


@pytest.mark.parametrize("shape", [(3, 20), (3, 2, 5, 2)], ids=["dense", "4D"])
def test_kwta_keeps_exactly_k_of_equal_values(shape):
    for value in (1.0, -1.0):
        y = np.asarray(Kwta(0.25)(np.full(shape, value, "float32"))).reshape(3, -1)
        np.testing.assert_array_equal(y, [[value] * 5 + [0] * 15] * 3)
    # ties at the threshold alone: 7 and 6 are above, two of the four 5s are left
    x = np.array([[5, 1, 7, 5, 0, 5, 6, 5]], "float32")
    np.testing.assert_array_equal(Kwta(0.5)(x), [[5, 0, 7, 5, 0, 0, 6, 0]])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kth_largest_is_that_of_sorting(scale, dtype):
    if dtype == "float16" and scale in (1e-30, 1e30):
        pytest.skip("outside float16")
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.normal(0, scale, (3, 1000)),
            np.maximum(rng.normal(0, scale, (3, 1000)), 0),  # many equal to the smallest
            np.minimum(rng.normal(0, scale, (3, 1000)), 0),  # many equal to the largest
            rng.normal(5 * scale, scale, (3, 1000)),
            np.full((1, 1000), scale),
        ]
    ).astype(dtype)
    for k in (1, 2, 150, 400, 999, 1000):
        expected = np.sort(x, axis=-1)[:, -k, None]
        np.testing.assert_array_equal(activationsf.kth_largest(x, k), expected)


def test_kwta_keeps_negative_winners_and_puts_0_elsewhere():
    y = Kwta(0.5)(np.array([[-4, -1, -3, -2], [1, -9, 3, -8]], "float32"))
    np.testing.assert_array_equal(y, [[0, -1, 0, -2], [1, 0, 3, 0]])


def test_kwta_chooses_over_the_whole_layer_alike_in_both_data_formats():
    x = normal(4, 5, 6, 3)
    last = np.asarray(Kwta(0.2)(x))
    first = Kwta(0.2, data_format="channels_first")(x.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(np.transpose(first, (0, 2, 3, 1)), last)
    threshold = np.sort(x.reshape(4, -1))[:, -18][:, None, None, None]
    np.testing.assert_array_equal(last, np.where(x >= threshold, x, 0))


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_kwta_keeps_the_compute_dtype_and_the_count(dtype):
    layer = Kwta(0.15, dtype=dtype)
    y = layer(tf.constant(1 + normal(2, 100) ** 2))
    assert y.dtype == layer.compute_dtype
    np.testing.assert_array_equal(np.count_nonzero(y, axis=1), [15, 15])


def test_the_gradient_through_kwta_is_1_on_winners_and_0_elsewhere():
    x = tf.constant(normal(3, 20))
    layer = Kwta(0.3)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    np.testing.assert_array_equal(tape.gradient(y, x), (np.asarray(y) != 0).astype("float32"))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"ratio": 0}, r"fraction in \(0, 1\]; received 0"),
        ({"ratio": 1.1}, "received 1.1"),
        ({"ratio": math.nan}, "received nan"),
        ({"ratio": "0.2"}, "received '0.2'"),
        ({"data_format": "NCHW"}, "received 'NCHW'"),
    ],
)
def test_kwta_refuses_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        Kwta(**settings)


@pytest.mark.parametrize("settings", [{"step": 0}, {"every": 0}, {"final": 0}, {"final": 2}])
def test_annealing_refuses_bad_settings(settings):
    with pytest.raises(ValueError, match="AnnealKwta needs step > 0"):
        AnnealKwta(**settings)


def test_annealing_lowers_the_ratio_by_a_hundredth_every_second_epoch_and_it_is_saved(tmp_path):
    inner = keras.Sequential([keras.layers.Dense(1000), Kwta(0.3)])  # nested models too
    model = keras.Sequential([keras.Input((2,)), inner, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    layer, x = inner.layers[1], np.zeros((1, 2), "float32")
    ties = np.ones((1, 1000), "float32")
    ratios, kept = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ratios.append(float(layer.ratio))
            kept.append(np.count_nonzero(layer(ties)))

    model.fit(x, x[:, :1], epochs=36, verbose=0, callbacks=[AnnealKwta(), Watch()])
    hundredths = [max(30 - epoch // 2, 15) for epoch in range(36)]
    np.testing.assert_allclose(ratios, np.array(hundredths) / 100, atol=1e-6)
    assert kept == [10 * h for h in hundredths]  # k stays exact along the way
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.layers[0].layers[1].ratio) == float(layer.ratio)
    assert loaded.layers[0].layers[1].get_config()["ratio"] == 0.3
    assert not layer.trainable_weights


def test_annealing_starts_where_fine_tuning_does_and_never_raises_a_ratio():
    model = keras.Sequential([keras.Input((10,)), Kwta(0.3), Kwta(0.1)])
    model.compile("sgd", "mse")
    x = np.ones((1, 10), "float32")
    model.fit(x, x, epochs=7, verbose=0, callbacks=[AnnealKwta(step=0.02, every=3, start=3)])
    assert [float(layer.ratio) for layer in model.layers] == pytest.approx([0.28, 0.1])


# --- activation(name)


def test_activation_gives_a_fresh_layer_for_every_name():
    names = "relu elu swish kaf kaf_relu kaf_elu kaf_swish kaf_free".split()
    names += "kaf_on_relu kaf_on_elu kaf_on_swish kwta".split()
    assert list(ACTIVATIONS) == names
    for name in names:
        one, two = activation(name), activation(name)
        assert isinstance(one, keras.layers.Layer) and one is not two
    settings = {name: activation(name).get_config() for name in names}
    assert [settings[n]["activation"] for n in names[:3]] == ["relu", "elu", "silu"]
    kafs = [(settings[n]["ridge"], settings[n]["moving"]) for n in names[3:8]]
    assert kafs == [(None, False), ("relu", False), ("elu", False), ("silu", False), (None, True)]
    on = [(settings[n]["base"], settings[n]["moving"]) for n in names[8:11]]
    assert on == [("relu", False), ("elu", False), ("silu", False)]
    assert activationsf.Kwta in type(activation("kwta")).__mro__


def test_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'gelu'. Choose one of: relu, .*kaf_on_swish, kwta"):
        activation("gelu")
