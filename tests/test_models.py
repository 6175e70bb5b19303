"""The committed models: whole, loadable by Keras alone, and with the results that they have."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kaf_study import datasets
from kaf_study.evaluation import AttackSettings, evaluate
from kaf_study.files import file_sha256
from kaf_study.model_folder import ModelFolder, trained_models, with_training
from kaf_study.records import Evaluation, read_results
from kaf_study.saved_models import open_model

MODELS = Path(__file__).parents[1] / "models"
TRAINED = trained_models(MODELS)
REPRODUCED, RESTARTS = 6, 2  # images and restarts of which a stored result is repeated


@pytest.mark.parametrize("model", TRAINED, ids=lambda model: model.folder.name)
def test_a_model_is_the_one_its_record_is_about(model):
    folder = ModelFolder(model.folder)
    assert file_sha256(folder.model) == model.record["model_sha256"]
    assert len(model.history) == model.record["results"]["epochs_trained"]
    assert not folder.unfinished.exists()


def test_a_model_of_each_kind_loads_in_a_process_that_knows_only_keras_and_the_layers():
    """Seeds differ in their weights alone, which the records' checksums are of."""
    program = """
import sys, activationsf, keras, numpy as np
for path in sys.argv[1:]:
    logits = keras.models.load_model(path)(np.full((1, 32, 32, 3), 0.5, "float32"))
    assert logits.shape == (1, 10) and np.isfinite(logits).all(), path
"""
    kinds = {(model.settings["architecture"], model.activation): model for model in TRAINED}
    paths = [str(model.folder / "model.keras") for model in kinds.values()]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)


def test_the_activation_is_the_only_difference_between_the_resnets():
    """But for the seed: one recipe, one split; who departs from it is named in models/README.md."""
    cards = (MODELS / "README.md").read_text(encoding="utf-8")
    resnets = [m for m in TRAINED if m.settings["architecture"] == "resnet20"]
    first, *others = resnets
    for model in others:
        differing = {k for k, v in model.settings.items() if v != first.settings.get(k)}
        exceptional = {
            k for k in differing if f"{model.folder.name} was trained with {k}" not in cards
        }
        assert exceptional <= {"activation", "seed"}
        assert model.record["dataset"] == first.record["dataset"]
        assert model.record["results"]["catastrophic_overfitting_in_epoch"] is None
    runs = [(m.settings["activation"], m.settings["seed"]) for m in resnets]
    assert len(resnets) > 1 and len(set(runs)) == len(runs)


def test_every_result_is_whole_and_of_the_weights_that_are_there():
    """Reading recounts all figures from the rows (`kaf_study.records`)."""
    results = with_training(read_results(MODELS))
    there = [
        path
        for path in MODELS.rglob("robustness/*.json")
        if any(path.with_suffix(rows).exists() for rows in (".csv", ".csv.gz"))
    ]
    assert set(results["path"]) == set(map(str, there))
    assert all(training.folder in {m.folder for m in TRAINED} for training in results["training"])


def test_the_suite_is_never_above_pgd_alone():
    by_model = {}
    for result in map(Evaluation.read, read_results(MODELS)["path"]):
        if result.summary["labels"] == "true" and result.summary["attack"]["epsilon"] == 8 / 255:
            kind = result.summary["attack"]["name"]
            by_model.setdefault(result.summary["model"], {})[kind] = result
    both = [found for found in by_model.values() if {"pgd", "suite"} <= set(found)]
    assert both
    for found in both:
        n = min(len(result.images) for result in found.values())
        assert found["suite"].is_robust[:n].sum() <= found["pgd"].is_robust[:n].sum()


@pytest.mark.slow
@pytest.mark.parametrize("model", TRAINED, ids=lambda model: model.folder.name)
def test_a_stored_result_is_reproduced(model):
    path = model.folder / "robustness" / "pgd-50-10-true.json"
    if not path.exists():
        pytest.skip("not attacked by PGD-50-10")
    if not os.environ.get("CIFAR10_DIR"):
        pytest.skip("CIFAR10_DIR is not set")
    x, y = datasets.load_test("cifar10")
    stored = Evaluation.read(path)
    if (
        datasets.fingerprint(x[: len(stored.images)], y[: len(stored.images)])
        != (stored.summary["dataset"]["fingerprint"])
    ):
        pytest.skip("CIFAR10_DIR holds another copy than the one attacked")
    with open_model(model.folder) as opened:
        settings = AttackSettings(restarts=RESTARTS)
        again = evaluate(opened.model, x[:REPRODUCED], y[:REPRODUCED], settings).images
    first = stored.images[:REPRODUCED]
    # What fell in a later restart stood in these.
    stood = first["restart"].fillna(0) > RESTARTS
    first["adversarial_prediction"] = first["adversarial_prediction"].mask(stood, first["label"])
    for column in ("label", "clean_prediction", "adversarial_prediction"):
        np.testing.assert_array_equal(again[column], first[column])
    fell = again["restart"].notna()
    assert fell.any() and not fell.all()
