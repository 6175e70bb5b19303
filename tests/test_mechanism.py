"""Curvature is measured on the network it is kept with, and told with its robustness."""

import json
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from fabricated import result, training_record, write_training

from kaf_study import InputError, datasets, mechanism
from kaf_study.attacks.registry import AttackSettings
from kaf_study.config import TrainConfig
from kaf_study.curvature import curvatures
from kaf_study.figures import curvature_and_robustness
from kaf_study.mechanism import association, by_activation, conclusions, curvature_table, measure
from kaf_study.model_folder import TrainedModel, trained_models
from kaf_study.train import build_network

SETTINGS = {"dataset": "digits", "architecture": "light_cnn", "activation": "swish", "seed": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder whose network is not the one that its seed makes."""
    folder = tmp_path_factory.mktemp("models") / "net"
    record = training_record(**SETTINGS)
    _, (x, y), _ = datasets.load("digits")
    record["dataset"]["validation_fingerprint"] = datasets.fingerprint(x, y)
    write_training(folder, record)
    keras.utils.set_random_seed(0)
    network = build_network(TrainConfig(**record["settings"]))
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(0.5 * layer.gamma)
    network.save(folder / "model.keras")
    return folder


def test_what_is_kept_is_the_curvature_before_and_after_training(finished):
    model = TrainedModel.read(finished)
    assert model.curvature is None
    measure(model)
    _, (x, _), _ = datasets.load("digits")
    keras.utils.set_random_seed(SETTINGS["seed"])
    start = build_network(TrainConfig(**model.settings))
    for network, training, name in (
        (start, True, "before_training"),
        (keras.models.load_model(finished / "model.keras"), False, "after_training"),
    ):
        kappa = curvatures(network, x, training=training)
        expected = [np.median(of_one["kappa"]) for _, of_one in kappa.groupby("layer")]
        np.testing.assert_allclose(model.curvature[name], expected, rtol=1e-5)
    (row,) = curvature_table([model]).itertuples()
    assert row.after_training == np.median(model.curvature["after_training"])


def test_it_is_not_believed_of_other_weights_or_measured_on_other_images(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "net")
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"model_sha256": "other"}))
    model = TrainedModel.read(folder)
    assert model.curvature is None
    with pytest.raises(InputError, match="no network there"):
        curvature_table([model])
    record["dataset"]["validation_fingerprint"] = "other"
    (folder / "training.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="other images"):
        measure(TrainedModel.read(folder))
    (folder / "curvature.json").write_text('{"model_sha256": "ab", "n": 0}')
    with pytest.raises(InputError, match=r"curvature\.json' cannot be read"):
        _ = TrainedModel.read(folder).curvature


def network_of(folder, activation, seed, before, after, stand=None, **settings):
    """A network of three layers whose medians are given, attacked if `stand` (of 100) is."""
    write_training(folder, training_record(activation=activation, seed=seed, **settings))
    curvature = {
        "model_sha256": "ab",
        "dataset": {"name": "digits"},
        "n": 180,
        "before_training": [0.1, before, 9.0],
        "after_training": [9.0, after, 0.2],
    }
    (folder / "curvature.json").write_text(json.dumps(curvature))
    if stand is not None:
        counted = result(
            np.arange(100) < 80, np.arange(100) < stand, AttackSettings("rapid"),
            dataset="digits", model=folder.name,
        )  # fmt: skip
        counted.write(folder / "robustness")


ROWS = [  # activation, seed, before, after, of 100 images stand
    ("elu", 0, 0.5, 0.6, 30),
    ("swish", 0, 0.6, 0.7, 34),
    ("swish", 1, 0.8, 0.9, 36),
    ("kaf", 0, 2.4, 1.2, 42),
    ("kaf", 1, 2.0, 1.4, None),
    ("kaf_elu", 0, 0.5, 1.0, 37),
    ("kaf_relu", 0, 1.1, 1.1, 40),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for activation, seed, *rest in ROWS:
        network_of(folder / f"{activation}{seed}", activation, seed, *rest)
    return folder


def test_means_are_over_the_seeds_and_robustness_over_those_attacked(study):
    networks = curvature_table(trained_models(study))
    assert networks.attrs["attack"] == "rapid on 100 images"
    means = by_activation(networks)
    assert list(means.index) == ["elu", "swish", "kaf", "kaf_relu", "kaf_elu"]
    expected = {"seeds": 2, "before_training": 0.7, "after_training": 0.8, "robust": 0.35}
    for name, value in (expected | {"attacked": 2}).items():
        assert means.loc["swish", name] == pytest.approx(value)
    kaf = means.loc["kaf"]
    assert (kaf["seeds"], kaf["attacked"]) == (2, 1)
    assert kaf["robust"] == pytest.approx(0.42) and kaf["after_training"] == pytest.approx(1.3)
    errors = networks.set_index("folder")["robust_standard_error"]
    assert errors[str(study / "elu0")] == pytest.approx(np.sqrt(0.3 * 0.7 / 100))


def test_sentences_tell_the_figures(study):
    first, second = conclusions(curvature_table(trained_models(study)))
    assert "3 learned activations lie closer together" in first
    assert "from 1.00 to 1.30 (a factor of 1.3) where it was 0.50 to 2.20 (4.4)" in first
    # All five in one order: of 120 orders 2 are so far from none.
    assert "goes with robust accuracy: Spearman's rho +1.00 over 5 activations, p = 0.02" in second


def test_sentences_claim_nothing_of_too_few(study):
    two = [m for m in trained_models(study) if m.activation in ("elu", "kaf")]
    first, second = conclusions(curvature_table(two))
    assert "fewer than two" in first and "cannot tell" in second
    weak = curvature_table(trained_models(study))
    weak["robust"] = [0.30, 0.42, 0.42, 0.35, 0.36, 0.31, 0.40][: len(weak)]
    assert "is not shown to go with" in conclusions(weak)[1]


def test_association_counts_activations_and_says_nothing_of_three():
    frame = pd.DataFrame({"after_training": [1.0, 2, 3, 4], "robust": [0.4, 0.3, 0.2, np.nan]})
    assert association(frame) is None
    frame["robust"] = [0.4, 0.3, 0.1, 0.2]
    rho, p, count = association(frame)
    # 1 - 6 * 2 / (4 * 15) from the ranks' differences; 4 + 4 of the 24 orders are as far from 0
    assert (rho, p, count) == (pytest.approx(-0.8), pytest.approx(8 / 24), 4)


def test_networks_of_two_studies_are_refused(study, tmp_path):
    other = tmp_path / "vgg"
    network_of(other, "swish", 0, 0.5, 0.6, architecture="vgg")
    with pytest.raises(InputError, match="differ in architecture"):
        curvature_table(trained_models(study, other))


def test_command_writes_its_table_and_measures_nothing_twice(study, tmp_path, capsys):
    text = tmp_path / "text.md"
    text.write_text("a\n<!-- curvature -->\nstale\n<!-- /curvature -->\nb\n")
    assert mechanism.main([str(study), "--into", str(text)]) == 0
    said = capsys.readouterr().out
    assert "measuring" not in said and "1.00 to 1.30" in said
    written = text.read_text()
    assert "| Swish | fixed activation | 2 | 0.70 | 0.80 | 35.0 (2) |" in written
    assert "on 180 validation images" in written
    assert "stale" not in written and written.endswith("<!-- /curvature -->\nb\n")
    assert mechanism.main([str(tmp_path / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_figure_draws_each_network_and_each_attacked_one(study):
    figure = curvature_and_robustness(curvature_table(trained_models(study)))
    left, right = figure.axes
    drawn = sorted((line.get_xdata()[0], line.get_xdata()[1]) for line in left.lines[::3])
    assert drawn == sorted((before, after) for _, _, before, after, _ in ROWS)
    assert sorted(filter(None, (text.get_text() for text in right.texts))) == [
        "ELU", "KAF", "KAF_ELU", "KAF_ReLU", "Swish", "Swish",
    ]  # fmt: skip
