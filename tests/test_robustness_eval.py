"""The command: a saved model in, a table and result files out; what cannot be used, in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from fabricated import write_training

from kaf_study import command, datasets, sanity_checks
from kaf_study.records import read_results

ROOT = Path(__file__).resolve().parent.parent
SHAPE, CLASSES = (32, 32, 3), 10
REAL_LOAD = datasets.load_test
QUICK = ["--n", "24", "--steps", "3", "--restarts", "2"]


@pytest.fixture(autouse=True)
def toy_data(monkeypatch):
    """30 images that carry their class in one row, under the name of either data set."""
    y = np.arange(30) % CLASSES
    x = np.full((30, *SHAPE), 0.4, "float32")
    x[np.arange(30), y] += 0.1
    monkeypatch.setattr(datasets, "load_test", lambda name, data_dir=None: (x, y))


def linear(shape=SHAPE, classes=CLASSES, activation=None):
    """Sums up the rows: class i is row i. Standing at 8/255 or falling is set by the contrast."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [layers.Input(shape), layers.Flatten(), layers.Dense(classes, activation=activation)]
    )
    weights = np.zeros((np.prod(shape), classes), "float32")
    for row in range(min(classes, shape[0])):
        weights.reshape(*shape, classes)[row, :, :, row] = 0.1
    model.layers[-1].kernel.assign(weights)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    linear().save(path)
    return path


@pytest.fixture
def folder(tmp_path, saved):
    folder = tmp_path / "models" / "net"
    folder.mkdir(parents=True)
    shutil.copy(saved, folder)
    write_training(folder)
    return folder


def test_table_and_files(folder, capsys):
    assert command.main([str(folder), *QUICK, "--labels", "true", "predicted"]) == 0
    told, *lines = capsys.readouterr().out.splitlines()
    assert told.startswith("net: the 24 images that stand in ") and "not attacked again" in told
    assert lines[0].split() == ["model", "labels", "clean", "under", "attack", "protocol"]
    assert "PGD-3-2, eps 8/255, step 2/255, true labels, first 24 digits" in lines[1]
    rows = read_results(folder)
    assert list(rows["labels"]) == ["predicted", "true"]
    assert set(rows["clean_accuracy"]) == {1.0}
    # The contrast of 0.1 is above 2 * 8/255: everything stands, as the closed form says.
    assert rows["robust_accuracy"][1] == 1.0


def test_epsilon_is_in_255ths(folder, capsys):
    # Closed form: rows differ by 0.1, each side moves by epsilon: falls from 0.05 * 255 = 12.75.
    for eps, robust in (("12.5", 1.0), ("13", 0.0)):
        assert command.main([str(folder), *QUICK, "--eps", eps, "--step", eps]) == 0
        rows = read_results(folder).set_index("epsilon")
        assert rows.loc[float(eps) / 255, "robust_accuracy"] == robust


def test_more_images_than_there_are(folder, capsys):
    assert command.main([str(folder), "--steps", "1", "--restarts", "1"]) == 0
    assert "digits has 30 test images; all are attacked" in capsys.readouterr().out
    assert command.main([str(folder), "--steps", "1", "--restarts", "1", "--all"]) == 0
    assert "finished before" in capsys.readouterr().out


def test_foreign_models_write_beside_themselves_or_to_out(tmp_path, capsys):
    linear(activation="softmax").save(tmp_path / "foreign.keras")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as file:
        file.write(tmp_path / "foreign.keras", "inside.keras")
    both = [str(tmp_path / "foreign.keras"), str(tmp_path / "packed.zip")]
    assert command.main([*both, *QUICK, "--dataset", "digits"]) == 0
    assert "softmax removed" in capsys.readouterr().out
    for name in ("foreign", "packed"):
        assert len(list((tmp_path / "robustness" / name).glob("*.json"))) == 1
    assert command.main([*both, *QUICK, "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"foreign", "packed"}
    assert set(read_results(tmp_path / "out")["outputs"]) == {"softmax removed"}


def test_attacked_images_and_examples_are_kept_on_demand(folder, capsys):
    arguments = [str(folder), *QUICK, "--eps", "20", "--step", "20"]
    assert command.main(arguments) == 0
    (csv,) = (folder / "robustness").glob("*.csv")
    images, picture = csv.with_suffix(".npz"), csv.with_name(f"{csv.stem}-examples.png")
    assert not images.exists() and not picture.exists()
    assert command.main([*arguments, "--save-adversarial", "--save-examples", "2"]) == 0
    assert "attacked again" in capsys.readouterr().out
    with np.load(images) as kept:
        offset = kept["offset"]
    assert offset.shape == datasets.load_test("digits")[0][:24].shape
    assert 19 / 255 < np.abs(offset).max() <= 20 / 255 + 1e-6
    assert picture.read_bytes().startswith(b"\x89PNG")
    # With the images kept, the figure needs no attack.
    picture.unlink()
    assert command.main([*arguments, "--save-examples", "2"]) == 0
    assert "read from" in capsys.readouterr().out and picture.exists()
    # Images of an earlier result are not taken for those of a repeated one.
    assert command.main([*arguments, "--force"]) == 0 and not images.exists()


def test_check_prints_a_list_and_keeps_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sanity_checks, "ITERATIONS", (1, 10, 20))
    monkeypatch.setattr(sanity_checks, "NOISE_DRAWS", 10)
    arguments = ["--check", "--n", "16", "--steps", "10", "--eps", "16"]
    assert command.main([str(folder), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "=> no sign of masked gradients" in printed and "FAIL" not in printed
    stem = folder / "robustness" / "checks-10-5-true-digits-n16-eps16"
    kept = json.loads(stem.with_suffix(".json").read_text())
    assert kept["passed"] and kept["n"] == 16 and len(kept["checks"]) == 17
    assert kept["attack"]["steps"] == 10 and kept["attack"]["restarts"] == 5 and kept["seed"] == 0
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert read_results(folder).empty  # a check is no evaluation

    saturated = linear()
    saturated.layers[-1].kernel.assign(1e6 * saturated.layers[-1].kernel)
    saturated.save(tmp_path / "saturated.keras")
    transfer = ["--transfer-from", str(folder)]
    path = str(tmp_path / "saturated.keras")
    assert command.main([path, *arguments, *transfer, "--dataset", "digits"]) == 1
    printed = capsys.readouterr().out
    assert "NOT to be trusted: fails input gradients" in printed
    assert "transfer from net" in printed

    linear(shape=(28, 28, 1)).save(tmp_path / "small.keras")
    line = failing(capsys, path, *arguments, "--transfer-from", tmp_path / "small.keras")
    assert "--transfer-from 'small'" in line and "(None, 28, 28, 1)" in line


def failing(capsys, *arguments):
    """The one line the command ends with."""
    assert command.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("robustness_eval.py: error: ")
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--eps", "300"], "300/255"),
        (["--eps", "-1"], "epsilon"),
        (["--eps", "nan"], "epsilon"),
        (["--step", "-2"], "alpha"),
        (["--step", "0"], "alpha"),
        (["--steps", "0"], "steps"),
        (["--steps", "-1"], "steps"),
        (["--restarts", "0"], "restarts"),
        (["--restarts", str(10**12)], "restarts of pgd must be a whole number from 1 to 10000"),
        (["--steps", str(10**12)], "steps of pgd"),
        (["--n", str(10**12)], "--n must"),
        (["--batch-size", str(10**12)], "--batch-size must"),
        (["--seed", str(10**30)], "seed must"),
        (["--attack", "fgsm", "--seed", "1"], "fgsm draws nothing at random"),
        (["--data-dir", "there"], "--data-dir is for cifar10, not for digits"),
        (["--n", "0"], "--n"),
        (["--batch-size", "0"], "--batch-size"),
        (["--seed", "-1"], "seed"),
        (["--attack", "suite", "--steps", "5"], "chooses its own steps"),
        (["--attack", "square", "--step", "1"], "chooses its own alpha"),
        (["--attack", "apgd-t", "--restarts", "10"], "allow 9 restarts"),
        (["--attack", "suite", "--labels", "predicted"], "labels true"),
        (["--save-examples", "0"], "--save-examples"),
        (["--check", "--n", "0"], "--n"),
        (["--check", "--attack", "suite", "--force"], "--check does not use --attack, --force;"),
        (["--transfer-from", "other.keras"], "--transfer-from is for --check"),
    ],
)
def test_impossible_settings_end_in_one_line(folder, capsys, arguments, reason):
    assert reason in failing(capsys, folder, *arguments)
    assert not (folder / "robustness").exists()


@pytest.mark.parametrize(
    ("called", "name"),
    [("/bin/kaf-evaluate", "kaf-evaluate"), ("robustness_eval.py", "robustness_eval.py")],
)
def test_the_command_goes_by_the_name_it_was_called(called, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    assert command.main(["nowhere.keras"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{name}: error: ")


@pytest.mark.parametrize("installed", ["train", "evaluate"])
def test_without_the_packages_of_the_study_one_line_says_so(installed):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['tensorflow', 'msgspec']));"
        f"from kaf_study import console; sys.exit(console.{installed}())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "is not installed" in line and "'.[study]'" in line


def test_help_fits_a_terminal_group_by_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    groups = text.split("\n\n")
    assert [group.partition(":")[0] for group in groups[-3:]] == [
        "models and images",
        "attack",
        "results",
    ]
    assert max(len(group.splitlines()) for group in groups) <= 24
    assert all(name in groups[-2] for name in command.ATTACKS)


def test_a_wrong_option_ends_in_one_line(folder, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main([str(folder), "--attack", "nonsense"])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'nonsense'" in line and "--help" in line


def test_impossible_models_end_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "text.keras").write_text("not a model")
    linear(classes=3).save(tmp_path / "three.keras")
    linear(shape=(28, 28, 1)).save(tmp_path / "small.keras")
    broken = linear()
    broken.layers[-1].kernel.assign(broken.layers[-1].kernel * np.nan)
    broken.save(tmp_path / "nan.keras")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("../evil.keras", "x")
    for name, reason in {
        "text.keras": "not a Keras archive",
        "three.keras": "10 classes are expected",
        "small.keras": "inputs of shape (None, 28, 28, 1)",
        "nan.keras": "NaN",
        "evil.zip": "outside",
        "missing.keras": "does not exist",
    }.items():
        assert reason in failing(capsys, tmp_path / name, *QUICK)
    # A bad model among good ones shows before anything is attacked.
    assert "text.keras" in failing(capsys, folder, tmp_path / "text.keras", *QUICK)
    assert not (folder / "robustness").exists()
    assert not (tmp_path / "robustness").exists()


def test_out_that_cannot_be_written_ends_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in failing(capsys, folder, *QUICK, "--out", tmp_path / "file")


def test_results_that_would_mix_end_in_one_line(folder, tmp_path, capsys):
    assert "both write" in failing(capsys, folder, folder, *QUICK)
    assert command.main([str(folder), *QUICK]) == 0
    linear(activation="tanh").save(folder / "model.keras")
    assert "another evaluation" in failing(capsys, folder, *QUICK)


def test_missing_data_ends_in_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "load_test", REAL_LOAD)
    missing = tmp_path / "nowhere"
    message = failing(capsys, folder, *QUICK, "--dataset", "cifar10", "--data-dir", missing)
    assert "--data-dir" in message


# --- as a process of its own


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "robustness_eval.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_error_line_is_all_a_process_prints(tmp_path):
    (tmp_path / "text.keras").write_text("not a model")
    process = start(tmp_path / "text.keras")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("robustness_eval.py: error: ")
    assert "Traceback" not in err


def test_killed_attack_resumes(folder, tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle; the same command goes on, to the same CSV, and repeats nothing."""
    arguments = ["--n", "64", "--steps", "15", "--restarts", "90", "--eps", "2"]
    stem = "pgd-15-90-true-digits-n64-eps2"
    results = folder / "robustness"
    partial = results / f".{stem}.partial.npz"
    process = start(folder, *arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and restarts_done(partial) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in results.iterdir() if not p.name.startswith(".")] == []

    monkeypatch.setattr(datasets, "load_test", REAL_LOAD)
    assert command.main([str(folder), *arguments]) == 0
    assert "resumed" in capsys.readouterr().out
    assert not partial.exists()
    assert command.main([str(folder), *arguments, "--out", str(tmp_path / "whole")]) == 0
    whole = tmp_path / "whole" / "net" / f"{stem}.csv"
    assert (results / whole.name).read_bytes() == whole.read_bytes()
    calls = [
        json.loads(path.with_suffix(".json").read_text())["gradient_calls"]
        for path in (whole, results / whole.name)
    ]
    assert calls[0] == calls[1] > 0


def restarts_done(partial):
    if not partial.exists():
        return 0
    with np.load(partial) as kept:
        return int(kept["units_done"])
