"""The triangular cycle has its shape; the range test measures, suggests, and leaves no trace."""

import tracemalloc

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import ops

from fbfadvtrain import FastBetterFreeTrainedModel
from kaf_study import InputError
from kaf_study.lr_policy import LRFinder, LRFinderResult, TriangularCycle, WarmMeanSGD

matplotlib.use("Agg")

# --- TriangularCycle


@pytest.mark.parametrize("start", [0.0, 0.25])
@pytest.mark.parametrize("peak", [0.5, 0.2])
def test_the_cycle_is_linear_up_and_down_and_then_stays_low(peak, start):
    schedule = TriangularCycle(0.01, 0.8, 100, peak=peak, start=start)
    steps = np.arange(151)
    rates = np.array([float(schedule(step)) for step in steps])
    expected = np.interp(steps, [0, 100 * peak, 100], [0.01 + 0.79 * start, 0.8, 0.01])
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_an_optimizer_follows_the_cycle_and_keras_saves_it(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(TriangularCycle(0.1, 0.5, 8, peak=0.25, start=0.2)), "mse")
    model.fit(np.zeros((6, 2)), np.zeros((6, 1)), batch_size=2, verbose=0)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.5 - 0.4 / 6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert float(loaded.optimizer.learning_rate) == float(model.optimizer.learning_rate)


@pytest.mark.parametrize(
    "arguments",
    [
        (0.5, 0.1, 10),
        (-0.1, 0.1, 10),
        (0, 0, 10),
        (0, float("nan"), 10),
        (0.1, 0.5, 0),
        (0.1, 0.5, 10, 1.0),
        (0.1, 0.5, 10, 0.5, -0.1),
        (0.1, 0.5, 10, 0.5, 1.1),
    ],
)
def test_impossible_cycles_are_refused(arguments):
    with pytest.raises(InputError, match="received"):
        TriangularCycle(*arguments)


# --- WarmMeanSGD


def test_the_mean_of_the_weights_forgets_the_first_ones_and_is_resumed(tmp_path):
    def fit(model, epochs, **kwargs):
        data = tf.data.Dataset.from_tensors((np.zeros((1, 1), np.float32), np.zeros(1)))
        model.fit(data, epochs=epochs, verbose=0, **kwargs)
        return model

    def compiled(momentum):
        model = quadratic_of(WarmMeanSGD(0.25, use_ema=True, ema_momentum=momentum))
        model(np.zeros((1, 1)))
        model.optimizer.build(model.trainable_variables)
        return model

    weights = 4.0 * 0.75 ** np.arange(1, 9)  # after each step
    for momentum in (0.3, 0.9):
        mean = weights[0]
        for step, weight in enumerate(weights[1:], start=1):
            share = min(momentum, (1 + step) / (10 + step))
            mean = share * mean + (1 - share) * weight
        model = fit(compiled(momentum), 8)
        assert float(model.w) == pytest.approx(mean, rel=1e-5)  # put there at the end of fit

    # Files are written while the training goes on, with the weights as they are.
    path = tmp_path / "state.weights.h5"
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 3 and begun.save_weights(path)
    )
    begun = compiled(0.9)
    fit(begun, 4, callbacks=[keep])
    resumed = compiled(0.9)
    resumed.load_weights(path)
    fit(resumed, 8, initial_epoch=4)
    assert float(resumed.w) == float(model.w)
    config = keras.saving.serialize_keras_object(model.optimizer)
    assert type(keras.saving.deserialize_keras_object(config)) is WarmMeanSGD


# --- LRFinder


class OneVariable(keras.Model):
    """Loss w^2 / 2 + mean(x), so that gradient descent is w <- (1 - lr) w, in closed form."""

    def __init__(self, start=4.0):
        super().__init__()
        self.w = self.add_weight(shape=(), initializer=keras.initializers.Constant(start))

    def call(self, x):
        return 0.5 * ops.square(self.w) + ops.mean(x, axis=-1, keepdims=True)


def quadratic(learning_rate=0.5, loss=lambda y, y_pred: y_pred[:, 0], **kwargs):
    return quadratic_of(keras.optimizers.SGD(learning_rate), loss, **kwargs)


def quadratic_of(optimizer, loss=lambda y, y_pred: y_pred[:, 0], **kwargs):
    model = OneVariable()
    model.compile(optimizer, loss, **kwargs)
    return model


def closed_form(lrs, start=4.0):
    """Loss before each step of gradient descent on w^2 / 2."""
    return 0.5 * (start * np.cumprod(np.concatenate([[1.0], 1 - lrs[:-1]]))) ** 2


@pytest.mark.parametrize("compile_arguments", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_losses_are_those_of_each_batch_not_a_running_mean(compile_arguments):
    model = quadratic(**compile_arguments)
    result = LRFinder(model).find(
        np.zeros((20, 1), np.float32), np.zeros(20), steps=25, batch_size=4, max_lr=0.9
    )
    np.testing.assert_allclose(result.losses, closed_form(result.lrs), rtol=1e-4)
    assert not result.diverged


def test_rates_grow_exponentially_or_linearly_between_the_bounds():
    x, y = np.zeros((8, 1), np.float32), np.zeros(8)
    rates = LRFinder(quadratic()).find(x, y, steps=11, min_lr=1e-3, max_lr=1e-1).lrs
    np.testing.assert_allclose(np.diff(np.log10(rates)), 0.2, rtol=1e-6)
    rates = LRFinder(quadratic()).find(x, y, steps=11, min_lr=0.1, max_lr=0.3, growth="linear").lrs
    np.testing.assert_allclose(np.diff(rates), 0.02, rtol=1e-6)
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.3)


def test_arrays_are_passed_epoch_by_epoch_and_datasets_as_they_come():
    x = np.arange(10, dtype=np.float32)[:, None]
    result = LRFinder(quadratic()).find(x, np.zeros(10), epochs=2, batch_size=4, max_lr=1e-3)
    assert len(result.losses) == 6  # 4, 4 and 2 images, twice
    noise = result.losses - closed_form(result.lrs)  # mean(x) of each batch
    for half in (noise[:3], noise[3:]):
        np.testing.assert_allclose(np.dot(half, [4, 4, 2]), x.sum(), rtol=1e-3)
    assert not np.allclose(noise[:3], noise[3:], atol=1e-2)  # shuffled afresh

    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(10))).batch(4)
    result = LRFinder(quadratic()).find(dataset, epochs=2, max_lr=1e-3)
    noise = result.losses - closed_form(result.lrs)
    np.testing.assert_allclose(noise, [1.5, 5.5, 8.5] * 2, rtol=1e-3)


def several_inputs():
    left, right = keras.Input((2,), name="left"), keras.Input((1,), name="right")
    model = keras.Model(
        {"left": left, "right": right},
        keras.layers.Dense(1)(keras.layers.Concatenate()([left, right])),
    )
    model.compile("sgd", "mse", run_eagerly=True)
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return np.full((2, 1), index, np.float32), np.zeros(2)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (tf.range(10.0)[:, None], tf.zeros(10)),
        (pd.DataFrame({"x": np.arange(10.0)}, index=range(10, 20)), pd.Series([0] * 10, name="y")),
        ([[float(i)] for i in range(10)], [0] * 10),
        ([np.arange(10.0)[:, None]], [np.zeros(10)]),
        (np.arange(10.0)[:, None], [np.int64(0)] * 10),
    ],
    ids=["tensor", "pandas", "list", "list of one", "list of scalars"],
)
def test_arrays_of_every_kind_are_passed_row_by_row(x, y):
    model = quadratic(run_eagerly=True, loss=lambda y, y_pred: y_pred[..., 0])
    result = LRFinder(model).find(x, y, epochs=2, batch_size=4, max_lr=1e-3)
    noise = result.losses - closed_form(result.lrs)  # mean(x) of each batch
    np.testing.assert_allclose([noise[:3] @ [4, 4, 2], noise[3:] @ [4, 4, 2]], 45, rtol=1e-3)


def test_batches_of_every_kind_come_in_their_order():
    result = LRFinder(quadratic(run_eagerly=True)).find(Batches(), epochs=2, max_lr=1e-3)
    noise = result.losses - closed_form(result.lrs)
    np.testing.assert_allclose(noise, [0, 1, 2] * 2, atol=1e-2)
    generator = (Batches()[index] for index in range(9))
    result = LRFinder(quadratic(run_eagerly=True)).find(generator, steps=5, max_lr=1e-3)
    noise = result.losses - closed_form(result.lrs)
    np.testing.assert_allclose(noise, range(5), atol=1e-2)
    with pytest.raises(InputError, match="steps"):
        LRFinder(quadratic()).find(Batches()[index] for index in range(9))


def test_several_inputs_are_counted_by_their_rows():
    x = {"left": np.ones((10, 2), np.float32), "right": pd.Series(np.ones(10), dtype="float32")}
    x["right"] = x["right"].to_frame()
    result = LRFinder(several_inputs()).find(x, np.zeros(10), epochs=1, batch_size=4)
    assert len(result.losses) == 3
    x["left"] = x["left"][:7]
    with pytest.raises(InputError, match=r"received \[7, 10\] images and \[10\] labels"):
        LRFinder(several_inputs()).find(x, np.zeros(10))


def test_callbacks_watch_every_batch_of_the_one_epoch():
    seen = []
    watching = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(f"epoch {epoch}"),
        on_train_batch_end=lambda batch, logs: seen.append(batch),
    )
    data = np.zeros((8, 1), np.float32), np.zeros(8)
    LRFinder(quadratic()).find(*data, steps=5, batch_size=4, max_lr=1e-3, callbacks=[watching])
    assert seen == ["epoch 0", 0, 1, 2, 3, 4]


def test_divergence_ends_the_test_early():
    x, y = np.zeros((8, 1), np.float32), np.zeros(8)
    result = LRFinder(quadratic()).find(x, y, steps=200, max_lr=1e4)
    assert result.diverged and len(result.losses) < 200
    assert len(result.lrs) == len(result.losses)
    assert result.lrs[-1] > 2  # where gradient descent on this loss turns unstable


def noisy_model():
    """Batch norm, dropout and a slot for each weight: every kind of state there is."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(3),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.003),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def state(model):
    variables = (*model.variables, *model.optimizer.variables)
    return {variable.path: ops.convert_to_numpy(variable).copy() for variable in variables}


def assert_same(before, after):
    assert before.keys() == after.keys() and len(before) > 20
    assert any("seed" in path for path in before) and any("moving" in path for path in before)
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)


DATA = (
    np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32),
    np.random.default_rng(1).integers(0, 3, 40),
)


def test_everything_is_put_back():
    model = noisy_model()
    model.fit(*DATA, verbose=0)
    before = state(model)
    LRFinder(model).find(*DATA, steps=10, batch_size=8)
    assert_same(before, state(model))
    assert float(model.optimizer.learning_rate) == pytest.approx(0.003)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_everything_is_put_back_after_an_interruption(error, monkeypatch):
    model = noisy_model()
    model.fit(*DATA, verbose=0)
    before, history = state(model), model.history
    model.run_eagerly = True
    step, calls = model.train_step, []

    def interrupted(data):
        calls.append(step(data))
        if len(calls) == 3:
            assert any((state(model)[path] != before[path]).any() for path in before)
            raise error
        return calls[-1]

    monkeypatch.setattr(model, "train_step", interrupted)
    model.train_function = None  # built anew, around the step above
    with pytest.raises(error):
        LRFinder(model).find(*DATA, steps=10, batch_size=8)
    assert len(calls) == 3
    assert_same(before, state(model))
    assert model.history is history


def test_everything_is_put_back_after_nan():
    model = noisy_model()
    model.fit(*DATA, verbose=0)
    before = state(model)
    x = DATA[0].copy()
    x[0] = np.nan
    result = LRFinder(model).find(x, DATA[1], steps=10, batch_size=8)
    assert result.diverged and np.isnan(result.losses[-1])
    assert np.isfinite(result.smoothed).all()
    assert_same(before, state(model))


def test_training_afterwards_is_as_if_nothing_had_happened():
    def trained(with_test):
        keras.utils.set_random_seed(0)
        model = noisy_model()
        if with_test:
            LRFinder(model).find(*DATA, steps=6, batch_size=8)
        history = model.fit(*DATA, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return history.history, model.get_weights()

    (history, weights), (other_history, other_weights) = trained(False), trained(True)
    assert history == other_history
    for a, b in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(a, b)


@keras.saving.register_keras_serializable(package="test_lr_policy")
class OwnStep(keras.Model):
    """A trainer with a random start and a train_step that reports one loss alone."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.seed_generator = keras.random.SeedGenerator(7)
        self.own_loss = keras.metrics.Mean(name="loss")

    def train_step(self, data):
        x, y = data
        x = x + keras.random.uniform(ops.shape(x), -0.01, 0.01, seed=self.seed_generator)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_weights), self.trainable_weights, strict=True)
        )
        self.own_loss.update_state(loss)
        return {"loss": self.own_loss.result()}


def test_a_custom_train_step_is_the_one_that_runs():
    inputs = keras.Input((6,))
    model = OwnStep(inputs, keras.layers.Dense(3)(inputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    seed_before = ops.convert_to_numpy(model.seed_generator.state).copy()
    weights = model.get_weights()
    result = LRFinder(model).find(*DATA, steps=12, batch_size=40, min_lr=1e-6, max_lr=2e-6)
    # With rates this small and the whole data in a batch, each loss is nearly the first one.
    logits = DATA[0] @ weights[0] + weights[1]
    expected = float(loss(DATA[1], logits))
    np.testing.assert_allclose(result.losses, expected, atol=0.01)
    assert len(set(result.losses)) > 6  # a fresh random start for each batch
    np.testing.assert_array_equal(seed_before, ops.convert_to_numpy(model.seed_generator.state))
    assert all(map(np.array_equal, weights, model.get_weights()))


def test_the_adversarial_trainer_is_tested_with_its_own_loss_and_put_back():
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(inputs))
    outputs = keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(10.0))(x)
    model = FastBetterFreeTrainedModel(inputs, outputs, seed=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    data = (np.random.default_rng(0).uniform(size=(40, 6)).astype(np.float32), DATA[1])
    before = {v.path: ops.convert_to_numpy(v).copy() for v in model.variables}
    losses = LRFinder(model).find(*data, steps=6, batch_size=40, min_lr=1e-6, max_lr=2e-6).losses
    # At such rates the weights hardly change: the starts alone make the losses differ.
    clean = float(loss(data[1], model(data[0], training=True)))
    assert len(set(losses)) > 3
    assert (losses > clean).all() and (losses < clean + 1).all()  # without the regulariser
    for variable in model.variables:
        if "moving" not in variable.path:  # updated by the call above
            np.testing.assert_array_equal(before[variable.path], ops.convert_to_numpy(variable))
    assert any("seed_generator" in path for path in before)
    assert int(model.optimizer.iterations) == 0


def test_mixed_precision_with_loss_scaling_works_and_is_put_back():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(3, dtype="mixed_float16")(inputs))
    inner = keras.optimizers.SGD(0.1)
    model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
    result = LRFinder(model).find(DATA[0], np.zeros((40, 3), np.float32), steps=6, max_lr=0.1)
    assert np.isfinite(result.losses).all()
    assert float(inner.learning_rate) == pytest.approx(0.1)
    assert int(inner.iterations) == 0


def test_a_schedule_or_an_uncompiled_model_is_refused():
    for optimizer in (
        keras.optimizers.SGD(TriangularCycle(0.1, 0.5, 10)),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(TriangularCycle(0.1, 0.5, 10))),
    ):
        model = noisy_model()
        model.compile(optimizer, "mse")
        with pytest.raises(InputError, match="already follows a schedule"):
            LRFinder(model).find(*DATA)
    with pytest.raises(InputError, match="compile"):
        LRFinder(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])).find(*DATA)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr"),
        ({"min_lr": 0.0}, "min_lr"),
        ({"growth": "cubic"}, "growth"),
        ({"steps": 1}, "at least 2"),
        ({"epochs": 0}, "epoch"),
        ({"y": None}, "labels"),
        ({"y": DATA[1][:5]}, "as many labels"),
    ],
)
def test_impossible_tests_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        LRFinder(noisy_model()).find(**({"x": DATA[0], "y": DATA[1]} | arguments))


def test_several_steps_per_execution_are_refused():
    with pytest.raises(InputError, match="steps_per_execution"):
        LRFinder(quadratic(steps_per_execution=4)).find(*DATA)


def test_an_endless_dataset_needs_steps():
    dataset = tf.data.Dataset.from_tensor_slices(DATA).batch(8).repeat()
    with pytest.raises(InputError, match="steps"):
        LRFinder(noisy_model()).find(dataset)
    assert len(LRFinder(noisy_model()).find(dataset, steps=7, max_lr=0.01).losses) == 7


# --- suggestion


def under_gaussian(losses):
    """The mean of all losses under a Gaussian around each, in N x N numbers."""
    width = max(1.0, 0.02 * len(losses))
    position = np.arange(len(losses))
    window = np.exp(-0.5 * ((position[:, None] - position) / width) ** 2)
    return window @ losses / window.sum(axis=1)


@pytest.mark.parametrize("steps", [1, 2, 30, 1000])
def test_losses_are_smoothed_by_a_gaussian_cut_off_where_it_is_nothing(steps):
    losses = np.random.default_rng(0).uniform(0, 3, steps)
    result = LRFinderResult(np.geomspace(1e-4, 1, steps), losses, diverged=False)
    np.testing.assert_allclose(result.smoothed, under_gaussian(losses), rtol=1e-13)


def test_a_long_test_is_smoothed_in_little_memory():
    losses = np.ones(30_000)
    tracemalloc.start()
    smoothed = LRFinderResult(losses, losses, diverged=False).smoothed
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * losses.nbytes
    np.testing.assert_allclose(smoothed, 1, rtol=1e-13)


def test_the_suggestion_lies_where_the_fall_begins_and_ends():
    lrs = np.geomspace(1e-4, 10, 501)  # 100 batches per decade
    fall = np.interp(np.log10(lrs), [-4, -2, -0, 0.5, 1], [2.3, 2.3, 1.3, 1.3, 9])
    noise = np.random.default_rng(0).normal(0, 0.02, len(lrs))
    low, high = LRFinderResult(lrs, fall + noise, True).suggestion
    assert low == pytest.approx(10**-1.8, rel=0.3)
    assert high == pytest.approx(10**-0.2, rel=0.3)


def test_a_loss_that_never_falls_has_no_suggestion_but_a_plot():
    result = LRFinderResult(np.geomspace(1e-4, 1, 50), np.linspace(1, 2, 50), False)
    with pytest.raises(InputError, match="never fell"):
        _ = result.suggestion
    assert "never fell" in result.plot().get_title()


def test_noise_is_no_fall_and_a_fall_is_seen_through_noise():
    lrs = np.geomspace(1e-3, 1, 200)
    suggested = {"noise": 0, "fall": 0}
    for seed in range(100):
        noise = 0.01 * np.random.default_rng(seed).standard_normal(200)
        for kind, trend in (("noise", 0.0), ("fall", 0.04 * np.linspace(0, 1, 200))):
            try:
                low, high = LRFinderResult(lrs, 2.3 - trend + noise, False).suggestion
                suggested[kind] += lrs[0] <= low < high <= lrs[-1]
            except InputError:
                pass
    assert suggested["noise"] <= 8
    assert suggested["fall"] == 100


def test_the_plot_goes_where_it_is_told():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    lrs = np.geomspace(1e-4, 1, 50)
    result = LRFinderResult(lrs, np.linspace(2, 1, 50), False)
    assert result.plot(ax) is ax
    assert ax.get_xscale() == "log" and "learning rate" in ax.get_xlabel()
