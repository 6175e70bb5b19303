"""A training run leaves a complete model folder, whatever interrupts it on the way."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from tensorflow.python.framework.config import disable_op_determinism

import kernel_expansion
from activationsf import Kaf, Kwta
from activationsf import activation as activation_layer
from fbfadvtrain import Refinements, RobustnessProbe
from kaf_study import InputError, train
from kaf_study.checkpoint import Checkpoint, read_checkpoint
from kaf_study.config import config_of, parse, recipe
from kaf_study.curvature import curvatures
from kaf_study.datasets import load
from kaf_study.lr_policy import WarmMeanSGD
from kaf_study.model_folder import ModelFolder

TINY = {"dataset": "digits", "architecture": "light_cnn", "train_n": 64, "batch_size": 32}
IMAGES = {"name": "digits"}  # of checkpoints made here
COLUMNS = [
    "epoch", "accuracy", "loss", "probe_clean", "probe_fgsm", "probe_pgd", "learning_rate",
    "seconds",
]  # fmt: skip


def config(**settings):
    return train.TrainConfig(**(TINY | {"activation": "relu", "epochs": 2} | settings))


def command_line(settings, out, *more):
    options = []
    for name, value in settings.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return [*options, "--out", str(out), *more]


def tiny_network(name, activation, **kwargs):
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.AveragePooling2D(4)(inputs))
    x = keras.layers.BatchNormalization()(x)
    x = (activation() if callable(activation) else activation_layer(activation))(x)
    x = keras.layers.Dropout(0.2)(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(x), name=name)


def few_validation_images(*arguments):
    """As `load`; the last probe, too, has one batch and so one shape to trace."""
    training, (x, y), test = load(*arguments)
    return training, (x[:100], y[:100]), test


SMALL = {"build": tiny_network, "load": few_validation_images, "PROBE_IMAGES": 16}


def make_small(patch):
    for name, value in SMALL.items():
        patch.setattr(train, name, value)


@pytest.fixture
def tiny(monkeypatch):
    make_small(monkeypatch)


STRAIGHT = {"epochs": 3, "seed": 1, "deterministic": True}
KEPT = ("settings.json", "checkpoint.npz")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of the settings `STRAIGHT` that nothing interrupted: what every other is to equal."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        train.train(config(**STRAIGHT), out, verbose=0)
    disable_op_determinism()
    return out


@pytest.fixture
def deterministic():
    yield
    disable_op_determinism()


def history_of(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def weights_of(folder):
    return keras.models.load_model(folder / "model.keras").get_weights()


def assert_same_result(folder, other):
    pd.testing.assert_frame_equal(history_of(folder), history_of(other), check_exact=True)
    for ours, theirs in zip(weights_of(folder), weights_of(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    records = [json.loads((f / "training.json").read_text()) for f in (folder, other)]
    for key in ("settings", "results", "dataset"):
        assert records[0][key] == records[1][key]


def files(folder):
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes())
        for p in folder.rglob("*")
    }


# --- settings


def test_recipes_are_those_of_the_reference():
    assert recipe("thesis", "resnet20", "kaf") == {
        "optimizer": "sgd", "lr_start": 0.0, "lr_min": 0.01, "lr_max": 0.8, "lr_peak": 0.5,
        "momentum": 0.0, "l2": 5e-4, "kernel_initializer": "glorot_uniform", "ema_momentum": None,
    }  # fmt: skip
    bounds = {
        name: (settings["lr_min"], settings["lr_max"])
        for name in ("relu", "elu", "kaf", "kaf_elu", "swish", "kaf_swish", "kaf_free")
        for settings in [recipe("thesis", "vgg", name)]
    }
    assert bounds == {
        "relu": (0.0001, 0.08),
        "elu": (0.0001, 0.1),
        "kaf": (0.01, 1),
        "kaf_elu": (0.0001, 0.1),
        "swish": (0.0001, 0.3),
        "kaf_swish": (0.0001, 0.8),
        "kaf_free": (0.01, 2),
    }
    for name in ("thesis", "fast", "adam", "strong"):
        of_resnets = set(recipe(name, "resnet20", "elu")) - set(recipe(name, "vgg", "elu"))
        assert of_resnets == {"l2", "kernel_initializer"}
    fast = recipe("fast", "resnet20", "kaf")
    assert fast["momentum"] == 0.9 and fast["lr_max"] < 0.8
    assert recipe("adam", "light_cnn", "kaf")["optimizer"] == "adam"


def test_the_strong_recipe_is_n_fgsm_with_a_warm_mean_and_smooth_labels():
    arguments = "--out x --recipe strong --epochs 30".split()
    settings = config_of(parse(arguments, "train"))
    assert (settings.noise, settings.epsilon_ramp, settings.alpha) == (2.0, 0.1, 8 / 255)
    assert (settings.lr_start, settings.lr_min, settings.lr_max) == (0.0, 0.0, 0.2)
    assert settings.lr_peak == 0.25 and settings.l2 == 2.5e-4 and settings.label_smoothing == 0.1
    settings.check()
    inputs = keras.Input((4, 4, 3))
    network = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs)))
    trainer = train.build_trainer(network, settings, steps=200)
    assert trainer.refinements == Refinements(noise=2.0, ramp=20)
    optimizer = trainer.optimizer
    assert type(optimizer) is WarmMeanSGD and optimizer.use_ema and optimizer.nesterov
    assert (optimizer.ema_momentum, optimizer.momentum) == (0.995, 0.9)
    y = np.array([3])
    loss, label = trainer.loss_fn, np.eye(10)[y]
    logits = np.linspace(-1, 2, 10)[None].astype("float32")
    log_p = logits - np.log(np.exp(logits).sum())
    assert float(loss(label, logits)) == pytest.approx(-(0.9 * log_p[0, 3] + 0.1 * log_p.mean()))
    batch = next(iter(train.epoch_batches(settings, (np.zeros((1, 4, 4, 3)), y), 0)))
    np.testing.assert_array_equal(batch[1], label)
    plain = config_of(parse([*arguments, "--epsilon", "0", "--no-nesterov"], "train"))
    assert plain.noise is None and plain.epsilon_ramp == 0 and not plain.nesterov
    plain.check()


def test_a_run_of_the_strong_recipe_is_kept_as_one(tiny, tmp_path):
    options = command_line(TINY | {"activation": "relu", "epochs": 2}, tmp_path / "out")
    assert train.main([*options, "--recipe", "strong", "--pairing", "1"]) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["settings"]["pairing"] == 1 and record["settings"]["ema_warm"] is True
    assert record["results"]["epochs_trained"] == 2


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_is_of_the_training_alone(precision, tiny, tmp_path, monkeypatch):
    """What is saved, and what its results are of, computes in float32."""
    trained = []

    def build_trainer(network, settings, steps):
        trained.append(original(network, settings, steps))
        return trained[-1]

    original = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", build_trainer)
    options = TINY | {"activation": "kaf", "epochs": 2, "precision": precision}
    assert train.main(command_line(options, tmp_path / "out")) == 0
    model, measured = trained
    dtypes = {layer.compute_dtype for layer in model.layers[1:-1]}
    assert dtypes == {precision.removeprefix("mixed_")}
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (precision == "mixed_float16")
    saved = keras.models.load_model(tmp_path / "out" / "model.keras")
    assert {layer.compute_dtype for layer in (*saved.layers, *measured.layers)} == {"float32"}
    for ours, theirs in zip(saved.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["settings"]["precision"] == precision
    x, y = few_validation_images("digits")[1]
    clean = np.mean(saved.predict(x, verbose=0).argmax(axis=-1) == y)
    assert record["results"]["validation_clean"] == pytest.approx(clean)


def test_the_optimizer_is_the_one_that_is_set():
    inputs = keras.Input((4, 4, 3))
    network = keras.Model(inputs, keras.layers.Flatten()(inputs))
    for name, kind in (("sgd", keras.optimizers.SGD), ("adam", keras.optimizers.Adam)):
        config = train.TrainConfig(optimizer=name, architecture="vgg")
        assert type(train.build_trainer(network, config, steps=10).optimizer) is kind
    with pytest.raises(InputError, match="Unknown optimizer 'rmsprop'"):
        train.TrainConfig(optimizer="rmsprop").check()


def test_the_command_line_defaults_to_the_settings_defaults():
    assert config_of(parse(["--out", "x"], "train")) == train.TrainConfig()


def test_options_override_the_recipe_and_255ths_are_converted_once():
    arguments = "--out x --recipe thesis --lr-max 0.5 --l2 0 --epsilon 4".split()
    settings = config_of(parse(arguments, "train"))
    assert (settings.lr_min, settings.lr_max, settings.momentum) == (0.01, 0.5, 0.0)
    assert settings.l2 == 0
    assert settings.epsilon == 4 / 255 and settings.alpha == 5 / 255
    settings = config_of(parse([*arguments, "--alpha", "2"], "train"))
    assert settings.alpha == 2 / 255


# --- a whole run


def test_a_run_leaves_a_complete_model_folder(straight):
    out, record = straight, json.loads((straight / "training.json").read_text())
    assert {p.name for p in out.iterdir()} == {"model.keras", "training.json", "history.csv"}
    model_bytes = (out / "model.keras").read_bytes()
    assert record["model_sha256"] == hashlib.sha256(model_bytes).hexdigest()
    assert record["settings"]["epsilon"] == 8 / 255
    assert record["versions"]["keras"] == keras.__version__ and record["hardware"]
    assert record["dataset"]["train_n"] == 64

    history = pd.read_csv(out / "history.csv")
    assert list(history["epoch"]) == [0, 1, 2] and set(history) == set(COLUMNS)
    # The triangular cycle after 2, 4 and 6 of 6 batches: three quarters of the way from 0.002 to
    # its peak of 0.2 in the middle (it begins at one quarter), two thirds, and its end.
    np.testing.assert_allclose(history["learning_rate"], [0.1505, 0.134, 0.002], rtol=1e-5)

    model = keras.models.load_model(out / "model.keras")
    assert type(model) is type(keras.Model(model.input, model.output))
    assert all(layer.__class__.__module__ != "kaf_study.fused_layers" for layer in model.layers)
    x, y = few_validation_images("digits")[1]
    accuracy = np.mean(np.argmax(model.predict(x, verbose=0), axis=-1) == y)
    results = record["results"]
    assert results["validation_clean"] == accuracy and results["validation_n"] == 100
    assert results["parameters"] == model.count_params()
    assert results["probe_pgd"] == history["probe_pgd"].iloc[-1] and results["probe_n"] == 16
    assert results["epochs_trained"] == 3
    assert results["catastrophic_overfitting_in_epoch"] is None


def test_history_has_the_curvature_of_each_layer_in_each_epoch(tiny, tmp_path):
    train.train(config(activation="swish"), tmp_path / "out", verbose=0)
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert set(history) == {*COLUMNS, "curvature_1"}
    x_val = load("digits")[1][0]
    kappa = curvatures(keras.models.load_model(tmp_path / "out" / "model.keras"), x_val[:16])
    assert history["curvature_1"][1] == pytest.approx(kappa["kappa"].median(), rel=1e-5)
    assert history["curvature_1"][0] != history["curvature_1"][1]


def test_a_run_begun_without_curvature_goes_on_without(tiny, tmp_path, monkeypatch):
    keep = Checkpoint.on_epoch_end

    def keep_and_stop(self, epoch, logs=None):
        keep(self, epoch, logs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "WITHOUT_CURVATURE", ("swish",))
        patch.setattr(Checkpoint, "on_epoch_end", keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(config(activation="swish"), tmp_path / "out", verbose=0)
    train.train(config(activation="swish"), tmp_path / "out", verbose=0)
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert len(history) == 2 and set(history) == set(COLUMNS)


def test_a_finished_folder_is_left_alone_unless_forced(tiny, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "training.json").read_text())
    record["settings"]["deterministic"] = False
    (tmp_path / "training.json").write_text(json.dumps(record))
    settings = {name: STRAIGHT[name] for name in ("epochs", "seed")} | {"activation": "relu"}
    arguments = command_line(TINY | settings, tmp_path)
    (tmp_path / "robustness").mkdir()
    (tmp_path / "robustness" / "pgd.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    capsys.readouterr()
    assert train.main(arguments) == 0
    assert "already trained" in capsys.readouterr().out
    assert files(tmp_path) == before

    other = [*arguments, "--seed", "3", "--epsilon", "4"]
    assert train.main(other) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "seed: there 1, asked 3" in error
    assert "epsilon: there" in error and "alpha: there" in error and "lr_max" not in error
    assert train.main([*arguments, "--epochs", "0", "--force"]) == 2
    assert train.main([*arguments, "--lr-min", "9", "--force"]) == 2
    assert files(tmp_path) == before  # not even --force removes anything for a refused run

    assert train.main([*other, "--epochs", "1", "--force"]) == 0
    assert json.loads((tmp_path / "training.json").read_text())["settings"]["seed"] == 3
    names = {"model.keras", "training.json", "history.csv", "notes.txt"}  # no robustness
    assert set(files(tmp_path)) == names


def test_an_unfinished_run_of_other_settings_or_a_foreign_model_is_refused(tmp_path):
    folder = ModelFolder(tmp_path)
    folder.start(config(seed=1), force=False)
    with pytest.raises(InputError, match="seed: there 1, asked 2"):
        train.train(config(seed=2), tmp_path)
    folder.settings.unlink()
    (tmp_path / "model.keras").write_text("mine")
    with pytest.raises(InputError, match=r"model\.keras without training\.json"):
        train.train(config(), tmp_path)
    (tmp_path / "training.json").write_text('{"settings": ')
    with pytest.raises(InputError, match="cannot be read"):
        train.train(config(), tmp_path)
    assert (tmp_path / "model.keras").read_text() == "mine"


# --- interruptions


def build_trainer(seed):
    keras.utils.set_random_seed(seed)
    settings = config(seed=seed)
    return train.build_trainer(train.build_network(settings), settings, 10)


def test_a_checkpoint_holds_every_variable(tiny, tmp_path, monkeypatch):
    figures = {"probe_clean": 0.9, "probe_fgsm": 0.5, "probe_pgd": 0.4}
    monkeypatch.setattr(RobustnessProbe, "measure", lambda self: (figures, None))
    model = build_trainer(0)
    x, y = np.random.default_rng(0).uniform(size=(40, 32, 32, 3)).astype("float32"), np.arange(40)
    checkpoint = Checkpoint(tmp_path / "checkpoint.npz", model, IMAGES)
    probe = RobustnessProbe(x[:4], y[:4])
    model.fit(x, y % 10, verbose=0, callbacks=[probe, checkpoint])
    other = build_trainer(1)
    restored = Checkpoint(tmp_path / "checkpoint.npz", other, IMAGES)
    assert restored.history == checkpoint.history and len(restored.history) == 1
    names = []
    variables = [[*m.variables, *m.optimizer.variables] for m in (model, other)]
    for ours, theirs in zip(*variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        names.append(ours.path)
    assert sum("seed_generator" in name for name in names) == 2  # the starts', dropout's
    for word in ("momentum", "iteration", "moving_mean", "kernel"):
        assert any(word in name for name in names), names
    assert int(other.optimizer.iterations) == 2


def test_a_run_interrupted_at_every_awkward_moment_ends_the_same(
    tiny, deterministic, straight, tmp_path, monkeypatch, capsys
):
    settings, out = config(**STRAIGHT), tmp_path / "interrupted"

    def interrupted(module, name, moment, error=KeyboardInterrupt):
        """One call of train that ends when `name` is called with arguments that `moment` picks."""
        real = getattr(module, name, None)

        def replacement(*args, **kwargs):
            if moment(*args):
                raise error
            return real(*args, **kwargs) if real else None

        with monkeypatch.context() as patch:
            patch.setattr(module, name, replacement, raising=False)
            with pytest.raises(error):
                train.train(settings, out, verbose=0)
        assert not [p for p in out.rglob("*") if p.name.startswith(".")]  # no litter, no lock

    def ends_in(name):
        return lambda source, target: os.fspath(target).endswith(name)

    def epochs_kept():
        return len(read_checkpoint(out / "unfinished" / "checkpoint.npz")[0]["history"])

    def stopped_by_a_full_disk(limit):
        """One call of the command while no file may have more than `limit` bytes."""
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            arguments = {name: STRAIGHT[name] for name in ("epochs", "seed")}
            arguments |= TINY | {"activation": "relu"}
            assert train.main(command_line(arguments, out, "--deterministic")) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot write" in error and "too large" in error

    # the disk has no room for a checkpoint
    stopped_by_a_full_disk(2000)
    assert set(files(out)) == {"unfinished", "unfinished/settings.json"}

    batches = []

    def is_third_batch(*args):
        batches.append(args)
        return len(batches) == 3

    # in the middle of epoch 2; callbacks of Keras have one such method for each batch
    interrupted(Checkpoint, "on_train_batch_end", is_third_batch, SystemExit)
    assert epochs_kept() == 1
    # epoch 2 is trained and its checkpoint written, but not yet in its place
    interrupted(os, "replace", ends_in("checkpoint.npz"))
    assert epochs_kept() == 1
    # all is trained, and the disk has no room for the model
    stopped_by_a_full_disk((straight / "model.keras").stat().st_size - 1)
    assert set(files(out)) == {"unfinished", *(f"unfinished/{name}" for name in KEPT)}
    assert epochs_kept() == 3
    # one file after the other takes its place; what was measured is not kept
    for name in ("model.keras", "history.csv", "training.json"):
        with monkeypatch.context() as patch:
            patch.setattr(train, "measured", lambda *_: {})
            interrupted(os, "replace", ends_in(name))
        assert epochs_kept() == 3 and not (out / "training.json").exists()
    interrupted(shutil, "rmtree", lambda path, *_, **__: Path(path).name == "unfinished")
    assert (out / "training.json").exists() and (out / "unfinished").exists()

    record = train.train(settings, out, verbose=0)
    assert set(files(out)) == {"model.keras", "training.json", "history.csv"}
    assert_same_result(out, straight)
    assert [process["first_epoch"] for process in record["processes"]] == [
        0,
        1,
    ]  # whose work is in it


def test_killed_and_started_again_a_run_ends_as_if_nothing_had_happened(straight, tmp_path):
    # As python -m kaf_study.train, with the tiny network and a shorter probe; the first time it
    # kills itself when an epoch is kept, half of a file is written, and the lock is held.
    script = f"""
import os, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_train import SMALL, train
vars(train).update(SMALL)
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def killed(source, target, replace=os.replace):
    replace(source, target)
    if str(target).endswith("checkpoint.npz"):
        (folder / ".tmp-model.keras").write_bytes(b"half")
        os.kill(os.getpid(), {signal.SIGKILL.value})
if not (folder / "unfinished").exists():
    os.replace = killed
sys.exit(train.main())
"""
    out = tmp_path / "killed"
    settings = TINY | {"activation": "relu", "epochs": 3, "seed": 1}
    command = [sys.executable, "-c", script, *command_line(settings, out, "--deterministic")]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    first = subprocess.run(command, env=environment, capture_output=True)
    assert first.returncode == -signal.SIGKILL and (out / ".training.lock").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Resuming" in again.stdout and "after epoch 1 of 3." in again.stdout
    assert set(files(out)) == {"model.keras", "training.json", "history.csv"}
    assert_same_result(out, straight)


def test_an_interrupt_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    arguments = command_line(TINY | {"activation": "relu"}, tmp_path)
    monkeypatch.setattr(train, "load", interrupt)
    assert train.main(arguments) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the same command" in error


def test_a_second_run_in_a_folder_is_one_line(tiny, tmp_path, capsys):
    with ModelFolder(tmp_path).locked():
        assert train.main(command_line(TINY | {"activation": "relu"}, tmp_path)) == 2
        assert not (tmp_path / "unfinished").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"in use by process {os.getpid()} since" in error


def test_who_finds_a_folder_finished_leaves_another_its_lock(straight, tmp_path):
    """The first holds it, to train it anew; to the second it is finished; a third is refused."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    folder, settings = ModelFolder(tmp_path), config(**STRAIGHT)
    with folder.locked():
        assert train.train(settings, folder.path) == json.loads(folder.record.read_text())
        with pytest.raises(InputError, match="in use"), folder.locked():
            pass
        folder.unfinished.mkdir()
        with pytest.raises(InputError, match="in use"):
            train.train(settings, folder.path)
        assert folder.unfinished.exists()
    train.train(settings, folder.path)  # now they are what a killed run left
    assert set(files(folder.path)) == {"model.keras", "training.json", "history.csv"}


def test_catastrophic_overfitting_ends_the_run_with_the_good_weights(tiny, tmp_path, monkeypatch):
    script = iter([(0.4, 0.3), (0.9, 0.1), (0.4, 0.3)])  # the last: of the weights that are saved

    def measure(self):
        fgsm, pgd = next(script)
        return {"probe_clean": 0.9, "probe_fgsm": fgsm, "probe_pgd": pgd}, None

    monkeypatch.setattr(RobustnessProbe, "measure", measure)
    weights = []
    monkeypatch.setattr(
        RobustnessProbe,
        "on_epoch_begin",
        lambda self, epoch, logs=None: weights.append(self.model.get_weights()),
    )
    monkeypatch.setattr(ModelFolder, "finish", lambda *_: {})  # killed before it has finished
    train.train(config(epochs=5), tmp_path, verbose=0)
    monkeypatch.undo()
    make_small(monkeypatch)
    record = train.train(config(epochs=5), tmp_path, verbose=0)  # resumed: nothing left to train
    results = record["results"]
    assert results["catastrophic_overfitting_in_epoch"] == 1 and results["epochs_trained"] == 2
    assert results["probe_pgd"] == 0.3  # of the weights that are saved
    assert list(pd.read_csv(tmp_path / "history.csv")["probe_pgd"]) == [0.3, 0.1]
    for ours, theirs in zip(weights_of(tmp_path), weights[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_diverging_run_stops_and_keeps_the_epoch_before(tiny, tmp_path, capsys):
    # One batch per epoch; the first has rate 0.
    settings = TINY | {"train_n": 32, "activation": "relu", "epochs": 4}
    arguments = command_line(settings | {"lr_min": 0, "lr_max": 3e38, "lr_start": 0}, tmp_path)
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--lr-max" in error
    epoch = int(re.search(r"diverged in epoch (\d)", error)[1])
    assert epoch > 1
    assert {p.name for p in tmp_path.iterdir()} == {"unfinished"}
    path = tmp_path / "unfinished" / "checkpoint.npz"
    state, values = read_checkpoint(path)
    assert len(state["history"]) == epoch - 1
    assert all(np.isfinite(value).all() for value in values)

    for torn in (b"PK\x03\x04 torn", b""):
        path.write_bytes(torn)
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert "not a checkpoint" in error and "--force" in error


ROW = {"epoch": 0, "loss": 2.3, "seconds": 1.0}
ROW |= {"probe_clean": 0.5, "probe_fgsm": 0.4, "probe_pgd": 0.3}
STATE = {"history": [ROW, ROW | {"epoch": 1}], "stopped": None, "dataset": IMAGES, "processes": []}


def write_checkpoint(path, state, *values):
    text = state if isinstance(state, str) else json.dumps(state)
    np.savez(path, state=text, **{f"variable_{i}": value for i, value in enumerate(values)})


def test_whatever_a_checkpoint_holds_is_read_or_refused_in_one_line(tmp_path):
    path, weights = tmp_path / "checkpoint.npz", np.ones(3, "float32")
    write_checkpoint(path, STATE, weights, np.arange(2))
    assert read_checkpoint(path)[0] == STATE
    whole = path.read_bytes()
    old = {name: STATE[name] for name in ("history", "stopped")}
    write_checkpoint(path, old, weights)
    assert read_checkpoint(path)[0] == old

    def is_refused():
        with pytest.raises(InputError) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)

    states = ["{}", "[]", "null", "{", ""]
    for name in STATE:
        for value in (None, "x", -1, {}, [1]):
            if (name, value) != ("stopped", None):
                states.append(STATE | {name: value})
    states += [STATE | {"history": []}, STATE | {"stopped": 0}, STATE | {"stopped": 2}]
    for name in ROW:
        states.append(STATE | {"history": [{k: v for k, v in ROW.items() if k != name}]})
        states += [STATE | {"history": [ROW | {name: value}]} for value in ("x", None, [])]
    states.append(STATE | {"history": [ROW, ROW]})
    for state in states:
        write_checkpoint(path, state, weights)
        is_refused()
    for wrong in (np.float32([1, np.nan]), np.float32([np.inf]), np.array([None])):
        write_checkpoint(path, STATE, weights, wrong)
        is_refused()
    np.savez(path, state=json.dumps(STATE), variable_1=weights)
    is_refused()
    for share in (0, 0.01, 0.3, 0.7, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        is_refused()
    path.unlink()
    path.symlink_to("/dev/zero")
    is_refused()


def test_a_checkpoint_of_another_network_or_other_images_is_refused(tiny, tmp_path):
    """Half a training on a copy of CIFAR-10 and half on the official one is neither."""
    path, model = tmp_path / "checkpoint.npz", build_trainer(0)
    values = [v.numpy() for v in Checkpoint._variables(model)]
    before = model.get_weights()
    for wrong, images, said in (
        (values[:-1], IMAGES, "not a checkpoint of this network"),
        ([*values[:-1], np.zeros(7)], IMAGES, "not a checkpoint of this network"),
        (values, IMAGES | {"train_fingerprint": "other"}, "other images of digits"),
    ):
        write_checkpoint(path, STATE | {"dataset": IMAGES}, *wrong)
        with pytest.raises(InputError, match=said):
            Checkpoint(path, model, images)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_that_are_not_finite_are_never_kept(tiny, tmp_path):
    model = build_trainer(0)
    checkpoint = Checkpoint(tmp_path / "checkpoint.npz", model, IMAGES)
    checkpoint.set_model(model)
    checkpoint.on_epoch_begin(0)
    model.layers[-1].bias.assign(np.full(10, np.inf))
    with pytest.raises(InputError, match="diverged in epoch 1"):
        checkpoint.on_epoch_end(0, {"loss": 2.3})  # the loss of the batch before
    assert list(tmp_path.iterdir()) == []


# --- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dataset mnist", "Unknown dataset 'mnist'"),
        ("--activation tanhh", "Unknown activation 'tanhh'"),
        ("--activation tanhh --recipe thesis --architecture vgg", "Unknown activation 'tanhh'"),
        ("--architecture resnet21", "depth 6n + 2, from 8 to 1202; received depth=21"),
        ("--architecture wrn", "Unknown architecture 'wrn'"),
        ("--recipe slow", "Unknown recipe 'slow'"),
        ("--epochs 0", "epochs lies in 1 to"),
        ("--batch-size 0", "batch_size lies in 1 to"),
        ("--train-n 0", "train_n lies in 1 to"),
        ("--epsilon -8", "between 0 and 255"),
        ("--epsilon 300", "between 0 and 255"),
        ("--epsilon nan", "between 0 and 255"),
        ("--alpha -1", "between 0 and 255"),
        ("--lr-min 0.5 --lr-max 0.1", "min_lr=0.5, max_lr=0.1"),
        ("--lr-max nan", "max_lr=nan"),
        ("--momentum 1", "momentum lies in"),
        ("--l2 -1 --architecture resnet8", "l2 is not negative"),
        ("--seed -1", "seed lies in"),
        ("--seed 2147483648", "seed lies in"),
        ("--seed 1.5", "invalid int value"),
        ("--train-n 1258", "digits has 1257"),
        ("--epochs 1000000", "epochs lies in"),
        ("--batch-size 1000000000000", "batch_size lies in"),
        ("--activation kaf --dictionary-size 1000000", "dictionary_size lies in"),
        ("--dictionary-size 10", "dictionary_size is for KAFs"),
        ("--kernel-initializer he_normal", "kernel_initializer is for ResNets"),
        ("--l2 0.1", "l2 is for ResNets"),
        ("--epsilon 0 --alpha 2", "--alpha changes nothing"),
        ("--data-dir /tmp", "--data-dir changes nothing"),
        ("--noise -1", "noise lies in 0 to 100"),
        ("--noise 2 --epsilon 0", "noise is for adversarial training"),
        ("--pairing-ramp 0.5", "together with pairing"),
        ("--epsilon-ramp 1", "epsilon_ramp lies in [0, 1)"),
        ("--label-smoothing nan", "label_smoothing lies in [0, 1)"),
        ("--recipe adam --nesterov", "nesterov is for sgd"),
        ("--ema-warm", "together with ema_momentum"),
        ("--activation kwta --kwta-anneal-from 15", "an epoch before the last"),
        ("--activation kwta --kwta-anneal-every 1", "together with kwta_anneal_from"),
        ("--dataset cifar10 --data-dir /nowhere", "--data-dir must name"),
    ],
)
def test_a_refused_run_says_why_and_leaves_nothing(options, said, tmp_path, capsys):
    out = tmp_path / "models" / "net"
    arguments = command_line(TINY | {"activation": "relu"}, out, *options.split())
    try:
        code = train.main(arguments)
    except SystemExit as exit:  # argparse
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "net", "cannot write"),
    ):
        assert train.main(command_line(TINY | {"activation": "relu"}, out)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error
    assert (tmp_path / "file").read_text() == "mine"


def small_network(name, activation, **kwargs):
    """One convolution, and no dropout, whose noise depends on the twin."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.AveragePooling2D(4)(inputs))
    layer = activation_layer(activation) if isinstance(activation, str) else activation()
    x = layer(keras.layers.BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)), name=name)


def test_histories_with_and_without_the_fast_paths_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", small_network)
    monkeypatch.setattr(train, "PROBE_IMAGES", 64)
    settings = config(activation="kaf", lr_max=0.05)
    train.train(settings, tmp_path / "fast", verbose=0)
    monkeypatch.setattr(kernel_expansion, "_has_fast_path", lambda x: False)
    monkeypatch.setattr(train, "fused", lambda network, policy: network)
    train.train(settings, tmp_path / "plain", verbose=0)
    fast, plain = history_of(tmp_path / "fast"), history_of(tmp_path / "plain")
    np.testing.assert_allclose(fast["loss"], plain["loss"], rtol=1e-4)
    for ours, theirs in zip(
        weights_of(tmp_path / "fast"), weights_of(tmp_path / "plain"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


# --------------------------------------------------------------------------- settings by name


def test_settings_reach_what_they_set():
    settings = config(
        architecture="resnet8",
        activation="kaf",
        kernel_initializer="he_normal",
        lr_peak=0.2,
        lr_start=0.5,
        ema_momentum=0.9,
        dictionary_size=16,
    )
    network = train.build_network(settings)
    convolution = next(layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D))
    assert isinstance(convolution.kernel_initializer, keras.initializers.HeNormal)
    assert next(layer for layer in network.layers if isinstance(layer, Kaf)).D == 16
    optimizer = train.build_trainer(network, settings, 100).optimizer
    assert optimizer.use_ema and optimizer.ema_momentum == 0.9
    schedule = optimizer._learning_rate
    assert float(schedule(0)) == pytest.approx((settings.lr_min + settings.lr_max) / 2)
    assert float(schedule(20)) == pytest.approx(settings.lr_max)


def test_saved_weights_are_the_running_mean_and_batch_norm_is_of_them(tiny, tmp_path, monkeypatch):
    """Ordinary training, of one batch per epoch, so that batch norm is of that one batch."""
    monkeypatch.setattr(train, "EMA_BATCHES", 1)
    seen, original = [], Checkpoint.on_epoch_end

    def keep(self, epoch, logs=None):
        original(self, epoch, logs)
        optimizer = self.model.optimizer
        averages = optimizer._model_variables_moving_average
        seen[:] = [[v.numpy() for v in vs] for vs in (self.model.trainable_variables, averages)]

    monkeypatch.setattr(Checkpoint, "on_epoch_end", keep)
    settings = config(ema_momentum=0.9, epsilon=0.0, alpha=0.0, batch_size=64)
    record = train.train(settings, tmp_path / "ema", verbose=0)
    saved = keras.models.load_model(tmp_path / "ema" / "model.keras")
    last, mean = seen
    for got, expected in zip(saved.trainable_variables, mean, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(mean, last, strict=True))

    (x, _), _, _ = load("digits")
    before = keras.Model(saved.input, saved.layers[3].input)(x[:64]).numpy()
    batch_norm = saved.layers[3]
    assert isinstance(batch_norm, keras.layers.BatchNormalization)
    np.testing.assert_allclose(batch_norm.moving_mean, before.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(batch_norm.moving_variance, before.var(axis=(0, 1, 2)), rtol=1e-3)

    # Nothing is attacked, but what an attack would do is measured.
    assert set(pd.read_csv(tmp_path / "ema" / "history.csv")) == set(COLUMNS)
    assert record["results"]["catastrophic_overfitting_in_epoch"] is None
    plain = train.build_trainer(train.build_network(settings), settings, 10)
    assert type(plain).train_step is keras.Model.train_step


def test_estimates_of_batch_norm_are_means_over_all_batches():
    model = build_trainer(0)
    x = np.random.default_rng(0).uniform(size=(6, 8, 32, 32, 3)).astype("float32")
    layer = next(la for la in model.layers if isinstance(la, keras.layers.BatchNormalization))
    momentum, means = layer.momentum, []
    model.eps = model.alpha = 0.0  # no perturbation: what the batches' means are is then known
    for batch in x:
        means.append(keras.Model(model.input, layer.input)(batch).numpy().mean(axis=(0, 1, 2)))
    train.reestimate_batch_norm(model, [(batch, np.zeros(8, int)) for batch in x])
    np.testing.assert_allclose(layer.moving_mean, np.mean(means, axis=0), atol=1e-5)
    assert layer.momentum == momentum


def test_ratio_of_kwta_falls_as_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", small_network)
    settings = config(
        activation="kwta",
        optimizer="adam",
        epochs=2,
        kwta_anneal_from=0,
        kwta_anneal_every=1,
    )
    assert kwta_ratios(train.build_network(settings)) == {0.30}
    train.train(settings, tmp_path / "kwta", verbose=0)
    # Epoch 0 at 0.30, 1 at 0.29
    assert kwta_ratios(keras.models.load_model(tmp_path / "kwta" / "model.keras")) == {0.29}


def kwta_ratios(model):
    layers = [layer for layer in model.layers if isinstance(layer, Kwta)]
    return {round(float(layer.ratio.numpy()), 4) for layer in layers}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kernel_initializer": "zeros"}, "Choose one of: glorot_uniform"),
        ({"ema_momentum": 1.0}, "ema_momentum lies in"),
        ({"dictionary_size": 1}, "dictionary_size lies in 2 to"),
        ({"kwta_anneal_from": 1}, "kwta_anneal_from is for kwta"),
        ({"architecture": "vgg", "l2": 1.0}, "l2 is for ResNets"),
        ({"kwta_anneal_every": 0}, "kwta_anneal_every lies in 1 to"),
        ({"seed": 1.5}, "other types.*seed"),
        ({"epochs": True}, "other types.*epochs"),
    ],
)
def test_impossible_settings_by_name(changed, reason):
    with pytest.raises(InputError, match=reason):
        config(**changed).check()
