"""Any saved classifier opens as one thing; what cannot be trusted is refused with the reason."""

import stat
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from fabricated import write_training

from kaf_study import InputError
from kaf_study.saved_models import (
    archives,
    file_sha256,
    folder_sha256,
    logits_of,
    open_model,
    unpack,
)

SHAPE, CLASSES = (6, 6, 3), 3
IMAGES = np.random.default_rng(0).uniform(0, 1, (4, *SHAPE)).astype("float32")


def classifier(*last):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Input(SHAPE), keras.layers.Flatten()]
    return keras.Sequential([*layers, *(last or (keras.layers.Dense(CLASSES),))])


def call(model):
    return np.asarray(model(tf.constant(IMAGES), training=False))


@pytest.fixture
def saved(tmp_path):
    """The same model in every form that is accepted: {form: path}, and the model."""
    model, places = classifier(), {}
    places["keras"] = tmp_path / "a.keras"
    places["h5"] = tmp_path / "a.h5"
    for file in (places["keras"], places["h5"]):
        model.save(file)
    places["saved model"] = tmp_path / "exported"
    model.export(places["saved model"], verbose=False)
    places["folder"] = tmp_path / "trained"
    places["folder"].mkdir()
    model.save(places["folder"] / "model.keras")
    write_training(places["folder"])
    for form in ("keras", "saved model", "folder"):
        places[f"zip of {form}"] = pack(tmp_path / f"{form} packed.zip", places[form])
    return places, model


def pack(archive, source):
    with zipfile.ZipFile(archive, "w") as file:
        for path in [source] if source.is_file() else source.rglob("*"):
            file.write(path, path.relative_to(source.parent))
    return archive


def test_every_form_gives_the_same_outputs(saved):
    places, model = saved
    for path in places.values():
        with open_model(path) as opened:
            np.testing.assert_allclose(call(opened.model), call(model), atol=1e-6)


def test_model_folder_names_its_dataset_and_hash(saved):
    places, _ = saved
    with open_model(places["folder"]) as opened:
        assert opened.name == "trained"
        assert opened.dataset == "digits"
        assert opened.folder == places["folder"]
        assert opened.sha256 == file_sha256(places["folder"] / "model.keras")
    with open_model(places["keras"]) as opened:
        assert (opened.name, opened.folder, opened.dataset) == ("a", None, None)


def test_hash_of_a_folder_follows_its_files_but_not_its_results(saved):
    folder = saved[0]["saved model"]
    before = folder_sha256(folder)
    (folder / "robustness").mkdir()
    (folder / "robustness" / "pgd.json").write_text("{}")
    assert folder_sha256(folder) == before
    (folder / "saved_model.pb").write_bytes(b"other")
    assert folder_sha256(folder) != before


@pytest.mark.parametrize("name", ["best.keras", "model.h5", "weights-and-all.hdf5"])
def test_folder_and_zip_with_one_keras_file_open(name, tmp_path):
    model = classifier()
    folder = tmp_path / "run7"
    folder.mkdir()
    model.save(folder / "best.keras" if name == "best.keras" else folder / "model.h5")
    next(folder.iterdir()).rename(folder / name)
    with open_model(folder) as opened:
        np.testing.assert_allclose(call(opened.model), call(model), atol=1e-6)
        assert (opened.name, opened.folder) == ("run7", folder)
    with open_model(pack(tmp_path / "a.zip", folder)) as opened:
        np.testing.assert_allclose(call(opened.model), call(model), atol=1e-6)


# --- outputs


SQUASHING = ("softmax", "sigmoid", "tanh")


@pytest.mark.parametrize("squashing", SQUASHING)
@pytest.mark.parametrize("as_layer", [False, True])
def test_squashing_at_the_end_of_a_keras_model_is_removed(squashing, as_layer, tmp_path):
    dense = keras.layers.Dense(CLASSES, activation=None if as_layer else squashing)
    model = classifier(dense, *([keras.layers.Activation(squashing)] if as_layer else []))
    model.save(tmp_path / "a.keras")
    with open_model(tmp_path / "a.keras") as opened:
        logits, outputs = logits_of(opened.model, IMAGES)
    assert outputs == f"{squashing} removed"
    again = getattr(keras.activations, squashing)(call(logits))
    np.testing.assert_allclose(again, call(model), atol=1e-6)
    assert not np.allclose(call(logits), call(model), atol=0.05)


def test_softmax_layer_and_nested_models_end_in_their_logits():
    for model in (
        classifier(keras.layers.Dense(CLASSES), keras.layers.Softmax()),
        keras.Sequential([keras.Input(SHAPE), classifier(keras.layers.Dense(3, "softmax"))]),
    ):
        logits, outputs = logits_of(model, IMAGES)
        assert outputs == "softmax removed"
        np.testing.assert_allclose(tf.nn.softmax(call(logits)), call(model), atol=1e-6)


def test_logits_stay_as_they_are():
    model = classifier()
    assert logits_of(model, IMAGES) == (model, "logits")


def test_probabilities_out_of_reach_are_attacked_through_their_logarithm():
    model = classifier()

    def softmax(x, training=False):
        exponentials = tf.exp(model(x))
        return exponentials / tf.reduce_sum(exponentials, axis=-1, keepdims=True)

    logits, outputs = logits_of(softmax, IMAGES)
    assert outputs == "probabilities"
    np.testing.assert_allclose(tf.nn.softmax(call(logits)), call(softmax), atol=1e-6)


def test_sigmoid_and_tanh_out_of_reach_are_said():
    model = classifier()

    def sigmoid(x, training=False):
        return 1 / (1 + tf.exp(-model(x)))

    def tanh(x, training=False):
        return 2 / (1 + tf.exp(-20 * model(x))) - 1

    def small(x, training=False):
        return 0.1 * model(x)

    assert logits_of(sigmoid, IMAGES) == (sigmoid, "squashed")
    assert logits_of(tanh, IMAGES) == (tanh, "squashed")
    assert logits_of(small, IMAGES) == (small, "logits")


@keras.saving.register_keras_serializable("tests")
class OutputsInADict(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(CLASSES)

    def call(self, x):
        return {"logits": self.dense(keras.ops.reshape(x, (-1, 108)))}


def test_output_in_a_dict_of_one_is_taken_out(tmp_path):
    x = keras.Input(SHAPE)
    y = keras.layers.Dense(CLASSES)(keras.layers.Flatten()(x))
    subclassed = OutputsInADict()
    subclassed(IMAGES)
    for model in (keras.Model(x, {"logits": y}), subclassed):
        model.save(tmp_path / "a.keras")
        with open_model(tmp_path / "a.keras") as opened:
            np.testing.assert_allclose(call(opened.model), model(IMAGES)["logits"], atol=1e-6)


# --- refusals


def refused(path):
    with pytest.raises(InputError) as error, open_model(path):
        pass
    message = str(error.value)
    assert "\n" not in message
    return message


def test_foreign_files_are_refused_in_one_line(tmp_path):
    assert "does not exist" in refused(tmp_path / "missing.keras")
    (tmp_path / "empty").mkdir()
    assert "neither model.keras nor saved_model.pb" in refused(tmp_path / "empty")
    for name in ("text.keras", "text.h5", "text.zip", "text.txt"):
        (tmp_path / name).write_text("not a model")
        assert name in refused(tmp_path / name)
    (tmp_path / "empty" / "saved_model.pb").write_text("not a model")
    assert "not a SavedModel" in refused(tmp_path / "empty")


def test_cut_off_keras_file_is_refused(saved):
    path = saved[0]["keras"]
    path.write_bytes(path.read_bytes()[:2000])
    assert "not a Keras archive" in refused(path)


def test_device_in_place_of_a_file_is_refused_without_reading_it(saved, tmp_path):
    (tmp_path / "zero.keras").symlink_to("/dev/zero")
    assert "no regular file" in refused(tmp_path / "zero.keras")
    variables = saved[0]["saved model"] / "variables" / "variables.index"
    variables.unlink()
    variables.symlink_to("/dev/zero")
    assert "no regular file" in refused(saved[0]["saved model"])


def test_keras_file_is_held_to_the_limit_of_zips(saved, monkeypatch):
    file = saved[0]["keras"]
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more", bytes(200_000))
    assert file.stat().st_size < 50_000
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 100_000)
    assert "at most" in refused(file)


def test_nan_weights_are_refused(tmp_path):
    model = classifier()
    model.layers[-1].kernel.assign(model.layers[-1].kernel * np.nan)
    model.save(tmp_path / "a.keras")
    assert "NaN" in refused(tmp_path / "a.keras")


def test_keras_model_of_two_outputs_is_refused(tmp_path):
    x = keras.Input(SHAPE)
    flat = keras.layers.Flatten()(x)
    keras.Model(x, [keras.layers.Dense(2)(flat), keras.layers.Dense(2)(flat)]).save(
        tmp_path / "a.keras"
    )
    assert "2 outputs" in refused(tmp_path / "a.keras")


def test_keras_model_that_was_never_built_is_refused(tmp_path):
    keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)]).save(tmp_path / "u.keras")
    assert "before it was built" in refused(tmp_path / "u.keras")


@pytest.mark.parametrize(
    "name", ["../evil.keras", "/evil.keras", "a/../../evil", "C:/evil", "..\\e"]
)
def test_archive_cannot_write_outside_its_folder(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("good.keras", "first")
        file.writestr(name, "evil")
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(InputError, match="outside"):
        unpack(tmp_path / "bad.zip", inside)
    assert not list(inside.iterdir())  # nothing was written, not even what came first
    assert "refused" in refused(tmp_path / "bad.zip")


def test_archive_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("model.keras")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    assert "symbolic link" in refused(tmp_path / "bad.zip")


def test_archive_larger_than_a_model_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.keras", bytes(10_000))
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 5_000)
    assert "at most" in refused(tmp_path / "bad.zip")


def test_archive_of_no_model_or_several_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("a.keras", "a")
        file.writestr("b.keras", "b")
    assert "no model, or several" in refused(tmp_path / "bad.zip")
