"""Any saved classifier opens as one thing; what cannot be trusted is refused with the reason."""

import stat
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from fabricated import write_training

from kaf_study import InputError, saved_models
from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.saved_models import file_sha256, folder_sha256, logits_of, open_model, unpack

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


# --- probabilities


@pytest.mark.parametrize(
    "last",
    [
        lambda: [keras.layers.Dense(CLASSES, activation="softmax")],
        lambda: [keras.layers.Dense(CLASSES), keras.layers.Softmax()],
        lambda: [keras.layers.Dense(CLASSES), keras.layers.Activation("softmax")],
    ],
)
def test_softmax_at_the_end_of_a_keras_model_is_removed(last, tmp_path):
    model = classifier(*last())
    model.save(tmp_path / "a.keras")
    with open_model(tmp_path / "a.keras") as opened:
        logits, outputs = logits_of(opened.model, IMAGES)
    assert outputs == "softmax removed"
    np.testing.assert_allclose(tf.nn.softmax(call(logits)), call(model), atol=1e-6)
    assert not np.allclose(call(logits).sum(axis=-1), 1)


def test_logits_stay_as_they_are():
    model = classifier()
    assert logits_of(model, IMAGES) == (model, "logits")


def test_probabilities_out_of_reach_are_attacked_through_their_logarithm(tmp_path):
    model = classifier(keras.layers.Dense(CLASSES, activation="softmax"))
    model.export(tmp_path / "exported", verbose=False)
    with open_model(tmp_path / "exported") as opened:
        logits, outputs = logits_of(opened.model, IMAGES)
    assert outputs == "probabilities"
    np.testing.assert_allclose(tf.nn.softmax(call(logits)), call(model), atol=1e-6)


# --- gradients


class Opaque(tf.Module):
    """A classifier with a custom gradient, as Swish had one in older TensorFlow."""

    @tf.function(input_signature=[tf.TensorSpec((None, *SHAPE), tf.float32)])
    def __call__(self, x):
        @tf.custom_gradient
        def swish(z):
            return z * tf.sigmoid(z), lambda upstream: upstream

        return swish(tf.reshape(x, (-1, 108))[:, :CLASSES])


class Rounded(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, *SHAPE), tf.float32)])
    def __call__(self, x):
        return tf.stop_gradient(tf.reshape(x, (-1, 108))[:, :CLASSES])


def export(module, folder, **options):
    signature = module.__call__.get_concrete_function()
    options = tf.saved_model.SaveOptions(**options)
    tf.saved_model.save(module, folder, signatures=signature, options=options)


def test_custom_gradient_is_used_if_it_was_saved_and_else_refused(tmp_path):
    module = Opaque()
    export(module, tmp_path / "with")
    export(module, tmp_path / "without", experimental_custom_gradients=False)
    with open_model(tmp_path / "with") as opened:
        attacked = CompiledClassifier(opened.model, CLASSES, SHAPE)
        gradient = attacked.loss_gradient(IMAGES, np.eye(CLASSES, dtype="float32")[[0, 0, 0, 0]])
    p = tf.nn.softmax(call(module_call(module))).numpy()
    np.testing.assert_allclose(gradient.reshape(4, -1)[:, 1:3], p[:, 1:], atol=1e-6)
    assert "without gradient information" in refused(tmp_path / "without")


def module_call(module):
    return lambda x, training: module(x)


def test_model_that_no_gradient_passes_is_refused(tmp_path):
    export(Rounded(), tmp_path / "m")
    with open_model(tmp_path / "m") as opened:
        attacked = CompiledClassifier(opened.model, CLASSES, SHAPE)
        assert attacked.predict(IMAGES).shape == (4, CLASSES)
        with pytest.raises(InputError, match="no gradient passes"):
            attacked.check_gradient(IMAGES, np.zeros(4, int))


def test_exported_keras_swish_keeps_its_gradient(tmp_path):
    model = classifier(keras.layers.Dense(CLASSES, activation="swish"))
    model.export(tmp_path / "exported", verbose=False)
    with open_model(tmp_path / "exported") as opened:
        CompiledClassifier(opened.model, CLASSES, SHAPE).check_gradient(IMAGES, np.zeros(4, int))


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


def test_pickled_code_is_not_run(tmp_path):
    model = classifier(keras.layers.Dense(CLASSES), keras.layers.Lambda(lambda z: z * 2))
    model.save(tmp_path / "a.keras")
    assert "not a Keras model" in refused(tmp_path / "a.keras")


def test_nan_weights_are_refused(tmp_path):
    model = classifier()
    model.layers[-1].kernel.assign(model.layers[-1].kernel * np.nan)
    model.save(tmp_path / "a.keras")
    assert "NaN" in refused(tmp_path / "a.keras")


def test_fixed_batch_and_whole_number_images_are_refused(tmp_path):
    for name, spec in {
        "fixed": tf.TensorSpec((1, *SHAPE), tf.float32),
        "bytes": tf.TensorSpec((None, *SHAPE), tf.uint8),
    }.items():
        module = tf.Module()
        module.f = tf.function(
            lambda x: tf.cast(tf.reshape(x, (-1, 108))[:, :3], tf.float32), input_signature=[spec]
        )
        tf.saved_model.save(module, tmp_path / name, signatures=module.f)
    assert "batches of exactly 1" in refused(tmp_path / "fixed")
    assert "uint8" in refused(tmp_path / "bytes")


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
    monkeypatch.setattr(saved_models, "MAX_UNPACKED_BYTES", 5_000)
    assert "at most" in refused(tmp_path / "bad.zip")


def test_archive_of_no_model_or_several_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("a.keras", "a")
        file.writestr("b.keras", "b")
    assert "no model, or several" in refused(tmp_path / "bad.zip")
