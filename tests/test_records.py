"""Records: complete or absent, read back as written, and refused in one line if they lie."""

import copy
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from fabricated import result, training_record, write_training
from scipy.stats import binomtest

from kaf_study import InputError, cards, compare, files, records, tables
from kaf_study.attacks.registry import AttackSettings
from kaf_study.files import locked, read_bytes, write_atomically
from kaf_study.model_folder import ModelFolder, trained_models
from kaf_study.records import (
    Evaluation,
    percent,
    read_history,
    read_results,
    read_training,
    results_table,
    standard_error,
)

N = 20
CLEAN = np.arange(N) < 16
STANDS = np.arange(N) % 4 > 0  # 12 of the 16


def write(folder, attack="pgd", labels="true", n=N, **changed):
    """A result in a model folder; returns the path of its .json."""
    stands = np.resize(STANDS, n)
    clean = np.resize(CLEAN, n)
    evaluation = result(clean, stands, AttackSettings(attack, labels=labels), **changed)
    return evaluation.write(folder / "robustness")


def refused(function, *arguments):
    """The one line in which something is refused."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def edited(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


# --- writing and reading


def test_standard_error_is_binomial():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == 0


def test_clean_and_robust_are_what_they_say(tmp_path):
    evaluation = Evaluation.read(write(tmp_path))
    np.testing.assert_array_equal(evaluation.is_clean, CLEAN)
    np.testing.assert_array_equal(evaluation.is_robust, CLEAN & STANDS)
    assert evaluation.summary["robust_accuracy"] == 12 / 20
    lucky = evaluation.images.assign(adversarial_prediction=0)  # wrong when clean, right after it
    assert not Evaluation(lucky, evaluation.summary).is_robust[~CLEAN].any()
    pushed = Evaluation.read(write(tmp_path, labels="predicted"))
    assert pushed.summary["accuracy_under_attack_predicted_labels"] == 13 / 20
    assert pushed.summary["pushed_onto_true_class_predicted_labels"] == 1
    with pytest.raises(InputError, match="no image is robust"):
        pushed.is_robust  # noqa: B018


@pytest.mark.parametrize(("n", "suffix"), [(20, ".csv"), (1001, ".csv.gz")])
def test_a_result_is_read_back_as_written(n, suffix, tmp_path):
    path = write(tmp_path, n=n)
    evaluation = Evaluation.read(path)
    rows = path.with_suffix(suffix)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, rows.name])
    text = gzip.decompress(rows.read_bytes()) if suffix == ".csv.gz" else rows.read_bytes()
    lines = text.decode().splitlines()
    assert lines[1:3] == ["0,0,0,1,1,0,0.031372549", "1,0,0,0,,,0.031372549"]
    if suffix == ".csv.gz":
        assert rows.read_bytes()[4:8] == bytes(4)  # no time: the same rows are the same bytes
    again = Evaluation.read(path)
    assert again.summary == evaluation.summary and len(again.images) == n
    pd.testing.assert_frame_equal(again.images, evaluation.images)


def test_results_of_many_models_become_rows(tmp_path):
    write(write_training(tmp_path / "models" / "a"), model="a")
    write(tmp_path / "models" / "a", labels="predicted", model="a")
    result(CLEAN, STANDS, model="b").write(tmp_path / "out" / "b")
    (tmp_path / "out" / "foreign.json").write_text('{"format": "other"}')
    rows = read_results(tmp_path / "models" / "a", tmp_path / "out")
    assert list(rows["model"]) == ["a", "a", "b"]
    assert list(rows["labels"]) == ["predicted", "true", "true"]
    assert np.isnan(rows["robust_accuracy"][0])  # the predicted figure cannot pass for it
    assert rows["accuracy_under_attack_predicted_labels"][0] == 0.65
    assert rows["folder"][0] == str(tmp_path / "models" / "a")
    assert len(read_results(tmp_path / "none")) == 0


def test_table_stars_predicted_labels(tmp_path):
    summaries = [Evaluation.read(write(tmp_path, labels=k)).summary for k in ("true", "predicted")]
    lines = results_table(summaries).splitlines()
    assert " 60.0 +- 11.0 % " in lines[1]
    assert " 65.0 +- 10.7 %*" in lines[2]
    assert "not a robust accuracy" in lines[-1]
    assert lines[-2] == "+- is one binomial standard error."


def test_of_none_and_of_all_images_a_bound_is_told(tmp_path):
    """Not "0.0 ± 0.0": of 500 images none fell says that less than 0.6 % do, at 95 %."""
    assert percent(0.6, 20) == "60.0 ± 11.0"
    assert (percent(0.0, 500), percent(1.0, 500)) == ("< 0.6", "> 99.4")
    for n in (1, 20, 500, 10_000):
        at_most = binomtest(0, n).proportion_ci(0.9, method="exact").high  # each side: 95 %
        told = float(percent(0.0, n).removeprefix("< "))
        assert told > 0 and told == pytest.approx(100 * at_most, abs=0.05 if n < 1000 else 0.005)
        assert float(percent(1.0, n).removeprefix("> ")) == pytest.approx(100 - told)
    summary = Evaluation.read(write(tmp_path)).summary
    lines = results_table([summary | {"robust_accuracy": 0.0}]).splitlines()
    assert " 80.0 +- 8.9 % " in lines[1] and " < 13.9 %" in lines[1]
    assert "< and >: of none or of all images, the bound at 95 %" in lines[-1]


# --- records that lie


def lie(path, kind):
    """Falsifies a result in one of the ways that were once believed."""
    rows_path = path.with_suffix(".csv")
    rows = pd.read_csv(rows_path, dtype={"restart": "Int64", "iteration": "Int64"})
    if kind == "figure edited":
        edited(path, robust_accuracy=0.99)
    elif kind == "error edited":
        edited(path, robust_standard_error=0.001)
    elif kind == "figure of the other protocol":
        edited(path, accuracy_under_attack_predicted_labels=0.99)
    elif kind == "predictions set to the labels":
        rows["adversarial_prediction"] = rows["label"]
    elif kind == "predictions and restarts emptied":
        rows["adversarial_prediction"] = rows["label"].where(CLEAN, rows["clean_prediction"])
        rows[["restart", "iteration"]] = pd.NA
    elif kind == "rows reversed":
        rows = rows[::-1]
    elif kind == "labels emptied":
        rows["label"] = pd.NA
    elif kind == "one row repeated":
        rows = rows.iloc[[1] * N]
    elif kind == "a row left out":
        rows = rows[:-1]
    elif kind == "no such class":
        rows.loc[1, ["label", "clean_prediction", "adversarial_prediction"]] = 10
    elif kind == "half a class":
        rows["label"] = rows["label"].astype(float).where(rows["index"] != 1, 0.5)
    elif kind == "too far":
        rows.loc[3, "linf"] = 8 / 255 + 2e-6
    elif kind == "a restart too many":
        rows.loc[0, "restart"] = 11
    elif kind == "an iteration too many":
        rows.loc[0, "iteration"] = 51
    elif kind == "fell, it is not said when":
        rows.loc[0, "iteration"] = pd.NA
    elif kind == "stands, it is said when it fell":
        rows.loc[1, "restart"] = 1
    elif kind == "wrong image attacked":
        rows.loc[19, "adversarial_prediction"] = 2
    rows.to_csv(rows_path, index=False)


LIES = {
    "figure edited": "robust_accuracy is 0.99, the rows give 0.6",
    "error edited": "robust_standard_error",
    "figure of the other protocol": "accuracy_under_attack_predicted_labels is 0.99",
    "predictions set to the labels": "restart is not given",
    "predictions and restarts emptied": "robust_accuracy is 0.6, the rows give 0.8",
    "rows reversed": "index does not count",
    "labels emptied": "label is not a whole number",
    "one row repeated": "index does not count",
    "a row left out": "19 rows where",
    "no such class": "label is not a class",
    "half a class": "label is not a whole number",
    "too far": "linf does not lie in",
    "a restart too many": "restart lies outside 1 to 10",
    "an iteration too many": "iteration lies outside 0 to 50",
    "fell, it is not said when": "iteration is not given",
    "stands, it is said when it fell": "restart is not given",
    "wrong image attacked": "was not attacked",
}


@pytest.mark.parametrize("kind", LIES)
def test_a_falsified_result_is_refused_by_file_and_figure(kind, tmp_path):
    path = write(write_training(tmp_path / "net"))
    lie(path, kind)
    for reader, place in ((Evaluation.read, path), (read_results, tmp_path)):
        said = refused(reader, place)
        assert LIES[kind] in said and path.stem in said


@pytest.mark.parametrize("kind", ["figure edited", "rows reversed", "one row repeated"])
def test_compare_says_so_in_one_line(kind, tmp_path, capsys):
    for name in ("a", "b"):
        path = write(write_training(tmp_path / name), model=name)
    lie(path, kind)
    assert compare.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and LIES[kind] in error


def test_members_of_a_suite_are_recounted(tmp_path):
    path = write(tmp_path, attack="suite")
    summary = json.loads(path.read_text())
    assert Evaluation.read(path).summary == summary
    for change, said in (
        ({"fell": 3}, "fell of apgd-ce is 3, the rows give 4"),
        ({"attacked": 20}, "attacked of apgd-ce is 20, the rows give 16"),
        ({"name": "cw"}, "felled_by does not name a member"),
        ({"restarts": 0}, "restarts"),
    ):
        attack = copy.deepcopy(summary["attack"])
        attack["members"][0] |= change
        edited(path, attack=attack)
        assert said in refused(Evaluation.read, path)


@pytest.mark.parametrize(("attack", "last"), [("apgd-t", 100), ("fab-t", 103), ("margin-t", 113)])
def test_an_attack_may_find_something_in_its_points_after_its_steps(attack, last, tmp_path):
    path = write(tmp_path, attack=attack)
    rows = pd.read_csv(path.with_suffix(".csv"), dtype={"restart": "Int64", "iteration": "Int64"})
    for iteration, is_read in ((last, True), (last + 1, False)):
        rows.loc[0, "iteration"] = iteration
        rows.to_csv(path.with_suffix(".csv"), index=False)
        assert one_line_or_read(Evaluation.read, path) == is_read


def test_rows_of_two_kinds_are_one_too_many(tmp_path):
    path = write(tmp_path)
    path.with_suffix(".csv.gz").write_bytes(b"")
    assert "rows twice" in refused(Evaluation.read, path)


def test_a_longer_result_leaves_no_rows_of_a_shorter_one(tmp_path):
    short = result(CLEAN, STANDS)
    path = short.write(tmp_path)
    long = result(*(np.resize(a, 1001) for a in (CLEAN, STANDS)), name=short.stem)
    long.write(tmp_path)
    assert len(Evaluation.read(path).images) == 1001
    short.write(tmp_path)
    assert len(Evaluation.read(path).images) == N


# --- files of any content

REPLACEMENTS = {"null": None, "list": [], "text": "x", "number": -1.5, "dict": {}}


def mutations(content, path=()):
    """All ways to leave out one entry of nested dicts, or to give it another type; lazily."""
    for key, value in content.items():
        place = (*path, key)
        yield f"{'.'.join(place)} missing", without(key)
        for name, replacement in REPLACEMENTS.items():
            yield f"{'.'.join(place)} {name}", with_value(key, replacement)
        if isinstance(value, dict):
            for name, change in mutations(value, place):
                yield name, inside(key, change)


def without(key):
    return lambda content: {k: v for k, v in content.items() if k != key}


def with_value(key, value):
    return lambda content: content | {key: value}


def inside(key, change):
    return lambda content: content | {key: change(content[key])}


def truncations(content):
    return [content[: int(len(content) * share)] for share in (0, 0.01, 0.3, 0.7, 0.99)]


def one_line_or_read(function, *arguments):
    """Whether it is read; if not, it is refused in one line, and nothing else happens."""
    try:
        function(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_whatever_training_json_holds_is_read_or_refused_in_one_line(tmp_path):
    record = training_record() | {
        "versions": {"python": "3"},
        "processes": [{"first_epoch": 0, "versions": {}, "hardware": "x"}],
    }
    folder = write_training(tmp_path / "net", record)
    path, read = folder / "training.json", set()

    write(folder)
    results = read_results(folder)

    def use(folder):
        trained_models(folder)
        tables.model_table(results)
        cards.model_cards(results, folder, into="cards.md")

    use(folder)
    for name, change in mutations(record):
        path.write_text(json.dumps(change(record)))
        if one_line_or_read(use, folder):
            read.add(name)
    may_miss = {"dataset", "model_sha256", "versions", "processes", "settings.epsilon"}
    may_miss |= {"results.probe_n", "dataset.train_n", "versions.python"}
    texts = {"settings.dataset", "settings.architecture", "settings.activation", "dataset.name"}
    texts |= {"versions.python"}  # another model_sha256 is seen by the results made with it
    allowed = {f"{name} missing" for name in may_miss} | {f"{name} text" for name in texts}
    assert read == allowed | {"processes list", "versions dict", "settings.epsilon number"}
    later = record | {"settings": record["settings"] | {"unheard_of": 1}}
    for content in (
        *truncations(json.dumps(record)),
        json.dumps(later),
        "[]",
        "null",
        '"x"',
        "[" * 10**5,
        "\xff",
    ):
        path.write_text(content)
        assert not one_line_or_read(read_training, path)
        assert not one_line_or_read(trained_models, tmp_path)


@pytest.mark.parametrize(
    ("lost", "new", "told"),
    [
        ("seed", "sead", "lack seed, and name sead that"),
        ("seed", None, "lack seed, and name nothing that"),
        (None, "sead", "lack nothing, and name sead that"),
    ],
)
def test_settings_that_are_missing_or_unknown_are_named(lost, new, told, tmp_path):
    record = training_record()
    record["settings"] = {k: v for k, v in record["settings"].items() if k != lost}
    record["settings"] |= {new: 1} if new else {}
    with pytest.raises(InputError, match=told):
        read_training(write_training(tmp_path / "m", record) / "training.json")


def test_what_a_record_may_lack_has_its_default_where_it_is_read(tmp_path):
    folder = write_training(tmp_path / "net")
    results = read_training(folder / "training.json")["results"]
    assert results["catastrophic_overfitting_in_epoch"] is None and results["probe_n"] == 512
    assert "validation_pgd" not in results  # has none
    path = write(folder)
    content = json.loads(path.read_text())
    del content["model"], content["model_sha256"]
    path.write_text(json.dumps(content))
    summary = Evaluation.read(path).summary
    assert summary["model"] is None and summary["model_sha256"] is None
    assert "60.0 +- 11.0 %" in results_table([summary])


def test_no_training_took_less_than_no_time(tmp_path):
    record = training_record() | {"seconds": -0.5}
    with pytest.raises(InputError, match="seconds"):
        read_training(write_training(tmp_path / "m", record) / "training.json")


def test_whatever_a_result_holds_is_read_or_refused_in_one_line(tmp_path):
    path = write(tmp_path, attack="suite")
    text, rows = path.read_text(), path.with_suffix(".csv").read_text()
    summary = json.loads(text)
    can_change = {"name", "protocol", "outputs", "model", "model_sha256", "dataset.name"}
    can_change |= {"dataset.fingerprint", "attack.name"}  # texts that nothing here contradicts
    can_miss = {"outputs", "model", "model_sha256", "attack.alpha", "attack.steps"}
    can_miss |= {"attack.restarts"}
    can_be_null = {"model", "model_sha256", "dataset.name", "attack.alpha", "attack.steps"}
    can_be_null |= {"attack.restarts"}
    allowed = {f"{n} text" for n in can_change} | {f"{n} missing" for n in can_miss}
    allowed |= {f"{n} null" for n in can_be_null}
    for name, change in mutations(summary):
        path.write_text(json.dumps(change(summary)))
        assert not one_line_or_read(Evaluation.read, path) or name in allowed, name
        one_line_or_read(read_results, tmp_path)
    path.write_text(text)
    for content in truncations(text):
        path.write_text(content)
        assert not one_line_or_read(Evaluation.read, path)
        assert not one_line_or_read(read_results, tmp_path)
    path.write_text(text)
    for content in (*truncations(rows), "\x00" * 9, "a,b\n1\n1,2,3\n", '"\n'):
        path.with_suffix(".csv").write_text(content)
        assert not one_line_or_read(Evaluation.read, path)
    path.with_suffix(".csv").unlink()
    assert not one_line_or_read(Evaluation.read, path)


def test_whatever_a_column_of_rows_holds_is_refused_in_one_line(tmp_path):
    path = write(tmp_path, attack="suite")
    rows = path.with_suffix(".csv")
    table = pd.read_csv(rows, dtype=str, keep_default_na=False)
    for column in table:
        for value in ("", "x", "-1", "1.5", "1e99", "inf", "True", "99999999999999999999"):
            changed = table.copy()
            changed.loc[0, column] = value
            changed.to_csv(rows, index=False)
            assert not one_line_or_read(Evaluation.read, path), (column, value)
        table.drop(columns=column).to_csv(rows, index=False)
        assert not one_line_or_read(Evaluation.read, path), column


def test_packed_rows_that_are_cut_off_or_endless_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path, n=1001)
    rows = path.with_suffix(".csv.gz")
    content = rows.read_bytes()
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 10**6)
    bomb = gzip.compress(bytes(10**6) + b"\n")
    for wrong in (*truncations(content), content[:-4] + b"xxxx", bomb):
        rows.write_bytes(wrong)
        assert not one_line_or_read(Evaluation.read, path)


def test_whatever_a_history_holds_is_refused_in_one_line(tmp_path):
    folder = write_training(tmp_path / "net")
    path = folder / "history.csv"
    text = path.read_text()
    assert len(read_history(path, 3)) == 3
    table = pd.read_csv(path, dtype=str)
    for column in table:
        for value in ("", "x", "inf", "True"):
            changed = table.copy()
            changed.loc[0, column] = value
            changed.to_csv(path, index=False)
            assert not one_line_or_read(read_history, path), (column, value)
        table.drop(columns=column).to_csv(path, index=False)
        assert not one_line_or_read(read_history, path), column
    for content in (*truncations(text), "loss\n1\n", text[: text.rindex("2,")]):
        path.write_text(content)
        (model,) = trained_models(folder)
        assert not one_line_or_read(lambda: model.history)  # noqa: B023


def test_what_is_no_regular_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(bytes(11))
    assert "no regular file" in refused(read_bytes, tmp_path / "zero")
    assert "no regular file" in refused(read_bytes, tmp_path)
    assert "does not exist" in refused(read_bytes, tmp_path / "none")
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 10)
    assert "at most 10" in refused(read_bytes, tmp_path / "large")


# --- writing whole, locks


def test_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    assert "cannot write" in refused(write_atomically, tmp_path / "taken", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_what_a_killed_write_left_is_gone_after_the_next(tmp_path):
    program = """
import os, sys
from pathlib import Path
from kaf_study.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "r.json"
    path.write_bytes(b"before")
    subprocess.run([sys.executable, "-c", program, path])
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2
    path.write_bytes(b"{}")
    assert read_results(tmp_path).empty  # what is half written is not looked at
    write_atomically(path, b"after")
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_a_lock_says_who_holds_it_and_goes_with_its_process(tmp_path):
    path = tmp_path / "models" / "net" / ".training.lock"
    program = """
import sys
from pathlib import Path
from kaf_study.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        for _ in range(2):  # whoever was refused has not changed what it says
            said = refused(locked(path).__enter__)
            assert f"in use by process {holder.pid} since 20" in said
    finally:
        holder.kill()
        holder.communicate()
    assert path.exists()  # stale
    with locked(path):
        assert str(os.getpid()) in path.read_text()
    assert list(path.parent.iterdir()) == []


def test_a_lock_leaves_no_folder_that_it_made(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "models" / "net" / ".lock"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_training_anew_waits_for_no_evaluation(tmp_path):
    folder = ModelFolder(write_training(tmp_path))
    path = write(tmp_path)
    with locked(folder.robustness / f".{path.stem}.lock"):
        assert "in use by process" in refused(lambda: folder.start(None, force=True))
    assert path.exists()
