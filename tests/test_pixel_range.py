"""A model of another pixel range than [0, 1] is recognised, and attacked in pixels all the same."""

import json
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from kaf_study import InputError, command, sanity_checks
from kaf_study.datasets import load
from kaf_study.evaluation import read_results
from kaf_study.result_files import read_adversarial
from kaf_study.saved_models import PixelRange, logits_of, open_model
from kaf_study.saved_models.pixel_range import Rescaled, refuse_other_range

PATH = Path("network.keras")
RANGES = (
    "0..255",
    "-1..1",
    "mean=0.4914,0.4822,0.4465,std=0.2470,0.2435,0.2616",
    "mean=0.4914,0.4822,0.4465,std=1",
)


@pytest.fixture(scope="module")
def digits():
    return load("digits")[2]


def nearest_mean(x, y, *before):
    """The classifier by the nearest class mean, in the range of x (N, H, W, C): a linear one."""
    x = x.astype("float64").reshape(len(x), -1)
    means = np.stack([x[y == c].mean(axis=0) for c in range(10)])
    dense = keras.layers.Dense(10)
    model = keras.Sequential([keras.Input((32, 32, 3)), *before, keras.layers.Flatten(), dense])
    squared = (means**2).sum(axis=1)
    scale = 10 / squared.max()  # logits of 10 or so in any range: the cross-entropy has a gradient
    dense.set_weights([scale * means.T, -0.5 * scale * squared])
    return model


def fed(x, name):
    return np.asarray(Rescaled(None, PixelRange.parse(name)).pixels(keras.ops.array(x)))


def test_ranges_as_they_are_written():
    x = np.array([[0.0, 0.5, 1.0]], "float32")
    expected = {
        "0..1": [0, 0.5, 1],
        "0..255": [0, 127.5, 255],
        "-1..1": [-1, 0, 1],
        "mean=0.5,std=0.25": [-2, 0, 2],
        "mean=0,0.25,0.5,std=1,0.5,0.25": [0, 0.5, 2],
        "mean=127.5,std=63.75": [-2, 0, 2],  # of pixels in 0..255
    }
    for name, values in expected.items():
        np.testing.assert_allclose(fed(x, name)[0], values, atol=1e-6)


@pytest.mark.parametrize("text", ["0-255", "mean=0.5", "mean=1,2,std=1,2,3", "mean=a,std=1", ""])
def test_ranges_that_are_none(text):
    with pytest.raises(InputError, match="--input expects"):
        PixelRange.parse(text)
    with pytest.raises(InputError, match="std above 0"):
        PixelRange.parse("mean=0.5,std=0")


@pytest.mark.parametrize("name", RANGES)
def test_model_of_another_range_is_refused_by_the_option_it_needs(name, digits):
    x, y = digits
    model = nearest_mean(fed(x, name), y)
    with pytest.raises(InputError) as error:
        refuse_other_range(PATH, model, x, y)
    # The two spreads that are in use for CIFAR-10 are nearly the same.
    assert f"--input={name.partition('.2470')[0]}" in str(error.value)
    assert "\n" not in str(error.value)


def test_model_of_pixels_in_0_to_1_passes(digits):
    x, y = digits
    refuse_other_range(PATH, nearest_mean(x, y), x, y)


def test_rescaling_inside_is_found_where_accuracy_hardly_tells(digits, tmp_path):
    x, y = digits
    inside = keras.layers.Rescaling(1 / 255)
    model = nearest_mean(x, y, inside)
    dense = model.layers[-1]
    dense.set_weights([dense.get_weights()[0], 255 * dense.get_weights()[1] / 255])
    model.export(tmp_path / "exported", verbose=False)
    with open_model(tmp_path / "exported") as exported:
        for form in (model, exported.model):
            with pytest.raises(InputError, match=r"Rescaling\(1/255\) inside .* --input=0..255"):
                refuse_other_range(PATH, form, x, y)
    before = keras.layers.Rescaling(255)  # which undoes it: such a model takes [0, 1]
    refuse_other_range(PATH, nearest_mean(x, y, before, inside), x, y)


def test_logits_of_a_rescaled_model_take_images_in_0_to_1(digits):
    x, y = digits
    x = x[:8]
    inner = nearest_mean(fed(digits[0], "-1..1"), y)
    squashed = keras.Sequential([inner, keras.layers.Softmax()])
    for model in (inner, squashed):
        logits, _ = logits_of(Rescaled(model, PixelRange.parse("-1..1")), x)
        np.testing.assert_allclose(logits(x), inner(2 * x - 1), rtol=1e-4, atol=1e-3)


def test_wrong_number_of_channels_is_one_line(digits):
    model = Rescaled(nearest_mean(*digits), PixelRange.parse("mean=0.5,0.5,std=1,1"))
    with pytest.raises(InputError, match="2 channels"):
        model(digits[0][:2])


# --- the command


@pytest.mark.parametrize("name", ["0..1", "-1..1", "mean=0.5,std=0.25"])
def test_the_option_takes_every_range_after_a_blank(name):
    assert command.parse(["a.keras", "--input", name, "--n", "5"]).input == name
    assert command.parse(["a.keras", f"--input={name}"]).input == name


def test_command_names_the_option_and_then_attacks_in_pixels(digits, tmp_path, capsys):
    x, y = digits
    nearest_mean(fed(x, "0..255"), y).save(tmp_path / "foreign.keras")
    arguments = [str(tmp_path / "foreign.keras"), "--dataset", "digits", "--n", "100"]
    arguments += ["--attack", "fgsm", "--eps", "4"]
    assert command.main([*arguments, "--n", "5"]) == 2  # more images tell of the range
    line = capsys.readouterr().err
    assert "--input=0..255" in line and line.count("\n") == 1
    assert command.main([*arguments, "--input", "0..255", "--save-adversarial"]) == 0
    assert "given pixels in 0..255" in capsys.readouterr().out
    result = read_results(tmp_path).iloc[0]
    expected = nearest_mean(x, y)(x[:100]).numpy().argmax(axis=-1) == y[:100]
    assert result["clean_accuracy"] == pytest.approx(expected.mean(), abs=0.02)
    (images,) = tmp_path.rglob("*.npz")
    x_adv = read_adversarial(images, x[:100])
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert 3.9 / 255 < np.abs(x_adv - x[:100]).max() <= 4 / 255 + 1e-6
    assert json.loads(images.with_suffix(".json").read_text())["remarks"] == [
        "it is given pixels in 0..255"
    ]


def test_examples_are_not_transferred_from_a_model_in_a_wrong_range(digits, tmp_path, capsys):
    x, y = digits
    nearest_mean(x, y).save(tmp_path / "plain.keras")
    nearest_mean(fed(x, "0..255"), y).save(tmp_path / "foreign.keras")
    arguments = [str(tmp_path / "plain.keras"), "--dataset", "digits", "--check"]
    assert command.main([*arguments, "--transfer-from", str(tmp_path / "foreign.keras")]) == 2
    assert "foreign.keras" in (line := capsys.readouterr().err) and "--input=0..255" in line


def test_range_that_is_given_is_taken(digits, tmp_path):
    x, y = digits
    nearest_mean(fed(x, "0..255"), y).save(tmp_path / "foreign.keras")
    arguments = [str(tmp_path / "foreign.keras"), "--dataset", "digits", "--n", "100"]
    assert command.main([*arguments, "--attack", "fgsm", "--input", "0..1"]) == 0


def test_architecture_and_activation_go_together(capsys):
    assert command.main(["a.weights.h5", "--architecture", "resnet20"]) == 2
    assert "go together" in capsys.readouterr().err


@pytest.mark.parametrize(("correct", "passed"), [(12, False), (15, True)])
def test_accuracy_near_chance_fails_the_checks(correct, passed):
    # 64 images, 10 classes: 6.4 by chance, standard deviation 2.4
    is_clean = np.arange(64) < correct
    runs = SimpleNamespace(
        x=np.zeros(64), is_clean=is_clean, classifier=SimpleNamespace(classes=10)
    )
    assert (sanity_checks.better_than_chance(runs).status == "pass") == passed
