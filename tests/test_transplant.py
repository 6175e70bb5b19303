"""Frozen learned shapes: the mean of what was learned, and nothing trains them."""

import json
import shutil

import keras
import numpy as np
import pytest
from fabricated import training_record, write_training

from activationsf import Kaf
from kaf_study import InputError, train
from kaf_study.architectures import build
from kaf_study.config import TrainConfig, config_of, parse
from kaf_study.figures.kafs import layer_activation
from kaf_study.files import file_sha256
from kaf_study.transplant import mean_shapes, network_of_shapes

D = 5


def kafs(model):
    return [layer for layer in model.layers if isinstance(layer, Kaf)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a light CNN whose Kafs have random coefficients."""
    keras.utils.set_random_seed(3)
    model = build("light_cnn", lambda: Kaf(D=D, boundary=2.0, ridge="swish"))
    generator = np.random.default_rng(0)
    for layer in kafs(model):
        layer.alpha.assign(generator.normal(size=layer.alpha.shape))
    settings = {"architecture": "light_cnn", "activation": "kaf_swish", "dictionary_size": D}
    folder = write_training(tmp_path_factory.mktemp("source"), training_record(**settings))
    model.save(folder / "model.keras")
    record = training_record(**settings) | {"model_sha256": file_sha256(folder / "model.keras")}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def frozen(source, **settings):
    return TrainConfig(
        dataset="digits", architecture="light_cnn", activation="kaf_frozen", epochs=1,
        train_n=64, batch_size=32, shapes_of=str(source), **settings,
    )  # fmt: skip


def test_each_layer_has_the_mean_function_of_its_layer_in_all_channels(source):
    trained = keras.models.load_model(source / "model.keras")
    network = network_of_shapes("light_cnn", source)
    x = np.linspace(-4, 4, 50, dtype="float32")[:, None]
    for old, new in zip(kafs(trained), kafs(network), strict=True):
        channels = old.alpha.shape[1]
        mean = np.asarray(old(np.repeat(x, channels, axis=1))).mean(axis=1)
        assert new.alpha.shape == old.alpha.shape
        np.testing.assert_allclose(
            new(np.repeat(x, channels, axis=1)), np.repeat(mean[:, None], channels, 1), atol=1e-5
        )
        assert layer_activation(new) == "kaf_frozen"
    assert not np.allclose(*mean_shapes(trained)[:2])


def test_training_leaves_the_shapes_and_moves_the_rest(source, tmp_path):
    config = frozen(source)
    start = train.build_network(config)
    record = train.train(config, tmp_path / "net", verbose=0)
    assert record["shapes_sha256"] == file_sha256(source / "model.keras")
    trained = keras.models.load_model(tmp_path / "net" / "model.keras")
    for before, after in zip(kafs(start), kafs(trained), strict=True):
        np.testing.assert_array_equal(before.alpha, after.alpha)
        assert not after.trainable
    kernels = [
        [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        for model in (start, trained)
    ]
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(list, kernels), strict=True))
    again = TrainConfig(**json.loads((tmp_path / "net" / "training.json").read_text())["settings"])
    assert again == config


@pytest.fixture
def changing(source, tmp_path):
    """A copy of the source, whose network may change."""
    return shutil.copytree(source, tmp_path / "source")


def retrain(folder):
    """Another network takes the place of the one in the folder."""
    model = keras.models.load_model(folder / "model.keras")
    for layer in kafs(model):
        layer.alpha.assign(-layer.alpha)
    model.save(folder / "model.keras")


def test_the_hash_is_of_the_network_the_shapes_were_taken_from(changing, tmp_path, monkeypatch):
    before = file_sha256(changing / "model.keras")

    def fit(*arguments):
        retrain(changing)
        return trained(*arguments)

    trained = train.fit
    monkeypatch.setattr(train, "fit", fit)
    record = train.train(frozen(changing), tmp_path / "net", verbose=0)
    assert record["shapes_sha256"] == before != file_sha256(changing / "model.keras")


def test_a_run_is_not_resumed_with_the_shapes_of_another_network(changing, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "measured", interrupted)
        train.train(frozen(changing), tmp_path / "net", verbose=0)
    retrain(changing)
    with pytest.raises(InputError, match="shapes of another network"):
        train.train(frozen(changing), tmp_path / "net", verbose=0)


def test_the_command_takes_a_folder(source):
    options = ["--dataset", "digits", "--architecture", "light_cnn", "--out", "x"]
    options += ["--activation", "kaf_frozen", "--shapes-of", str(source)]
    assert config_of(parse(options, "kaf-train")).shapes_of == str(source)


def test_what_gives_no_shapes_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="name its model folder"):
        TrainConfig(activation="kaf_frozen").check()
    with pytest.raises(InputError, match="shapes_of is for kaf_frozen"):
        TrainConfig(activation="kaf_swish", shapes_of=str(source)).check()
    with pytest.raises(InputError, match="dictionary_size is for KAFs that are trained"):
        frozen(source, dictionary_size=D).check()
    with pytest.raises(InputError, match="architecture light_cnn, whose layers are not those"):
        network_of_shapes("resnet20", source)
    with pytest.raises(InputError, match=r"training\.json"):
        network_of_shapes("light_cnn", tmp_path / "nothing")
    bare = write_training(tmp_path / "bare", training_record(architecture="light_cnn"))
    with pytest.raises(InputError, match=r"no model\.keras: train it again"):
        network_of_shapes("light_cnn", bare)
    for activation, reason in (("kaf_free", "moving"), ("relu", "no Kaf")):
        with pytest.raises(InputError, match=reason):
            mean_shapes(build("light_cnn", activation))
