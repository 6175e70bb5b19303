"""Result files: complete or absent, and read back as they were written."""

import json

import numpy as np
import pandas as pd
import pytest

from kaf_study import InputError
from kaf_study.records import (
    FORMAT,
    Evaluation,
    read_results,
    results_table,
    standard_error,
    write_atomically,
)


def result(model="net", labels="true", **changed):
    images = pd.DataFrame(
        {
            "index": [0, 1],
            "label": [3, 4],
            "clean_prediction": [3, 4],
            "adversarial_prediction": [3, 5],
            "restart": pd.array([None, 1], dtype="Int64"),
            "iteration": pd.array([None, 0], dtype="Int64"),
            "linf": np.float32([0.03, 0.01]),
        }
    )
    figures = {"robust_accuracy": 0.5, "robust_standard_error": 0.35}
    if labels == "predicted":
        figures = {
            "accuracy_under_attack_predicted_labels": 0.75,
            "standard_error_predicted_labels": 0.3,
            "pushed_onto_true_class_predicted_labels": 1,
        }
    summary = {
        "format": FORMAT,
        "name": f"pgd-50-10-{labels}-n2",
        "model": model,
        "protocol": f"PGD-50-10, {labels} labels",
        "labels": labels,
        "attack": {"name": "pgd", "epsilon": 0.1, "alpha": 0.1, "steps": 50, "restarts": 10},
        "dataset": {"name": "digits", "fingerprint": "ab"},
        "n": 2,
        "clean_accuracy": 1.0,
        "clean_standard_error": 0.0,
        "seed": 0,
    }
    return Evaluation(images, summary | figures | changed)


def test_standard_error_is_binomial():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == 0


def test_result_is_read_back_as_written(tmp_path):
    written = result()
    path = written.write(tmp_path / "deep" / "robustness")
    read = Evaluation.read(path)
    assert read.summary == written.summary
    pd.testing.assert_frame_equal(read.images, written.images, check_dtype=False)
    assert path.with_suffix(".csv").read_text().splitlines()[1:] == [
        "0,3,3,3,,,0.0299999993",
        "1,4,4,5,1,0,0.00999999978",
    ]
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".csv", ".json"]


def test_results_of_many_models_become_rows(tmp_path):
    result("a").write(tmp_path / "models" / "a" / "robustness")
    result("a", "predicted").write(tmp_path / "models" / "a" / "robustness")
    result("b").write(tmp_path / "out" / "b")
    (tmp_path / "models" / "a" / "training.json").write_text('{"dataset": "digits"}')
    (tmp_path / "models" / "a" / "broken.json").write_text("{")
    rows = read_results(tmp_path / "models" / "a", tmp_path / "out")
    assert list(rows["model"]) == ["a", "a", "b"]
    assert list(rows["labels"]) == ["predicted", "true", "true"]
    assert np.isnan(rows["robust_accuracy"][0])  # the predicted figure cannot pass for it
    assert rows["accuracy_under_attack_predicted_labels"][0] == 0.75
    assert rows["folder"][0] == str(tmp_path / "models" / "a")
    assert len(read_results(tmp_path / "none")) == 0


def test_table_stars_predicted_labels():
    table = results_table([result().summary, result(labels="predicted").summary])
    lines = table.splitlines()
    assert " 50.0 +- 35.0 % " in lines[1]
    assert " 75.0 +- 30.0 %*" in lines[2]
    assert "not a robust accuracy" in lines[-1]


def test_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "taken", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": "other"})])
def test_foreign_file_is_not_read_as_a_result(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    (tmp_path / "r.csv").write_text("index\n0\n")
    with pytest.raises(InputError):
        Evaluation.read(tmp_path / "r.json")
