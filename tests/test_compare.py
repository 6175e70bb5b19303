"""Comparisons count pairs, mix no protocols, and say the same in every form."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from fabricated import result, training_record, write_training

from kaf_study import InputError, compare
from kaf_study.attacks.registry import LABELS, AttackSettings
from kaf_study.cards import (
    conclusion,
    markdown_table,
    model_cards,
    notes,
    points,
    shown,
    shown_pairs,
    shown_rapid,
)
from kaf_study.model_folder import COPIES
from kaf_study.records import read_results
from kaf_study.tables import (
    against,
    below_pgd,
    label_protocols,
    model_table,
    paired_tests,
    rapid_beside_stronger,
    read_outcomes,
)

N = 100


def add_model(root, activation, *, sha="ab", architecture="resnet20"):
    settings = {"dataset": "cifar10", "architecture": architecture, "activation": activation}
    record = training_record(**settings) | {"model_sha256": sha}
    return write_training(root / f"net_{activation}", record)


def add_result(folder, stands, *, correct=90, attack="pgd", labels="true", **other):
    """A result in which the images `stands` keep what was predicted for them, and the first
    `correct` are right when clean."""
    n = other.get("n", N)
    settings = AttackSettings(
        attack,
        epsilon=other.get("epsilon", 8 / 255),
        steps=other.get("steps"),
        labels=labels,
    )
    changed = {"model_sha256": other.get("sha", "ab")}
    if "fingerprint" in other:
        changed["fingerprint"] = other["fingerprint"]
    numbers = np.arange(n)
    result(
        numbers < correct, np.isin(numbers, stands), settings, model=folder.name, **changed
    ).write(folder / "robustness")


@pytest.fixture
def models(tmp_path):
    """ReLU stands on images 0..39, Swish on 10..59, KAF on 0..41: 10, 20; 10, 18 alone."""
    root = tmp_path / "models"
    for activation, stands in (("kaf", range(42)), ("swish", range(10, 60)), ("relu", range(40))):
        folder = add_model(root, activation)
        add_result(folder, stands)
        add_result(folder, stands, labels="predicted")
    yield root
    plt.close("all")


def pairs_of(root):
    """{(model, reference)} of all paired tests of the results below a folder."""
    tests = paired_tests(model_table(read_results(root)))
    return {pair for test in tests for pair in zip(test["model"], test["reference"], strict=True)}


def test_references_are_those_of_the_published_claims(models):
    assert pairs_of(models) == {
        ("net_relu", "net_swish"),
        ("net_kaf", "net_swish"),
        ("net_swish", "net_relu"),
        ("net_kaf", "net_relu"),
    }
    shutil.rmtree(models / "net_swish")
    assert pairs_of(models) == {("net_kaf", "net_relu")}
    add_result(add_model(models, "elu"), range(20))
    shutil.rmtree(models / "net_relu")
    assert pairs_of(models) == {("net_kaf", "net_elu")}


def test_models_of_another_architecture_are_tested_among_themselves(models):
    """The ReLU of a light CNN is no reference for a ResNet20, and adds no comparison to Holm's."""
    before = pairs_of(models)
    for activation in ("relu", "kaf"):
        folder = add_model(models / "light", activation, architecture="light_cnn")
        folder = folder.rename(folder.with_name(f"light_{activation}"))
        add_result(folder, range(5))
    assert pairs_of(models) == before | {("light_kaf", "light_relu")}
    table = model_table(read_results(models))
    (kaf,) = paired_tests(table, ["light_kaf"])  # asked for by name: with all others
    assert len(kaf) == 4


def test_a_reference_without_pgd_is_no_reference(models):
    shutil.rmtree(models / "net_swish" / "robustness")
    add_result(models / "net_swish", range(10), attack="suite")
    assert pairs_of(models) == {("net_kaf", "net_relu")}


def test_results_of_other_radii_and_steps_are_not_put_beside(models):
    """The suite and the predicted labels are of PGD's radius, whatever most models have."""
    for activation in ("relu", "swish", "kaf"):
        add_result(models / f"net_{activation}", range(80), attack="suite", epsilon=2 / 255)
        add_result(models / f"net_{activation}", range(70), labels="predicted", steps=7)
    add_result(models / "net_relu", range(30), attack="suite")
    table = model_table(read_results(models)).set_index("activation")
    assert table.loc["relu", "suite"] == 0.3 and table.loc[["swish", "kaf"], "suite"].isna().all()
    assert table.loc["relu", "pgd_predicted"] == pytest.approx(0.5)


def test_clean_accuracy_is_of_one_number_of_images(models):
    shutil.rmtree(models / "net_kaf" / "robustness")
    add_result(models / "net_kaf", range(10), attack="suite", n=50)
    table = model_table(read_results(models)).set_index("activation")
    assert np.isnan(table.loc["kaf", "clean_accuracy"]) and table.loc["kaf", "suite"] == 0.2
    assert table.loc["relu", "clean_accuracy"] == 0.9
    # Of the attack that most networks have, then of the one of more images
    for activation in ("kaf", "relu", "swish"):
        add_result(models / f"net_{activation}", range(10), attack="rapid", correct=99, n=200)
    table = model_table(read_results(models)).set_index("activation")
    assert table.attrs["clean_kind"] == "rapid"
    assert (table["clean_accuracy"] == 99 / 200).all()
    assert shown(table.reset_index())["clean"] == ["49.5 ± 3.5"] * 3
    shutil.rmtree(models / "net_kaf" / "robustness")
    add_result(models / "net_kaf", range(10))
    assert model_table(read_results(models)).attrs["clean_kind"] == "pgd_true"


def test_published_figures_stand_beside_their_data_set_only(models):
    record = json.loads((models / "net_kaf" / "training.json").read_text())
    record["settings"]["dataset"] = "digits"
    (models / "net_kaf" / "training.json").write_text(json.dumps(record))
    table = model_table(read_results(models)).set_index("activation")
    assert np.isnan(table.loc["kaf", "published_accuracy"])
    assert table.loc["relu", "published_accuracy"] == 0.7752


def test_two_results_of_one_name_are_refused(models, capsys):
    robustness = models / "net_kaf" / "robustness"
    for kind in ("json", "csv"):
        shutil.copy(robustness / f"pgd-50-10-true-n100.{kind}", robustness / f"copy.{kind}")
    assert compare.main([str(models)]) == 2
    assert "copy.json" in capsys.readouterr().err
    for kind in ("json", "csv"):
        (robustness / f"copy.{kind}").unlink()
    shutil.copytree(models / "net_kaf", models / "again" / "net_kaf")
    assert compare.main([str(models)]) == 2
    error = capsys.readouterr().err
    assert "both claim to be 'net_kaf'" in error and error.count("\n") == 1


def test_a_file_given_twice_counts_once(models, monkeypatch):
    monkeypatch.chdir(models)
    assert len(read_results(".", models, models / "net_kaf")) == len(read_results(models))


@pytest.mark.parametrize(
    ("attack", "name"),
    [("suite", "the suite"), ("rapid", "rapid"), ("autoattack", "AutoAttack")],
)
def test_several_attacks_together_are_tested_on_their_own_results(models, capsys, attack, name):
    """ReLU stands alone on 5 images, Swish on 10; under PGD on 10 and 20."""
    assert compare.main([str(models), "--attack", attack]) == 2
    error = capsys.readouterr().err
    assert f"--attack {attack} needs results of two models" in error and error.count("\n") == 1
    add_result(models / "net_relu", range(20), attack=attack)
    add_result(models / "net_swish", range(5, 30), attack=attack)
    assert compare.main([str(models), "--attack", attack]) == 0
    text = capsys.readouterr().out
    assert "5 / 10" in text and "10 / 20" not in text and f"with net_swish, under {name}:" in text
    assert compare.main([str(models)]) == 0
    text = capsys.readouterr().out
    assert "10 / 20" in text and "with net_swish, under PGD-50-10" in text


def test_a_difference_of_nothing_has_no_minus_sign():
    pairs = pd.DataFrame(
        {"model": ["a"], "reference": "c", "only_model": 4, "only_reference": 4}
        | dict.fromkeys(("robust_difference", "clean_difference", "high"), -0.0004)
        | {"low": -0.02, "p_holm": 1.0, "clean_p_holm": 1.0}
    )
    cells = shown_pairs(pairs)
    assert cells["robust, points"] == cells["clean, points"] == ["+0.0"]
    assert cells["95 %"] == ["-2.0 to +0.0"]
    assert (points(-0.0004, ""), points(0.058), points(float("nan"))) == ("0.0", "+5.8", "–")


def test_conclusion_names_what_is_told_apart(models):
    far = add_model(models, "elu")
    add_result(far, [])
    text = conclusion(against("net_swish", model_table(read_results(models))))
    assert "3 comparisons with net_swish, under PGD-50-10: less robust: net_elu;" in text
    assert "not told apart: net_relu, net_kaf. On the clean images: not told apart:" in text
    assert "100 images" in text


def test_told_apart_is_below_5_percent():
    pairs = pd.DataFrame(
        {"model": ["a", "b"], "reference": "c", "attack": "suite", "n": 500}
        | {"robust_difference": [0.1, -0.1], "p_holm": [0.049, 0.051]}
        | {"clean_difference": [0.1, -0.1], "clean_p_holm": [0.051, 0.049]}
    )
    text = conclusion(pairs)
    assert "test at 5 %" in text and "under the suite: more robust: a; not told apart: b." in text
    assert "On the clean images: less accurate: b; not told apart: a." in text


def test_table_has_all_protocols_in_one_row_in_order_of_activations(models):
    add_result(models / "net_swish", range(10, 50), attack="suite")
    table = model_table(read_results(models))
    assert list(table["activation"]) == ["relu", "swish", "kaf"]
    lines = markdown_table(table).splitlines()
    assert lines[0] == (
        "| model | clean | PGD-50-10, true labels | PGD-50-10, predicted labels* | suite | "
        "published clean | published robust* | epochs | parameters |"
    )
    assert lines[3] == (
        "| net_swish | 90.0 ± 3.0 | 50.0 ± 5.0 | 60.0 ± 4.9 | 40.0 ± 4.9 | 78.68 | 53.88 | "
        "3 | 294,922 |"
    )
    assert "| – |" in lines[2]  # no suite for relu


def test_rapid_and_autoattack_stand_beside_the_suite_each_under_its_name(models):
    """A model may have one of them alone; they are never one column."""
    for attack, stood in (("suite", 40), ("rapid", 39), ("autoattack", 38)):
        add_result(models / "net_swish", range(stood), attack=attack)
    shutil.rmtree(models / "net_kaf" / "robustness")
    add_result(models / "net_kaf", range(30), attack="autoattack")
    table = model_table(read_results(models))
    lines = markdown_table(table).splitlines()
    assert "| suite | rapid | AutoAttack |" in lines[0]
    assert "| 40.0 ± 4.9 | 39.0 ± 4.9 | 38.0 ± 4.9 |" in lines[3]
    assert "| – | – | 30.0 ± 4.6 |" in lines[4]
    assert any(line.startswith("Rapid: ") and "not AutoAttack" in line for line in lines)
    cards = model_cards(read_results(models), models, into="cards.md")
    assert "| pgd_acc | suite_acc | rapid_acc | autoattack_acc |" in cards
    assert "| 40.0 | 39.0 | 38.0 |" in cards
    assert "pgd_acc, suite_acc and rapid_acc: robust accuracy, true labels; not Auto" in cards


def test_what_predicted_labels_add_is_taken_apart(models):
    """Of 90 right and 10 wrong images 30 stand; without labels 33 of the right, 4 of the wrong."""
    folder = models / "net_relu"
    add_result(folder, range(30))
    # The label of the second result is 0 too; a wrong image that "falls" is pushed onto it.
    add_result(folder, [*range(33), *range(94, 100)], labels="predicted")
    chosen = model_table(read_results(models)).attrs["chosen"]
    row = label_protocols(chosen).loc[str(folder)]
    assert row["true"] == pytest.approx(0.30)
    assert row["predicted"] == pytest.approx(0.37)
    assert row["wrong"] == pytest.approx(0.04)
    assert row["counting"] == pytest.approx(0.03)
    assert row["added"] == pytest.approx(row["wrong"] + row["counting"])
    assert row["pushed"] == pytest.approx(0.4)
    assert row["later"] == 0  # made up: all fell in the first restart


def test_how_far_below_pgd_is_of_the_images_that_both_attacked(models):
    add_result(models / "net_relu", range(20), attack="suite", n=50, correct=50)
    chosen = model_table(read_results(models)).attrs["chosen"]
    assert list(below_pgd(chosen, "suite").values()) == [
        pytest.approx(0.8 - 0.4)
    ]  # 40 and 20 of the first 50
    assert below_pgd(chosen, "rapid") == {}


def test_rapid_is_counted_beside_stronger_attacks_on_the_images_of_both(models, tmp_path):
    """Of Swish 40 stand under the suite's 50 images, 38 of them and 2 others under rapid."""
    add_result(models / "net_swish", range(40), attack="suite", n=50, correct=45)
    add_result(models / "net_swish", [*range(38), 43, 44, *range(60, 90)], attack="rapid")
    add_result(models / "net_relu", range(30), attack="suite", n=50, correct=45)
    add_result(models / "net_relu", range(31), attack="rapid")
    add_result(models / "net_relu", range(31), attack="autoattack", n=31, correct=31)
    # Networks differ in how many images the stronger attack had; of several results the largest
    add_result(models / "net_swish", range(41), attack="autoattack", n=45, correct=45)
    add_result(models / "net_swish", range(2), attack="autoattack", n=9, correct=9)
    add_result(models / "net_swish", range(3), attack="autoattack", epsilon=4 / 255)
    add_result(models / "net_kaf", range(31), attack="rapid")  # has nothing stronger
    beside = rapid_beside_stronger(read_results(models))
    counts = beside.drop(columns=["model"]).to_numpy().tolist()
    assert sorted(zip(beside["model"], counts, strict=True)) == [
        ("net_relu", ["autoattack", 31, 31, 31, 0, 0]),
        ("net_relu", ["suite", 50, 30, 31, 1, 0]),
        ("net_swish", ["autoattack", 45, 41, 40, 2, 3]),
        ("net_swish", ["suite", 50, 40, 40, 2, 2]),
    ]
    (text := tmp_path / "text.md").write_text(
        "<!-- table -->\n<!-- /table --><!-- paired -->\n<!-- /paired -->"
        "<!-- rapid -->\n<!-- /rapid -->"
    )
    assert compare.main([str(models), "--into", str(text)]) == 0
    table = text.read_text().partition("<!-- rapid -->")[2]
    assert "| net_relu | suite | 50 | 30 | 31 | 1 | 0 | +2.0 |" in table
    assert "| all 2 | suite | 100 | 70 | 71 | 3 | 2 | +1.0 |" in table
    assert "| net_relu | AutoAttack | 31 | 31 | 31 | 0 | 0 | +0.0 |" in table
    assert "| all 2 | AutoAttack | 76 | 72 | 71 | 2 | 3 | -1.3 |" in table
    of_one = shown_rapid(beside[beside["model"] == "net_relu"])
    assert of_one["model"] == ["net_relu", "net_relu"]  # no row "all 1"


def test_cards_name_the_training_that_the_probe_ended(models, tmp_path):
    """Counted from 1, as a reader counts; those that came through (None) are not named.

    Another seed stands in for it only if it is there, of the same training, and came through.
    """
    folders = []
    for seed in (7, 8):
        record = training_record(seed=seed)
        record["results"]["catastrophic_overfitting_in_epoch"] = 1
        folders.append(write_training(tmp_path / f"ended_early_{seed}", record))
    results = read_results(models)  # of a KAF trained on another data set
    ended = "ended_early_7 was stopped by the probe in epoch 2 (catastrophic overfitting)"
    cards = model_cards(results, models, *folders, into="cards.md")
    assert f"{ended}.\n" in cards and cards.count("was stopped by the probe") == 2
    folders.append(write_training(tmp_path / "came_through", training_record(seed=9)))
    cards = model_cards(results, models, *folders, into="cards.md")
    assert f"{ended}; another seed stands in for seed 7.\n" in cards


def test_cards_tell_the_command_that_made_them(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    given = ["models/net_kaf", "models/net_relu/", "--cards", "my cards.md"]
    assert compare.main(given) == 0
    command = "robustness_eval.py compare models/net_kaf models/net_relu --cards 'my cards.md'"
    assert f"\n`python {command}`\n" in Path("my cards.md").read_text()


def test_autoattack_alone_makes_a_table(tmp_path):
    add_result(add_model(tmp_path, "relu"), range(40), attack="autoattack")
    table = model_table(read_results(tmp_path))
    assert table.loc[0, "autoattack"] == 0.4 and table.loc[0, "clean_accuracy"] == 0.9
    assert "rapid_acc" not in model_cards(read_results(tmp_path), tmp_path, into="cards.md")


def test_protocols_do_not_mix(models):
    """One model has more images as well: the protocol that all have is taken."""
    add_result(models / "net_kaf", range(500), correct=900, n=1000)
    table = model_table(read_results(models))
    assert table.attrs["n"] == {"pgd_true": N, "pgd_predicted": N}
    assert table.set_index("model").loc["net_kaf", "pgd_true"] == 0.42


def test_other_images_of_a_data_set_are_another_protocol(models):
    """As many images of the same name, but not the same: the ones that most models have are taken.

    What the table does not do is refused, if it is asked for.
    """
    shutil.rmtree(models / "net_kaf" / "robustness")
    add_result(models / "net_kaf", range(42), fingerprint="others")
    table = model_table(results := read_results(models))
    assert sorted(table["model"]) == ["net_relu", "net_swish"]
    assert list(against("net_swish", table)["model"]) == ["net_relu"]
    assert compare.main([str(models)]) == 0
    paths = {Path(row.folder).name: row.path for row in results.itertuples()}
    with pytest.raises(InputError, match="net_kaf and net_relu were attacked on different images"):
        read_outcomes({name: paths[name] for name in ("net_relu", "net_kaf")}, "net_relu")


def test_attacks_on_as_many_images_are_on_the_same_ones(models):
    for activation, images in (("relu", "others"), ("swish", "others"), ("kaf", "f")):
        folder = models / f"net_{activation}"
        add_result(folder, range(30), attack="rapid", fingerprint=images)
        add_result(folder, range(9), attack="suite", n=50, correct=40, fingerprint="first 50")
    table = model_table(read_results(models)).set_index("activation")
    assert table.loc["kaf", "rapid"] == 0.3 and table.loc[["relu", "swish"], "rapid"].isna().all()
    assert (table["suite"] == 9 / 50).all()


def test_images_are_named_by_what_was_attacked(models):
    """Not by what the networks were trained on, nor by the data set that they are a copy of."""
    validation, first_500, first_1000, _ = COPIES

    def told():
        (line, *_) = notes(model_table(read_results(models)))
        return line.partition(" (n: ")[0].removeprefix("Percent of the first test images of ")

    folders = [models / f"net_{activation}" for activation in ("relu", "swish", "kaf")]
    for folder in folders:
        record = json.loads((folder / "training.json").read_text())
        record["dataset"]["validation_fingerprint"] = validation
        (folder / "training.json").write_text(json.dumps(record))
    assert told() == "CIFAR-10"
    add_result(folders[0], range(9), attack="rapid", n=50, correct=40, fingerprint=first_500)
    assert told() == "CIFAR-10 and a JPEG copy of CIFAR-10"
    for folder in folders:
        for labels in LABELS:
            add_result(folder, range(40), labels=labels, fingerprint=first_1000)
        (folder / "training.json").unlink()
    assert told() == "a JPEG copy of CIFAR-10"


def test_results_of_other_weights_are_refused(models, capsys):
    add_result(models / "net_kaf", range(42), sha="other")
    assert compare.main([str(models)]) == 2
    error = capsys.readouterr().err
    assert "made with other weights" in error and error.count("\n") == 1


def test_console_markdown_and_csv_agree(models, tmp_path, capsys):
    assert compare.main([str(models), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "comparison.md").read_text()
    rows = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("model")
    pairs = pd.read_csv(tmp_path / "out" / "paired.csv")
    assert list(pairs["reference"]) == ["net_swish"] * 2 + ["net_relu"] * 2
    pairs = pairs[:2].set_index("model")
    for name, row in rows.iterrows():
        cell = f"{100 * row.pgd_true:.1f} ± {100 * row.pgd_true_standard_error:.1f}"
        for text in (printed, written):
            (line,) = [
                one
                for one in text.splitlines()
                if name in one and "294,922" in one and "/" not in one
            ]
            assert cell in line
    assert f"{100 * pairs.loc['net_relu', 'robust_difference']:+.1f}" in printed
    assert (tmp_path / "out" / "scatter.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_go_between_their_markers_and_nowhere_else(models, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(
        "a\n<!-- table -->\nstale\n<!-- /table -->\nb\n<!-- paired -->\n<!-- /paired -->\nc\n"
    )
    shutil.copytree(models / "net_relu", models / "not_attacked")
    shutil.rmtree(models / "not_attacked" / "robustness")
    cards = tmp_path / "cards.md"
    command = [str(models), "--into", str(readme), "--cards", str(cards)]
    assert compare.main(command) == 0
    once = readme.read_text()
    assert once.startswith("a\n<!-- table -->\n| model |") and "stale" not in once
    assert "\nb\n<!-- paired -->\n| against net_swish |" in once and once.endswith("-->\nc\n")
    assert compare.main(command) == 0 and readme.read_text() == once
    assert "| net_kaf | resnet20 | KAF | cifar10 | 8/255 | 90.0 | 42.0 | – |" in cards.read_text()
    assert "| not_attacked | resnet20 | ReLU | cifar10 | 8/255 | – | – | – |" in cards.read_text()
    assert "not_attacked" not in once
    assert "was trained with" not in cards.read_text()
    record = json.loads((models / "net_kaf" / "training.json").read_text())
    record["settings"]["lr_max"] = 0.05
    (models / "net_kaf" / "training.json").write_text(json.dumps(record))
    assert compare.main(command) == 0
    assert "net_kaf was trained with lr_max 0.05, the others with 0.2." in cards.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/nowhere"], "is not a folder"),
        (["{root}/empty"], "no results in"),
        (["{root}/models", "--reference", "net_tanh"], "is not among net_relu, net_swish, net_kaf"),
        (["{root}/models/net_kaf", "--reference", "net_tanh"], "is not among net_kaf with results"),
        (["{root}/models", "--into", "{root}/text.md"], "<!-- table -->"),
        (["{root}/models", "--out", "{root}/text.md/x"], "cannot write"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(models, capsys, arguments, message):
    root = models.parent
    (root / "empty").mkdir()
    (root / "text.md").write_text("no markers")
    assert compare.main([a.format(root=root) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
