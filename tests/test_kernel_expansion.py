"""The fast expansions are the plain formula: values, gradients, higher orders, shapes, memory.

The yardstick is the formula in NumPy, float64. Errors are taken relative to the largest kernel term
at the same x, |alpha_i kappa_i|: ridge coefficients cancel, so the sum itself is no yardstick.
"""

import numpy as np
import pytest
import tensorflow as tf
from keras import activations
from toys import formula, normal, run_python

import kernel_expansion
from kernel_expansion import (
    PARTS,
    RIDGE_EPSILON,
    equally_spaced_dictionary,
    gaussian_expansion,
    moving_gaussian_expansion,
    plain_expansion,
    ridge_coefficients,
    rule_of_thumb_bandwidth,
)

TOLERANCE = 2e-5  # of the largest kernel term
FLOOR = 1e-16  # of the largest term anywhere: the fast form is 0 where all kernels are below e^-45


def rule_of_thumb(D, boundary=3.0, scale=1.0):
    return scale * rule_of_thumb_bandwidth(D, boundary)


def ridge_alpha(D, boundary, gamma, channels, target=activations.relu):
    column = ridge_coefficients(target, equally_spaced_dictionary(D, boundary), gamma)
    return np.repeat(column[:, None], channels, axis=1).astype("float32")


def value_and_gradients(function, *arguments, upstream):
    """y and the gradients of sum(upstream * y) in all arguments."""
    arguments = [tf.constant(a) for a in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        y = function(*arguments)
    return y, *tape.gradient(y, arguments, tf.constant(upstream, y.dtype))


# --- dictionary, plain formula, ridge


def test_the_dictionary_is_symmetric_with_equal_steps_and_gives_the_papers_bandwidth():
    d = equally_spaced_dictionary(20, 3.0)
    np.testing.assert_allclose(np.diff(d), 6 / 19, rtol=1e-12)
    np.testing.assert_allclose(d, -d[::-1], atol=1e-15)
    assert rule_of_thumb_bandwidth(20, 3.0) == pytest.approx(1 / (6 * (6 / 19) ** 2))


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 4), (2, 3, 5, 4)], ids=lambda s: f"rank{len(s)}")
@pytest.mark.parametrize("kernel", ["gaussian", "relu", "softplus"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["shared", "per_channel"])
def test_plain_formula_equals_numpy(kernel, shape, per_channel):
    x, alpha = 2 * normal(*shape, dtype="float64"), normal(6, 4, seed=1, dtype="float64")
    d, gamma = equally_spaced_dictionary(6, 3.0), 0.7
    if per_channel:
        d, gamma = d[:, None] + 0.3 * normal(6, 4, seed=2), np.array([0.3, 0.7, 1.0, 2.0])
    y = plain_expansion(*map(tf.constant, (x, alpha, d)), gamma, kernel)
    np.testing.assert_allclose(y, formula(x, alpha, d, gamma, kernel), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name, tolerance", [("relu", 0.06), ("elu", 0.015), ("swish", 0.015), ("tanh", 0.004)]
)
def test_ridge_start_reproduces_the_function_on_the_dictionary_range(name, tolerance):
    d, gamma = equally_spaced_dictionary(20, 3.0), rule_of_thumb(20)
    alpha = ridge_coefficients(activations.get(name), d, gamma)
    x = np.linspace(-3, 3, 1001)[:, None]
    expected = np.asarray(activations.get(name)(tf.constant(x)))
    np.testing.assert_allclose(formula(x, alpha[:, None], d, gamma), expected, atol=tolerance)
    # On its own points only the ridge term is left.
    fitted = formula(d[:, None], alpha[:, None], d, gamma)[:, 0]
    residual = RIDGE_EPSILON * alpha
    np.testing.assert_allclose(np.asarray(activations.get(name)(d)) - fitted, residual, atol=1e-11)


@pytest.mark.parametrize("kernel, gamma", [("gaussian", rule_of_thumb(20)), ("softplus", None)])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-4])
def test_ridge_solves_its_system_in_float64(kernel, gamma, epsilon):
    d = equally_spaced_dictionary(20, 3.0)
    alpha = ridge_coefficients(activations.elu, d, gamma, kernel, epsilon)
    difference = d[:, None] - d
    K = np.exp(-gamma * difference**2) if gamma else np.logaddexp(0, difference)
    target = np.where(d > 0, d, np.expm1(d))
    residual = (K + epsilon * np.eye(20)) @ alpha - target
    assert alpha.dtype == np.float64
    assert np.abs(residual).max() < 1e-13 * np.abs(K).sum(1).max() * np.abs(alpha).max()


def test_ridge_refuses_the_relu_kernel():
    with pytest.raises(ValueError, match="ReLU kernel cannot start as a given function"):
        ridge_coefficients(activations.relu, equally_spaced_dictionary(5, 3.0), None, "relu")


@pytest.mark.parametrize(
    "target, said",
    [(tf.reduce_sum, r"shape \(\)"), (tf.math.log, "finite: False"), (lambda t: t[1:], r"\(4,\)")],
    ids=["sum", "log", "shorter"],
)
def test_ridge_refuses_what_is_not_an_elementwise_finite_function(target, said):
    with pytest.raises(ValueError, match=said):
        ridge_coefficients(target, equally_spaced_dictionary(5, 3.0), 1.0)


# --- fast Gaussian path: accuracy

CASES = [
    *[(D, 3.0, 1.0, TOLERANCE) for D in (2, 5, 20, 21, 45)],
    (20, 3.0, 6 / 8, TOLERANCE),  # the KAF authors' bandwidth, 1 / (8 step^2)
    (6, 0.5, 1.0, TOLERANCE),
    (6, 40.0, 1.0, TOLERANCE),
    (20, 3.0, 0.01, TOLERANCE),
    # Narrow kernels: x / step has itself an error of 1e-7 |x| / step in float32, in units in which
    # the kernel's width is 0.3 or 0.2. The plain formula in float32 needs as much.
    (6, 3.0, 30.0, 2 * TOLERANCE),
    (6, 3.0, 100.0, 2 * TOLERANCE),
]


@pytest.mark.parametrize("D, boundary, scale, tolerance", CASES)
def test_fast_path_equals_the_formula(D, boundary, scale, tolerance):
    gamma = rule_of_thumb(D, boundary, scale)
    d = equally_spaced_dictionary(D, boundary)
    far = np.logspace(-3, 4, 50)
    inside = np.random.default_rng(0).uniform(-1.5 * boundary, 1.5 * boundary, 400)
    x = np.concatenate([inside, d, far, -far, [0, 1e-30]])
    x = np.resize(x, -(-len(x) // PARTS) * PARTS)  # parts of one size: one shape to compile
    x = np.stack([x, np.roll(x, 1), -x], axis=1).astype("float32")  # (N, 3)
    upstream = normal(*x.shape, seed=2)
    difference = x.astype("float64")[:, None] - d[:, None]  # (N, D, 3)
    kappa = np.exp(-gamma * difference**2)
    for alpha in [normal(D, 3, seed=1), ridge_alpha(D, boundary, gamma, 3)]:
        y, in_x, in_alpha = value_and_gradients(
            lambda x, alpha: gaussian_expansion(x, alpha, boundary=boundary, gamma=gamma),
            *(x, alpha),
            upstream=upstream,
        )
        terms = alpha.astype("float64") * kappa
        _agree(y, terms.sum(1), np.abs(terms).max(1), tolerance)
        # A term's slope is 2 gamma |x - d_i| times the term, and counts at least as much as it does
        # at one width, 1 / sqrt(2 gamma), from the kernel's centre.
        slopes = -2 * gamma * difference * terms
        widths = np.maximum(np.abs(difference), 1 / np.sqrt(2 * gamma))
        largest = np.abs(upstream) * (2 * gamma * widths * np.abs(terms)).max(1)
        _agree(in_x, upstream * slopes.sum(1), largest, tolerance)
        terms = upstream[:, None] * kappa
        _agree(in_alpha, terms.sum(0), np.abs(terms).sum(0), tolerance / 2)
        assert not np.asarray(y)[np.abs(x) > 100 * boundary].any()


def _agree(actual, expected, largest_term, tolerance):
    error = np.abs(np.asarray(actual) - expected)
    assert (error <= tolerance * largest_term + FLOOR * largest_term.max()).all(), (
        f"{(error / (largest_term + FLOOR / tolerance * largest_term.max())).max():.1e}"
    )


# --- fast Gaussian path: where and how it runs

D, GAMMA = 3, rule_of_thumb(3)
DICTIONARY = equally_spaced_dictionary(D, 3.0)


def fast(x, alpha):
    return gaussian_expansion(x, alpha, boundary=3.0, gamma=GAMMA)


def plain(x, alpha):
    return plain_expansion(x, alpha, tf.constant(DICTIONARY, x.dtype), GAMMA)


def plain_plus(x, alpha, dictionary, gamma, base):
    y = plain_expansion(*map(tf.convert_to_tensor, (x, alpha, dictionary)), gamma)
    return y if base is None else y + base(tf.convert_to_tensor(x))


def moving_arguments(channels=4):
    """alpha, dictionary, gamma of a moving KAF."""
    dictionary = DICTIONARY[:, None] + 0.3 * normal(D, channels, seed=4)
    gamma = GAMMA * np.exp(0.3 * normal(channels, seed=5))
    return normal(D, channels, seed=1), dictionary.astype("float32"), gamma.astype("float32")


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])  # sums go by 64 rows at 512 channels
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_any_number_of_rows_is_summed(rows, moving):
    x, upstream = 2 * normal(rows, 512), normal(rows, 512, seed=2)
    arguments = moving_arguments(512) if moving else (normal(D, 512, seed=1),)
    function, reference = (moving_gaussian_expansion, plain_expansion) if moving else (fast, plain)
    results = value_and_gradients(function, x, *arguments, upstream=upstream)
    expected = value_and_gradients(
        reference, *(a.astype("float64") for a in (x, *arguments)), upstream=upstream
    )
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_the_sums_of_a_gpu_are_those_of_the_processor(moving, monkeypatch):
    x, upstream, arguments = 2 * normal(70, 4), normal(70, 4, seed=2), moving_arguments()
    arguments = arguments if moving else arguments[:1]
    expected = value_and_gradients(
        moving_gaussian_expansion if moving else fast, x, *arguments, upstream=upstream
    )
    fresh = [kernel_expansion._equally_spaced_expansion, kernel_expansion._moving_expansion]
    for cached in fresh:
        monkeypatch.setattr(kernel_expansion, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(kernel_expansion, "_has_gpu", lambda: True)
    monkeypatch.setattr(kernel_expansion, "_sum_by_chunks", None)  # must not be called
    results = value_and_gradients(
        moving_gaussian_expansion if moving else fast, x, *arguments, upstream=upstream
    )
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_in_graphs_of_unknown_sizes_it_is_the_same_as_outside(jit_compile, moving):
    arguments = moving_arguments() if moving else (normal(D, 4, seed=1),)
    function = moving_gaussian_expansion if moving else fast
    unknown = tf.TensorSpec((None, None, None, 4))

    @tf.function(jit_compile=jit_compile, input_signature=[unknown, unknown])
    def in_graph(x, upstream):
        x, *parameters = (tf.convert_to_tensor(a) for a in (x, *arguments))
        with tf.GradientTape() as tape:
            tape.watch([x, *parameters])
            y = function(x, *parameters)
        return y, *tape.gradient(y, [x, *parameters], upstream)

    for shape in [(2, 3, 5, 4), (1, 7, 2, 4)]:
        x, upstream = 2 * normal(*shape), normal(*shape, seed=2)
        results = in_graph(x, upstream)
        expected = value_and_gradients(function, x, *arguments, upstream=upstream)
        for a, b in zip(results, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_infinite_and_huge_inputs_give_0_and_nan_gives_nan(moving):
    huge = np.array([np.inf, -np.inf, 3e38, -3e38, 1e20], "float32")
    x = np.tile(huge[:, None], (1, 4))
    arguments = moving_arguments() if moving else (normal(D, 4, seed=1),)
    function = moving_gaussian_expansion if moving else fast
    upstream = np.ones_like(x)
    for result in value_and_gradients(function, x, *arguments, upstream=upstream):
        np.testing.assert_array_equal(result, np.zeros_like(result))
    x[2, 1] = np.nan
    y, in_x, in_alpha, *_ = value_and_gradients(function, x, *arguments, upstream=upstream)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(np.isnan(in_x), np.isnan(x))
    # A channel's coefficients see every row of it.
    np.testing.assert_array_equal(np.isnan(in_alpha), np.isnan(x).any(0) * np.ones((D, 1), bool))


def kept_for_the_backward_pass(function, x, alpha):
    """Elements of the tensors that TensorFlow hands from the forward to the backward pass."""
    concrete = tf.function(function).get_concrete_function(
        tf.TensorSpec(x.shape), tf.TensorSpec(alpha.shape)
    )
    _, backward = concrete._delayed_rewrite_functions.forward_backward()
    kept = set()
    for tensor in backward.captured_inputs:
        while tensor.op.type in ("Identity", "IdentityN", "Reshape"):  # share their input's memory
            tensor = tensor.op.inputs[tensor.value_index]
        kept.add(tensor.ref())
    return sum(tensor.deref().shape.num_elements() for tensor in kept)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_only_x_is_kept_for_the_backward_pass(moving):
    x, (alpha, *others) = normal(1000, 4), moving_arguments()
    parameters = alpha.size + sum(other.size for other in others) if moving else alpha.size

    def function(x, alpha):
        return moving_gaussian_expansion(x, alpha, *others) if moving else fast(x, alpha)

    kept = kept_for_the_backward_pass(function, x, alpha)
    assert x.size <= kept <= x.size + parameters
    assert kept_for_the_backward_pass(plain, x, alpha) > D * x.size  # the measure sees it


def operations_run(concrete):
    """Operations that TensorFlow executes: those its outputs and side effects depend on."""
    wanted = [tensor.op for tensor in concrete.outputs] + list(concrete.graph.control_outputs)
    found = set()
    while wanted:
        operation = wanted.pop()
        if operation not in found:
            found.add(operation)
            wanted += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    return found


def calls(concrete, name):
    functions = [
        operation.get_attr("f").name
        for operation in operations_run(concrete)
        if operation.type in ("PartitionedCall", "StatefulPartitionedCall")
    ]
    return sum(name in function for function in functions)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_parameter_gradients_are_not_computed_where_only_x_is_attacked(moving):
    arguments = moving_arguments() if moving else (normal(D, 4, seed=1),)
    function = moving_gaussian_expansion if moving else fast

    def gradients(x, with_parameters):
        parameters = [tf.constant(a) for a in arguments]
        with tf.GradientTape() as tape:
            tape.watch([x, *parameters])
            y = function(x, *parameters)
        return tape.gradient(y, [x, *parameters] if with_parameters else [x])

    spec = tf.TensorSpec((None, 4))
    traced = tf.function(gradients)
    attack = traced.get_concrete_function(spec, False)
    training = traced.get_concrete_function(spec, True)
    assert (calls(attack, "derivative"), calls(training, "derivative")) == (1, 1)
    assert calls(attack, "sums_of_kernels") == 0
    assert calls(training, "sums_of_kernels") == kernel_expansion.PARTS


def test_under_distribution_of_the_batch_the_gradients_add_up():
    script = """
        import numpy as np
        import tensorflow as tf
        cpu, = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        from kernel_expansion import gaussian_expansion

        x = tf.random.stateless_normal((6, 4), (0, 0))
        alpha = tf.Variable(tf.random.stateless_normal((5, 4), (0, 1)))

        def gradients(x, alpha):
            alpha = tf.convert_to_tensor(alpha)
            with tf.GradientTape() as tape:
                tape.watch([x, alpha])
                y = gaussian_expansion(x, alpha, boundary=3.0, gamma=0.5)
            return tape.gradient(y, [x, alpha])

        strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
        assert strategy.num_replicas_in_sync == 2
        with strategy.scope():
            mirrored = tf.Variable(alpha)
        dataset = tf.data.Dataset.from_tensor_slices(x).batch(6)
        batches = strategy.experimental_distribute_dataset(dataset)

        @tf.function
        def step(x):
            in_x, in_alpha = strategy.run(gradients, (x, mirrored))
            return strategy.gather(in_x, 0), strategy.reduce("SUM", in_alpha, None)

        for a, b in zip(step(next(iter(batches))), gradients(x, alpha), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=1e-6)
    """
    run_python(script)


# --- base

BASES = ["relu", "elu", "swish", "gelu", "tanh", "linear"]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_a_base_adds_itself_and_its_gradient(name, moving):
    base = activations.get(name)
    far = np.array([-1e6, -50, -4, 4, 50, 1e6] * 2, "float32").reshape(-1, 4)
    x = np.concatenate([2 * normal(60, 4), far])
    upstream, arguments = normal(*x.shape, seed=2), moving_arguments()

    def function(x, alpha, *others):
        if moving:
            return moving_gaussian_expansion(x, alpha, *others, base)
        return gaussian_expansion(x, alpha, boundary=3.0, gamma=GAMMA, base=base)

    arguments = arguments if moving else arguments[:1]
    results = value_and_gradients(function, x, *arguments, upstream=upstream)
    exact = [a.astype("float64") for a in (x, *arguments)]
    others = [] if moving else [DICTIONARY, GAMMA]
    expected = value_and_gradients(
        lambda *a: plain_plus(*a, *others, base=base), *exact, upstream=upstream
    )
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_with_coefficients_of_0_it_is_the_base_wherever_the_input_lies(name, moving):
    base = activations.get(name)
    sizes = [0, 1e-30, 1e-3, 0.5, 3, 20, 1e3, 1e6, 3e38, np.inf]
    x = np.array([sign * size for size in sizes for sign in (1, -1)] + [np.nan], "float32")[:, None]
    alpha, dictionary, gamma = moving_arguments(1)
    if moving:
        y = moving_gaussian_expansion(x, 0 * alpha, dictionary, gamma, base)
    else:
        y = gaussian_expansion(tf.constant(x), 0 * alpha, boundary=3.0, gamma=GAMMA, base=base)
    # compiled, exp and tanh are other approximations than outside
    np.testing.assert_allclose(y, base(tf.constant(x)), rtol=2e-5, atol=1e-29)


# --- higher orders


def gradients_of_gradients(function, x, *parameters, dtype, of):
    """Gradients, in x, parameters and upstream, of a fixed weighted sum of some first gradients."""
    arguments = [tf.constant(a, dtype) for a in (x, *parameters)]
    upstream = tf.constant(normal(*x.shape, seed=8), dtype)
    with tf.GradientTape() as outer:
        outer.watch([*arguments, upstream])
        with tf.GradientTape() as inner:
            inner.watch(arguments)
            y = function(*arguments)
        first = inner.gradient(y, arguments, upstream)
        weighted = [
            tf.reduce_sum(first[i] * tf.constant(normal(*first[i].shape, seed=9 + i), dtype))
            for i in of
        ]
        total = tf.add_n(weighted)
    return outer.gradient(total, [*arguments, upstream], unconnected_gradients="zero")


@pytest.mark.parametrize("of", [[0], [1], [0, 1]], ids=["of_dx", "of_dalpha", "of_both"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("base", [None, activations.tanh], ids=["no_base", "base"])
def test_second_order_gradients_of_the_fixed_dictionary_are_right(of, graph, base):
    x, alpha = 2 * normal(10, 4), normal(D, 4, seed=1)

    def second():
        return gradients_of_gradients(
            lambda *a: gaussian_expansion(*a, boundary=3.0, gamma=GAMMA, base=base),
            *(x, alpha),
            dtype="float32",
            of=of,
        )

    expected = gradients_of_gradients(
        lambda *a: plain_plus(*a, DICTIONARY, GAMMA, base), x, alpha, dtype="float64", of=of
    )
    assert sum(np.abs(e).max() > 0.1 for e in expected) >= 2
    for a, b in zip(tf.function(second)() if graph else second(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of", [0, 1, 2, 3])
@pytest.mark.parametrize("base", [None, activations.tanh], ids=["no_base", "base"])
def test_second_order_gradients_of_a_moving_dictionary_are_right(of, base):
    x, parameters = 2 * normal(10, 4), moving_arguments()
    results, expected = (
        gradients_of_gradients(
            lambda *a, function=function: function(*a, base), x, *parameters, dtype=dtype, of=[of]
        )
        for function, dtype in [(moving_gaussian_expansion, "float32"), (plain_plus, "float64")]
    )
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("base", [None, activations.swish], ids=["no_base", "base"])
def test_forward_mode_gives_the_change_along_a_direction(moving, base):
    x, parameters = 2 * normal(10, 4), moving_arguments()[: 3 if moving else 1]
    arguments = [a.astype("float32") for a in (x, *parameters)]
    directions = [normal(*a.shape, seed=20 + i) for i, a in enumerate(arguments)]

    def function(*arguments):
        if moving:
            return moving_gaussian_expansion(*arguments, base)
        return gaussian_expansion(*arguments, boundary=3.0, gamma=GAMMA, base=base)

    primals, tangents = (list(map(tf.constant, group)) for group in (arguments, directions))
    with tf.autodiff.ForwardAccumulator(primals, tangents) as forward:
        y = function(*primals)
    ends = []
    for h in (1e-6, -1e-6):
        moved = [a.astype("float64") + h * d for a, d in zip(arguments, directions, strict=True)]
        ends.append(plain_plus(*moved, *(() if moving else (DICTIONARY, GAMMA)), base=base))
    np.testing.assert_allclose(forward.jvp(y), (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


# --- moving dictionary


@pytest.mark.parametrize("shape", [(300, 4), (2, 3, 5, 4)])
def test_moving_path_equals_the_formula_and_its_finite_differences(shape):
    x, upstream = 2 * normal(*shape), normal(*shape, seed=2)
    x.flat[:4] = 1e4, -1e4, 50, -50
    arguments = [x, *moving_arguments()]
    y, *gradients = value_and_gradients(moving_gaussian_expansion, *arguments, upstream=upstream)
    exact = [a.astype("float64") for a in arguments]
    np.testing.assert_allclose(y, formula(*exact), atol=TOLERANCE)
    for i, gradient in enumerate(gradients):
        direction = normal(*arguments[i].shape, seed=6, dtype="float64")
        h = 1e-6

        def moved(sign, i=i, change=h * direction):
            shifted = [a + sign * change if j == i else a for j, a in enumerate(exact)]
            return (upstream * formula(*shifted)).sum()

        slope = (moved(1) - moved(-1)) / (2 * h)
        # 1e-4 of what would be there without cancellation
        scale = np.abs(gradient * direction).sum()
        assert abs((gradient * direction).numpy().sum() - slope) < 1e-4 * scale


def test_moving_path_with_the_fixed_points_is_the_fixed_path():
    x, alpha = 2 * normal(50, 4), normal(D, 4, seed=1)
    dictionary = np.tile(DICTIONARY[:, None], (1, 4)).astype("float32")
    gamma = np.full(4, GAMMA, "float32")
    y = moving_gaussian_expansion(*map(tf.constant, (x, alpha, dictionary, gamma)))
    np.testing.assert_allclose(y, fast(tf.constant(x), tf.constant(alpha)), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_take_the_plain_formula(dtype):
    x, alpha = tf.constant(normal(5, 4), dtype), tf.constant(normal(D, 4, seed=1), dtype)
    assert fast(x, alpha).dtype == dtype
    np.testing.assert_array_equal(fast(x, alpha), plain(x, alpha))
    dictionary = tf.linspace(tf.cast(-3, dtype), tf.cast(3, dtype), D)[:, None] + x[:1]
    gamma = tf.fill((4,), tf.cast(GAMMA, dtype))
    moving = moving_gaussian_expansion(x, alpha, dictionary, gamma)
    assert moving.dtype == dtype
    np.testing.assert_array_equal(moving, plain_expansion(x, alpha, dictionary, gamma))
