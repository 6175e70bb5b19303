"""The mathematics of a KAF: dictionary, kernels, ridge fit, fast evaluation and its gradients.

A kernel activation function (Scardapane, Van Vaerenbergh, Totaro & Uncini 2019, "Kafnets", Neural
Networks 110, eq. 13) is, per channel,

    g(x) = sum_{i=1..D} alpha_i kappa(x, d_i),    kappa(x, d) = exp(-gamma (x - d)^2).

`plain_expansion` is this formula, for every Keras backend and kernel; it keeps D-fold tensors for
the backward pass. `gaussian_expansion` and `moving_gaussian_expansion` are the same function for
the Gaussian kernel under TensorFlow, compiled, with gradients of their own that keep only x.

Shapes: x (..., C), alpha (D, C), dictionary (D,) or (D, C), gamma a number or (C,). Coefficients
lie (D, C) so that the channels, which are last in x, are contiguous.
"""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
from keras import ops

Tensor = Any  # of the backend

RIDGE_EPSILON = 1e-6  # the thesis's; the KAF authors' code has 1e-5 (Keras, TF) or 1e-4 (PyTorch)


def equally_spaced_dictionary(D: int, boundary: float) -> np.ndarray:
    """D points on [-boundary, boundary], float64 (D,): symmetric about 0, step 2 boundary/(D-1)."""
    return np.linspace(-boundary, boundary, D)


def rule_of_thumb_bandwidth(D: int, boundary: float) -> float:
    """gamma = 1 / (6 step^2): Kafnets eq. 15. The KAF authors' code has 1 / (8 step^2)."""
    step = 2 * boundary / (D - 1)
    return 1 / (6 * step**2)


def gaussian(difference: Tensor, gamma: Tensor) -> Tensor:
    return ops.exp(-gamma * ops.square(difference))


def relu_spline(difference: Tensor, gamma: Tensor) -> Tensor:
    """max(x - d, 0), of the KAF authors' code; no bandwidth."""
    return ops.relu(difference)


def softplus(difference: Tensor, gamma: Tensor) -> Tensor:
    """log(1 + exp(x - d)), of the KAF authors' code; no bandwidth."""
    return ops.softplus(difference)


KERNELS = {"gaussian": gaussian, "relu": relu_spline, "softplus": softplus}


def plain_expansion(
    x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, kernel: str = "gaussian"
) -> Tensor:
    """sum_i alpha_i kappa(x, d_i), written as its formula. (..., C) -> (..., C)."""
    if len(ops.shape(dictionary)) == 1:
        dictionary = ops.expand_dims(dictionary, -1)  # (D, 1)
    # (..., C) -> (..., 1, C); against the dictionary (D, C) the kernel is (..., D, C).
    kappa = KERNELS[kernel](ops.expand_dims(x, -2) - dictionary, gamma)
    return ops.sum(alpha * kappa, axis=-2)


_is_plain = ContextVar("_is_plain", default=False)
# tf2onnx knows ordinary operations alone: of compiled ones it writes a file that cannot be opened.
ONNX_EXPORTERS = ("keras.src.export.onnx", "tf2onnx.convert")


@contextlib.contextmanager
def plain_formula() -> Iterator[None]:
    """Within, Gaussian expansions are their formula as well, whatever the backend and type.

    For exporters that know ordinary operations alone. Under TensorFlow it is in force by itself
    while Keras' `model.export(..., format="onnx")` or tf2onnx traces a model.
    """
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)


def ridge_coefficients(
    target: Callable,
    dictionary: np.ndarray,
    gamma: float,
    kernel: str = "gaussian",
    epsilon: float = RIDGE_EPSILON,
) -> np.ndarray:
    """alpha = (K + epsilon I)^-1 t with t_i = target(d_i): a KAF that starts as `target`.

    Kafnets eq. 16. The system is ill-conditioned, so it is solved in float64 on the host; the
    caller casts the result.

    Args:
        target: function of a tensor, elementwise.
        dictionary: (D,), gamma: the bandwidth (ignored by kernels without one).

    Returns:
        float64 (D,).
    """
    if kernel == "relu":
        raise ValueError(
            "The ReLU kernel cannot start as a given function: its matrix max(d_i - d_j, 0) is "
            "singular. Use kernel='gaussian' or 'softplus', or ridge=None."
        )
    d = np.asarray(dictionary, np.float64)
    difference = d[:, None] - d[None, :]
    matrix = {
        "gaussian": lambda: np.exp(-gamma * difference**2),
        "softplus": lambda: np.logaddexp(0, difference),
    }[kernel]()
    t = ops.convert_to_numpy(target(ops.convert_to_tensor(d, "float64"))).astype(np.float64)
    if t.shape != d.shape or not np.isfinite(t).all():
        raise ValueError(
            "The ridge target must be an elementwise function, finite on the dictionary; "
            f"at {d.shape[0]} points it returned shape {t.shape}, finite: {np.isfinite(t).all()}."
        )
    return np.linalg.solve(matrix + epsilon * np.eye(len(d)), t)


def plus(base: Callable | None, x: Tensor, y: Tensor) -> Tensor:
    """base(x) + y; y where there is no base."""
    return y if base is None else base(x) + y


def gaussian_expansion(
    x: Tensor,
    alpha: Tensor,
    *,
    boundary: float,
    gamma: float,
    base: Callable | None = None,
) -> Tensor:
    """sum_i alpha_i exp(-gamma (x - d_i)^2) over the equally spaced dictionary on [-b, b].

    In float32: two exponentials and two short polynomials instead of D exponentials (see
    `_power_factors`); the backward pass keeps x alone. Under TensorFlow and JAX they are compiled
    by XLA; in TensorFlow's graphs (tf.function, fit) the gradient in alpha is computed only where
    it is asked for. JAX's forward mode does not pass through gradients of one's own: take
    `plain_expansion` there. In other types the plain formula. On a GPU the sums over rows are plain
    reductions; none was at hand, so this was tried on a CPU alone.
    Values and gradients agree with the plain formula to 2e-5 of its largest term; far outside the
    dictionary both are 0, also at x = inf; NaN stays NaN.

    Args:
        x: (..., C). alpha: (D, C). boundary, gamma: positive numbers, the same for all channels.
        base: elementwise function to be added, in the same compiled loops; None: nothing.

    Returns:
        (..., C)
    """
    D = alpha.shape[0]
    if not _has_fast_path(x):
        d = _constant_dictionary(D, boundary, x.dtype)
        return plus(base, x, plain_expansion(x, alpha, d, gamma))
    step = 2 * boundary / (D - 1)
    if keras.backend.backend() != "tensorflow":
        expansion = _expansion_of_other_backends(D, float(step), float(gamma))
        return plus(base, x, expansion(x, alpha))
    expansion = _equally_spaced_expansion(D, x.shape[-1], float(step), float(gamma), base)
    return _on_rows(expansion, x, alpha)


def moving_gaussian_expansion(
    x: Tensor, alpha: Tensor, dictionary: Tensor, gamma: Tensor, base: Callable | None = None
) -> Tensor:
    """The same with a dictionary (D, C) and a bandwidth gamma (C,) that are trained as well.

    Its points are not equally spaced, so the D exponentials stay, but none of them is stored.
    """
    if keras.backend.backend() != "tensorflow" or not _has_fast_path(x):
        return plus(base, x, plain_expansion(x, alpha, dictionary, gamma))
    expansion = _moving_expansion(alpha.shape[0], x.shape[-1], base)
    return _on_rows(expansion, x, alpha, dictionary, gamma)


def _constant_dictionary(D, boundary, dtype):
    return ops.convert_to_tensor(equally_spaced_dictionary(D, boundary), dtype)


def _has_fast_path(x):
    if _is_plain.get() or _is_traced_for_onnx():
        return False
    is_known = x.shape[-1] is not None
    return is_known and keras.backend.standardize_dtype(x.dtype) == "float32"


def _is_traced_for_onnx():
    # Neither Keras nor tf2onnx says so to a layer; but one of them is then among the callers.
    if keras.backend.backend() != "tensorflow" or tf.executing_eagerly():
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") not in ONNX_EXPORTERS:
        frame = frame.f_back
    return frame is not None


def _on_rows(expansion, x, *parameters):
    """Applies a function of rows (N, C) to x (..., C)."""
    # Variables are read here: a custom gradient takes tensors.
    rows, *parameters = map(tf.convert_to_tensor, (tf.reshape(x, (-1, x.shape[-1])), *parameters))
    return tf.reshape(expansion(rows, *parameters), tf.shape(x))


# ---------------------------------------------------------------------------------------------
# TensorFlow: the Gaussian expansion at the price of a fixed activation.
#
# In units of the step, u = x / step and g = gamma step^2, a run of dictionary points m + k around
# its centre m (v = u - m; k = -h, ..., h) has
#
#     exp(-g (v - k)^2) = exp(-g v^2) (exp(2 g v))^k exp(-g k^2),
#
# one Gaussian, times a power that a Horner chain builds up, times a constant. One chain runs in
# s^2 = exp(2 g v) for k > 0 and one in 1 / s^2 for k < 0. float32 holds this for runs of up to 20
# points at the rule-of-thumb bandwidth (`_runs` says how many in general); longer dictionaries are
# cut into runs. exp is written out (`exp2`): XLA then makes one vectorised loop of everything.

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

LIFT = 28.0  # exponents are lifted by this much, and the constants lowered, to stay in range
LONGEST_RUN = 20  # points that share one pair of chains


def _runs(D, g):
    """Dictionary cut into runs of consecutive points: pairs (centre in steps, points)."""
    # With h sqrt(g) <= 4, exp(2 g v h) does not overflow before exp(LIFT - g v^2) has reached 0,
    # and there the run's nearest kernel is below exp(-45).
    longest = max(1, min(LONGEST_RUN, int(2 * 4 / math.sqrt(g)) + 1))
    points = np.array_split(np.arange(D), math.ceil(D / longest))
    return [((run[0] + run[-1]) / 2 - (D - 1) / 2, list(run)) for run in points]


def _offsets(points):
    """k of each point of a run: -h, ..., h."""
    return np.arange(len(points)) - (len(points) - 1) / 2


def _constants(D, g):
    """exp(-g k^2 - LIFT) and k for every point of the dictionary, each (D, 1) float32."""
    k = np.concatenate([_offsets(points) for _, points in _runs(D, g)])[:, None]
    return np.exp(-g * k**2 - LIFT).astype(np.float32), k.astype(np.float32)


@functools.cache
def _exp2_polynomial():
    """2^f on [-1/2, 1/2] to 4e-9, coefficients from f^0 to f^6."""
    interpolant = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    return [np.float32(c) for c in interpolant.convert(kind=np.polynomial.Polynomial).coef]


def _horner(coefficients, x):
    """coefficients[0] + coefficients[1] x + ..."""
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _times_power_of_2(x, n):
    """x 2^n for integers -127 <= n <= 127; 2^-127 counts as 0."""
    return x * tf.bitcast((n + 127) * (1 << 23), tf.float32)


def exp2(z: Tensor) -> Tensor:
    """2^z for -127.49 <= z <= 127; 0 below -126.5."""
    n = tf.round(z)
    return _times_power_of_2(_horner(_exp2_polynomial(), z - n), tf.cast(n, tf.int32))


def _exp2_kept(z):
    """2^z for -127.49 <= z <= 0, which XLA computes once, however many sums it goes into.

    XLA repeats cheap operations in every loop that needs their result, but no division.
    """
    n = tf.round(z)
    return _horner(_exp2_polynomial(), z - n) / _times_power_of_2(1.0, -tf.cast(n, tf.int32))


def _exp2_both_signs(z):
    """2^z and 2^-z for |z| <= 126: even and odd part of one polynomial."""
    n = tf.round(z)
    f = z - n
    even = _horner(_exp2_polynomial()[0::2], f * f)
    odd = f * _horner(_exp2_polynomial()[1::2], f * f)
    n = tf.cast(n, tf.int32)
    return _times_power_of_2(even + odd, n), _times_power_of_2(even - odd, -n)


def _power_factors(x, centre, step, g):
    """v, s = exp(g v), 1 / s and exp(LIFT - g v^2), where v = x / step - centre."""
    log2e = math.log2(math.e)
    # Where the Gaussian has reached 0, v may as well stop: nothing overflows, inf becomes finite.
    stop = math.sqrt((127.4 / log2e + LIFT) / g)
    if keras.backend.backend() != "tensorflow":
        v = ops.clip(x * (1 / step) - centre, -stop, stop)
        return v, ops.exp(g * v), ops.exp(-g * v), ops.exp(LIFT - g * (v * v))
    v = tf.clip_by_value(x * np.float32(1 / step) - np.float32(centre), -stop, stop)
    s, s_inverse = _exp2_both_signs(v * np.float32(g * log2e))
    bell = exp2(np.float32(LIFT * log2e) - np.float32(g * log2e) * (v * v))
    return v, s, s_inverse, bell


def _sum_of_powers(rows, s, s_inverse):
    """sum_k rows[k] s^(2k) over k = -h, ..., h."""
    half, has_middle = len(rows) // 2, len(rows) % 2
    total = rows[half] if has_middle else 0.0
    if half:
        w, w_inverse = s * s, s_inverse * s_inverse
        # smallest positive k is 1, or 1/2 for an even number of points
        first, first_inverse = (w, w_inverse) if has_middle else (s, s_inverse)
        total = total + first * _horner(rows[half + has_middle :], w)
        total = total + first_inverse * _horner(rows[:half][::-1], w_inverse)
    return total


def _all_powers(t, s, s_inverse, count):
    """Lists over slices of t s^(2k), one list for each k = -h, ..., h; t, s: lists of slices."""
    half, has_middle = count // 2, count % 2

    def chain(s):
        w = [a * a for a in s]
        power = [a * b for a, b in zip(t, w if has_middle else s, strict=True)]
        for _ in range(half):
            yield power
            power = [a * b for a, b in zip(power, w, strict=True)]

    return list(chain(s_inverse))[::-1] + [t] * has_middle + list(chain(s))


def _value(x, scaled, runs, step, g):
    """sum_i alpha_i kappa_i, alpha lowered by the constants: `scaled` (D, C)."""
    total = 0.0
    for centre, points in runs:
        _, s, s_inverse, bell = _power_factors(x, centre, step, g)
        total += bell * _sum_of_powers([scaled[i] for i in points], s, s_inverse)
    return total


def _derivative(x, scaled, scaled_offsets, upstream, runs, step, g):
    """upstream dg/dx, dg/dx = (2 g / step) sum_i alpha_i kappa_i (k_i - v)."""
    total = 0.0
    for centre, points in runs:
        v, s, s_inverse, bell = _power_factors(x, centre, step, g)
        first = _sum_of_powers([scaled_offsets[i] for i in points], s, s_inverse)
        total += bell * (first - v * _sum_of_powers([scaled[i] for i in points], s, s_inverse))
    return upstream * total * np.float32(2 * g / step)


def _terms(x, upstream, runs, step, g, slices):
    """upstream kappa_i over its constant for each point i, each a list of what `slices` gives."""
    powers = []
    for centre, points in runs:
        _, s, s_inverse, bell = _power_factors(x, centre, step, g)
        parts = [slices(a) for a in (bell * upstream, s, s_inverse)]
        powers += _all_powers(*parts, len(points))
    return powers


PARTS = 4  # of the rows, summed side by side where there are as many cores


def _has_gpu():
    return bool(tf.config.list_physical_devices("GPU"))


def _in_parts(sums, x, upstream, *parameters):
    """The compiled function `sums` of rows x, upstream (N, C), as a sum over parts of the rows.

    TensorFlow runs the parts at the same time; XLA keeps a loop to one core. Their number is fixed,
    so that rounding does not depend on the machine.
    """
    if _has_gpu():
        return sums(x, upstream, *parameters)
    length = tf.shape(x)[0]
    bounds = [length * i // PARTS for i in range(PARTS + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return tf.add_n([sums(x[part], upstream[part], *parameters) for part in parts])


def _sum_over_rows(terms, count, *rows, per_channel=()):
    """Sums (N, C) -> (count, C) of `count` terms, without storing the terms.

    Args:
        terms: takes a chunk (slices, lanes) of each of `rows` and `per_channel` as (..., lanes),
            returns `count` lists of `slices` tensors (lanes,). Must give 0 where all `rows` are 0.
        rows: tensors (N, C). per_channel: tensors (..., C).
    """
    if _has_gpu():
        sums = terms(*[r[None] for r in rows], *per_channel)
        return tf.stack([tf.reduce_sum(term, axis=0) for (term,) in sums])
    return _sum_by_chunks(terms, count, rows, per_channel)


CHUNK_ROWS, CHUNK_LANES = 16, 256  # sizes for which the sums below stay in the first-level cache


def _sum_by_chunks(terms, count, rows, per_channel):
    """`_sum_over_rows` in stages, for a processor's cache.

    XLA fuses elementwise work into vectorised loops, but not into reductions. So the rows are cut
    into chunks (CHUNK_ROWS, lanes), the chunk's rows are added as slices, the chunks in a loop, and
    only (count, lanes) is reduced in the ordinary way.
    """
    channels = rows[0].shape[-1]
    per_lane_row = max(1, CHUNK_LANES // channels)
    lanes = per_lane_row * channels
    length = tf.shape(rows[0])[0]
    chunk = per_lane_row * CHUNK_ROWS
    chunks = tf.maximum(1, (length + chunk - 1) // chunk)  # XLA refuses to slice 0 of them
    padding = [[0, chunks * chunk - length], [0, 0]]
    rows = [tf.reshape(tf.pad(r, padding), (-1, CHUNK_ROWS, lanes)) for r in rows]
    per_channel = [tf.tile(p, [1] * (p.shape.rank - 1) + [per_lane_row]) for p in per_channel]

    def add_chunk(i, sums):
        slices = terms(*[r[i] for r in rows], *per_channel)
        return i + 1, tuple(
            functools.reduce(lambda a, b: a + b, [partial, *parts])
            for partial, parts in zip(sums, slices, strict=True)
        )

    zeros = tuple(tf.zeros((lanes,)) for _ in range(count))
    _, sums = tf.while_loop(lambda i, _: i < chunks, add_chunk, (0, zeros))
    return tf.reduce_sum(tf.reshape(tf.stack(sums), (count, per_lane_row, channels)), axis=1)


@functools.cache
def _expansion_of_other_backends(D, step, gamma):
    """x (..., C), alpha (D, C) -> (..., C) under JAX and torch, keeping x alone, no base."""
    g = gamma * step**2
    runs = _runs(D, g)
    constants, offsets = _constants(D, g)
    compiled = _jax_jit if keras.backend.backend() == "jax" else lambda function: function

    @compiled
    def value(x, alpha):
        return _value(x, alpha * ops.convert_to_tensor(constants), runs, step, g)

    @compiled
    def derivative(x, alpha, upstream):
        scaled = alpha * ops.convert_to_tensor(constants)
        scaled_offsets = scaled * ops.convert_to_tensor(offsets)
        return _derivative(x, scaled, scaled_offsets, upstream, runs, step, g)

    @compiled
    def sums_of_kernels(x, upstream):
        terms = _terms(x, upstream, runs, step, g, lambda a: [a])
        axes = tuple(range(len(x.shape) - 1))
        sums = ops.stack([ops.sum(term, axis=axes) for (term,) in terms])
        return ops.convert_to_tensor(constants) * sums

    @ops.custom_gradient
    def expansion(x, alpha):
        def gradient(*arguments, upstream=None):
            # JAX hands in the upstream gradient alone, torch what it kept as well
            kept_x, kept_alpha = (x, alpha) if upstream is None else arguments
            upstream = arguments[0] if upstream is None else upstream
            in_x = derivative(kept_x, kept_alpha, upstream)
            return in_x, sums_of_kernels(kept_x, upstream)

        return value(x, alpha), gradient

    return expansion


def _jax_jit(function):
    import jax

    return jax.jit(function)


@functools.cache
def _equally_spaced_expansion(D, channels, step, gamma, base):
    """x (N, C), alpha (D, C) -> (N, C), with gradients of its own."""
    g = gamma * step**2
    runs = _runs(D, g)
    constants, offsets = _constants(D, g)
    compiled = _compiled(channels)

    @compiled
    def value(x, scaled):
        return plus(base, x, _value(x, scaled, runs, step, g))

    @compiled
    def derivative(x, scaled, scaled_offsets, upstream):
        total = _derivative(x, scaled, scaled_offsets, upstream, runs, step, g)
        return _plus_gradient(base, x, upstream, total)

    @compiled
    def sums_of_kernels(x, upstream):
        def terms(x, upstream):
            return _terms(x, upstream, runs, step, g, tf.unstack)

        return _sum_over_rows(terms, D, x, upstream)

    def plain(x, alpha):
        d = _constant_dictionary(D, step * (D - 1) / 2, "float32")
        return _plain_plus(base, x, alpha, d, gamma)

    @tf.custom_gradient
    def expansion(x, alpha):
        def gradient(upstream):
            return gradient_in_x(x, alpha, upstream), gradient_in_alpha(x, alpha, upstream)

        return value(x, alpha * constants), gradient

    @tf.custom_gradient
    def gradient_in_x(x, alpha, upstream):
        scaled = alpha * constants
        result = derivative(x, scaled, scaled * offsets, upstream)
        return result, _gradient_of_gradient(plain, [0], x, alpha, upstream)

    @tf.custom_gradient
    def gradient_in_alpha(x, alpha, upstream):
        result = constants * _in_parts(sums_of_kernels, x, upstream)
        return result, _gradient_of_gradient(plain, [1], x, alpha, upstream)

    return expansion


def _moving_kernels(x, dictionary, gamma, exp2=exp2):
    """exp(-gamma (x - d_i)^2) and x - d_i, point by point."""
    # Products of -127.4 and more: exp2 is 0 there. inf would make inf * 0 of x - d_i.
    x = tf.clip_by_value(x, -1e15, 1e15)
    for i in range(dictionary.shape[0]):
        difference = x - dictionary[i]
        exponent = -(gamma * np.float32(math.log2(math.e))) * (difference * difference)
        yield exp2(tf.maximum(exponent, np.float32(-127.4))), difference


@functools.cache
def _moving_expansion(D, channels, base):
    """x (N, C), alpha (D, C), dictionary (D, C), gamma (C,) -> (N, C), gradients of its own."""
    compiled = _compiled(channels)
    plus_gradient = compiled(functools.partial(_plus_gradient, base))
    plain = functools.partial(_plain_plus, base)

    @compiled
    def value(x, alpha, dictionary, gamma):
        kappas = _moving_kernels(x, dictionary, gamma)
        return plus(base, x, sum(alpha[i] * kappa for i, (kappa, _) in enumerate(kappas)))

    @compiled
    def derivative(x, alpha, dictionary, gamma, upstream):
        kappas = _moving_kernels(x, dictionary, gamma)
        total = sum(alpha[i] * (kappa * diff) for i, (kappa, diff) in enumerate(kappas))
        return -2.0 * gamma * upstream * total

    @compiled
    def sums_of_kernels(x, upstream, dictionary, gamma):
        """sum kappa_i upstream, and sum kappa_i (x - d_i) upstream: (2 D, C)."""

        def terms(x, upstream, dictionary, gamma):
            pairs = list(_moving_kernels(x, dictionary, gamma, _exp2_kept))
            zeroth = [tf.unstack(kappa * upstream) for kappa, _ in pairs]
            first = [tf.unstack(kappa * difference * upstream) for kappa, difference in pairs]
            return zeroth + first

        return _sum_over_rows(terms, 2 * D, x, upstream, per_channel=(dictionary, gamma))

    @tf.custom_gradient
    def expansion(x, alpha, dictionary, gamma):
        def gradient(upstream):
            arguments = (x, alpha, dictionary, gamma, upstream)
            of_kernels = derivative(*arguments)
            in_parameters = gradient_in_parameters(*arguments, of_kernels)
            return gradient_in_x(*arguments, of_kernels), *in_parameters

        return value(x, alpha, dictionary, gamma), gradient

    @tf.custom_gradient
    def gradient_in_x(x, alpha, dictionary, gamma, upstream, of_kernels):
        result = of_kernels if base is None else plus_gradient(x, upstream, of_kernels)
        second = _gradient_of_gradient(plain, [0], x, alpha, dictionary, gamma, upstream)
        return tf.identity(result), lambda weights: [*second(weights), None]

    @tf.custom_gradient
    def gradient_in_parameters(x, alpha, dictionary, gamma, upstream, of_kernels):
        # in alpha: sum kappa_i; in d_i: 2 gamma alpha_i sum kappa_i (x - d_i);
        # in gamma: -sum_i alpha_i sum kappa_i (x - d_i)^2, of which one factor x - d_i is split:
        # x goes with the kernels' part of the derivative in x, d_i with the sums just computed.
        sums = _in_parts(sums_of_kernels, x, upstream, dictionary, gamma)
        zeroth, first = tf.split(sums, 2)
        finite = tf.clip_by_value(x, -1e15, 1e15)
        in_gamma = tf.reduce_sum(of_kernels * finite, axis=0) / (2 * gamma)
        in_gamma += tf.reduce_sum(alpha * dictionary * first, axis=0)
        second = _gradient_of_gradient(plain, [1, 2, 3], x, alpha, dictionary, gamma, upstream)
        results = zeroth, 2 * gamma * alpha * first, in_gamma
        return results, lambda *weights: [*second(*weights), None]

    return expansion


def _compiled(channels):
    """Decorator: XLA-compiled for rows (N, C) of any N, one trace for each signature."""
    return functools.partial(_compile, channels=channels)


def _compile(function, *, channels):
    compiled = tf.function(function, jit_compile=True, autograph=False, reduce_retracing=True)

    @functools.wraps(function)
    def call(*arguments):
        # The custom gradients above are the only ones: without stop_gradient an eager tape has the
        # compiled function return every intermediate, to derive it as well.
        arguments = map(tf.stop_gradient, arguments)
        # Static shapes that differ only in N would each be traced anew: forget N.
        relaxed = [
            tf.ensure_shape(a, (None, channels)) if a.shape.rank == 2 else a for a in arguments
        ]
        return compiled(*relaxed)

    return call


def _plain_plus(base, x, *parameters):
    return plus(base, x, plain_expansion(x, *parameters))


def _plus_gradient(base, x, upstream, y):
    """upstream base'(x) + y; y where there is no base. In a graph."""
    if base is None:
        return y
    return y + tf.gradients(base(x), x, upstream, unconnected_gradients="zero")[0]


def _gradient_of_gradient(plain, of, *arguments_and_upstream):
    """Gradient, in all arguments, of the gradients of plain(*arguments) in those numbered `of`."""
    return functools.partial(_by_plain_formula_in_graph(), plain, of, arguments_and_upstream)


@functools.cache
def _by_plain_formula_in_graph():
    # In a graph of its own: no tape and no forward accumulator need be looking on.
    return tf.function(_by_plain_formula, autograph=False, reduce_retracing=True)


def _by_plain_formula(plain, of, arguments_and_upstream, *weights):
    *arguments, upstream = arguments_and_upstream
    first = tf.gradients(plain(*arguments), [arguments[i] for i in of], upstream)
    return tf.gradients(first, arguments_and_upstream, weights, unconnected_gradients="zero")
