"""Claims get their verdicts from the result files of several seeds."""

import itertools
import json
import shutil
from dataclasses import fields, replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from fabricated import result

from kaf_study import InputError, compare, figures, report
from kaf_study.activations import STUDIED
from kaf_study.attacks.registry import AttackSettings
from kaf_study.cards import shown_verdicts
from kaf_study.claims import (
    CLAIMS,
    Claim,
    _with_lender,
    claims_table,
    means,
    studies,
    training_of,
)
from kaf_study.config import TrainConfig
from kaf_study.records import Evaluation, read_results, standard_error
from kaf_study.tables import TRUE_LABELS, original_table

N = 1000
SWISH_ABOVE_RELU = Claim("Swish above ReLU", "robust", (("swish", "relu"),))


def add_network(root, activation, seed, stands, *, correct=700, epochs=15, name=None):
    """A model folder whose result has the first `correct` images right, and `stands` robust."""
    folder = root / (name or f"net_{activation}_seed{seed}")
    settings = {
        "dataset": "cifar10",
        "architecture": "resnet20",
        "activation": activation,
        "epochs": epochs,
        "epsilon": 8 / 255,
        "optimizer": "sgd",
        "seed": seed,
    }
    record = {
        "settings": settings,
        "results": {"parameters": 294922, "epochs_trained": epochs},
        "seconds": 240.3,
        "model_sha256": "ab",
    }
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps(record))
    index = np.arange(N)
    clean = index < correct
    robust = clean & np.isin(index, stands)
    images = pd.DataFrame(
        {
            "index": index,
            "label": 0,
            "clean_prediction": np.where(clean, 0, 1),
            "adversarial_prediction": np.where(robust, 0, 1),
            "restart": pd.array(np.where(clean & ~robust, 1, None), dtype="Int64"),
            "iteration": pd.array(np.where(clean & ~robust, 1, None), dtype="Int64"),
            "linf": 8 / 255,
        }
    )
    summary = {
        "format": "robustness-1",
        "name": f"pgd-50-10-true-n{N}",
        "model": folder.name,
        "labels": "true",
        "protocol": "PGD-50-10",
        "attack": {
            "name": "pgd", "epsilon": 8 / 255, "alpha": 2 / 255, "steps": 50, "restarts": 10,
        },
        "dataset": {"name": "cifar10", "fingerprint": "f"},
        "n": N,
        "clean_accuracy": clean.mean(),
        "clean_standard_error": standard_error(clean.mean(), N),
        "robust_accuracy": robust.mean(),
        "robust_standard_error": standard_error(robust.mean(), N),
        "seed": 0,
        "model_sha256": "ab",
    }  # fmt: skip
    Evaluation(images, summary).write(folder / "robustness")
    return folder


@pytest.fixture
def models(tmp_path):
    """Three seeds of each: ReLU stands on about 400 images, Swish on 60 more, KAF as ReLU."""
    for seed in range(3):
        add_network(tmp_path, "relu", seed, range(400 + seed))
        add_network(tmp_path, "swish", seed, range(460 - seed), correct=702)
        add_network(tmp_path, "kaf", seed, range(401 - seed), correct=701 - seed)
    return tmp_path


def verdicts_of(root, claims=CLAIMS):
    (study,) = studies(read_results(root))
    table = claims_table(study, claims)
    return table.set_index(["measure", "first", "second"])


def test_every_activation_of_a_claim_is_in_the_table():
    for claim in CLAIMS:
        assert claim.pairs and all(set(pair) <= set(STUDIED) for pair in claim.pairs)
        assert "kwta" not in {name for pair in claim.pairs for name in pair}
    pairs = {claim.text: claim.pairs for claim in CLAIMS}
    assert ("kaf_elu", "elu") in pairs["A KAF that starts as X is more robust than X"]
    assert ("kaf_on_swish", "swish") in pairs["A KAF on X is more robust than X"]
    assert ("kaf_on_relu", "relu") not in pairs["Smooth activations are more robust than ReLU"]


def test_verdicts_are_of_means_over_seeds(models):
    table = verdicts_of(models)
    swish = table.loc[[("robust", "swish", "relu")]].iloc[0]
    assert swish["difference"] == pytest.approx((459 - 401) / N)
    assert swish["low"] < swish["difference"] < swish["high"] and swish["low"] > 0
    assert (swish["verdict"], swish["seeds"]) == ("more robust", "3 / 3")
    assert swish["published"] == pytest.approx(0.5388 - 0.5017)
    kaf = table.loc[[("robust", "kaf", "relu")]].iloc[0]
    assert kaf["difference"] == pytest.approx(-1 / N) and kaf["verdict"] == "equal within 1 point"
    clean = table.loc[[("clean", "kaf", "relu")]].iloc[0]
    assert clean["difference"] == pytest.approx(0) and clean["verdict"] == "equal within 1 point"
    assert clean["published"] == pytest.approx(0.7808 - 0.7752)
    assert "elu" not in table.index.get_level_values("first")


def test_the_other_way_round_is_less_robust(models):
    claim = Claim("ReLU above Swish", "robust", (("relu", "swish"),))
    assert verdicts_of(models, [claim])["verdict"].tolist() == ["less robust"]


def test_one_seed_of_each_is_undecided_and_says_why(tmp_path):
    add_network(tmp_path, "relu", 0, range(300))
    add_network(tmp_path, "swish", 0, range(500))
    table = verdicts_of(tmp_path, [SWISH_ABOVE_RELU])
    (row,) = table.itertuples()
    assert row.verdict == "undecided" and "one seed each" in row.why
    assert row.difference == pytest.approx(0.2) and row.low == -np.inf


def test_wide_intervals_are_undecided_and_say_how_wide(models, tmp_path):
    for seed, stands in enumerate((350, 460, 480), start=3):
        add_network(tmp_path, "swish", seed, range(stands))
    (row,) = verdicts_of(models, [SWISH_ABOVE_RELU]).itertuples()
    assert (
        row.verdict == "undecided"
        and row.why == f"± {50 * (row.high - row.low):.1f} points are too wide"
    )


def test_means_have_intervals_and_the_spread_between_seeds(models):
    (study,) = studies(read_results(models))
    table = means(study).set_index("activation")
    assert list(table.index) == ["relu", "swish", "kaf"]  # in the order of the study's tables
    assert table.loc["relu", "robust"] == pytest.approx(0.401)
    assert table.loc["relu", "robust_low"] < 0.401 < table.loc["relu", "robust_high"]
    # Each activation's seeds differ by 1 image: variance 1 (robust, of three); 0, 0, 1 (clean).
    assert means(study).attrs["sd"]["robust"] == pytest.approx(1 / N)
    assert means(study).attrs["sd"]["clean"] == pytest.approx(np.sqrt(1 / 3) / N)


def test_networks_trained_otherwise_are_another_study(models):
    add_network(models, "relu", 0, range(500), epochs=30, name="longer")
    found = {study.models[0].settings["epochs"]: study for study in studies(read_results(models))}
    assert found[15].seeds == {"relu": 3, "swish": 3, "kaf": 3} and found[30].seeds == {"relu": 1}


def change_record(folder, change):
    record = json.loads((folder / "training.json").read_text())
    change(record)
    (folder / "training.json").write_text(json.dumps(record))


OTHER_SETTINGS = {
    "batch_size": 64, "train_n": 1000, "alpha": 8 / 255, "noise": 2.0, "epsilon_ramp": 0.1,
    "pairing": 1.0, "pairing_ramp": 0.5, "label_smoothing": 0.1, "lr_min": 0.01, "lr_max": 0.8,
    "lr_start": 0.0, "lr_peak": 0.3, "momentum": 0.0, "nesterov": True, "l2": 5e-4,
    "kernel_initializer": "he_normal", "ema_momentum": 0.998, "ema_warm": True,
    "precision": "mixed_float16", "dataset": "digits", "architecture": "vgg", "epochs": 16,
    "epsilon": 4 / 255, "optimizer": "adam",
}  # fmt: skip
OF_AN_ACTIVATION = {
    "deterministic": True, "dictionary_size": 16, "shapes_of": "x", "kwta_anneal_from": 4,
    "kwta_anneal_every": 1,
}  # fmt: skip


def test_every_setting_of_a_training_makes_another_study_but_those_of_an_activation(models):
    (study,) = studies(read_results(models))
    model = study.models[0]
    assert OTHER_SETTINGS.keys() | OF_AN_ACTIVATION.keys() | {"activation", "seed"} == {
        field.name for field in fields(TrainConfig)
    }
    for name, value in (OTHER_SETTINGS | OF_AN_ACTIVATION).items():
        assert model.settings[name] != value
        other = replace(model, record={"settings": model.settings | {name: value}})
        assert (training_of(other) == training_of(model)) == (name in OF_AN_ACTIVATION), name


def test_seeds_of_another_recipe_or_other_images_are_no_seeds_of_a_study(models, tmp_path):
    """What a record lacks has its default, so that old records are of the study as well."""
    for seed, activation in itertools.product((3, 4), ("relu", "swish")):
        folder = add_network(models, activation, seed, range(300 + seed))
        change_record(folder, lambda record: record["settings"].update(lr_max=0.8, momentum=0.0))
    copied = add_network(models, "relu", 5, range(300))
    change_record(copied, lambda record: record.update(dataset={"name": "cifar10"}))
    assert len(studies(read_results(models))) == 2
    data = {"name": "cifar10", "train_fingerprint": "other"}
    change_record(copied, lambda record: record.update(dataset=data))
    first, second, third = studies(read_results(models))
    assert first.seeds == {"relu": 3, "swish": 3, "kaf": 3}
    assert second.seeds == {"relu": 2, "swish": 2} and third.seeds == {"relu": 1}
    titles = compare.titles_of([first, second])
    assert [title.partition(", PGD")[2] for title in titles] == [
        ", lr_max 0.2, momentum 0.9",
        ", lr_max 0.8, momentum 0",
    ]


def test_a_seed_that_is_there_twice_is_refused(models):
    add_network(models, "relu", 1, range(500), name="again")
    with pytest.raises(InputError, match="both relu, seed 1") as error:
        studies(read_results(models))
    assert "again" in str(error.value) and "net_relu_seed1" in str(error.value)


def test_compare_shows_claims_of_several_seeds(models, tmp_path, capsys):
    readme = tmp_path / "README.md"
    names = ("table", "paired", "claims")
    readme.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    command = [str(models), "--out", str(tmp_path / "out"), "--into", str(readme)]
    assert compare.main(command) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()
    (row,) = [
        line
        for line in readme.read_text().splitlines()
        if "| +5.8 |" in line and "Swish is" in line
    ]
    assert row.startswith("| Swish is the most robust | Swish | ReLU | 3 / 3 | +3.7 | +5.8 |")
    assert row.endswith("| more robust |") and row in written
    assert "standard deviation: clean 0.06, robust 0.10 points" in printed
    saved = pd.read_csv(tmp_path / "out" / "claims.csv")
    assert set(saved["verdict"]) == {"more robust", "equal within 1 point"}


def test_the_answer_has_means_with_intervals_and_what_was_published(models, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("Before\n<!-- answer -->\nold\n<!-- /answer -->\nAfter\n")
    assert compare.main([str(models), "--answer", str(readme)]) == 0
    head, _, *rows = readme.read_text().split("<!-- ")[1].splitlines()[1:]
    assert head == "| activation | seeds | clean, % | robust, % | published: clean / robust* |"
    assert [row.split(" | ")[0] for row in rows] == ["| ReLU", "| Swish", "| KAF"]
    (study,) = studies(read_results(models))
    relu = means(study).set_index("activation").loc["relu"]
    low, high = 100 * relu["robust_low"], 100 * relu["robust_high"]
    assert rows[0].startswith("| ReLU | 3 | 70.0 (")
    assert rows[0].endswith(f" | 40.1 ({low:.1f} to {high:.1f}) | 77.52 / 50.17 |")
    assert readme.read_text().startswith("Before\n") and "old" not in readme.read_text()

    single = [str(models / f"net_{name}_seed0") for name in ("relu", "swish")]
    assert compare.main([*single, "--answer", str(readme)]) == 0
    assert "| ReLU | 1 | 70.0 (–) | 40.0 (–) | 77.52 / 50.17 |" in readme.read_text()
    for name in ("relu", "swish"):
        (models / f"net_{name}_seed0" / "training.json").unlink()
    assert compare.main([*single, "--answer", str(readme)]) == 2
    assert "training.json" in capsys.readouterr().err


def test_originals_stand_beside_the_claims(models, tmp_path, capsys):
    root, readme = tmp_path / "original", tmp_path / "README.md"
    stand = {"relu": 300, "relu_b": 5, "swish": 342, "kafswish": 350, "swish_b": 350}
    for name, standing in stand.items():
        clean, stands = np.arange(N) < 700 + standing % 3, np.arange(N) < standing
        folder = root / f"resnet20_{name}_x" / "robustness"
        result(clean, stands, AttackSettings("rapid"), model=folder.parent.name).write(folder)
    readme.write_text(
        "".join(
            f"<!-- {x} -->\n<!-- /{x} -->\n" for x in ("table", "paired", "claims", "originals")
        )
    )
    command = [str(models), "--into", str(readme), "--originals", str(root)]
    assert compare.main(command) == 0
    rows = [line for line in readme.read_text().splitlines() if " | 3 / 3 | " in line]
    # Of the two networks of Swish the mean counts; of ReLU's one overfitted, and does not.
    assert any("| Swish | ReLU | 3 / 3 | +3.7 | +4.6 | +5.8 |" in row for row in rows)
    assert any("| KAF | ReLU | 3 / 3 | +0.6 | – | " in row for row in rows)
    assert "one or two of each, so that other seeds may turn" in readme.read_text()
    written = readme.read_text().partition("<!-- originals -->")[2]
    names = [line.split(" | ")[:2] for line in written.splitlines() if line.startswith("| resnet")]
    assert names[0] == ["| resnet20_kafswish_x", "KAF_Swish"]
    assert names[-1] == ["| resnet20_relu_b_x", "(ReLU)"]
    unknown = result(clean, stands, AttackSettings("rapid"), model="resnet20_unknown_x")
    unknown.write(root / "resnet20_unknown_x" / "robustness")
    assert compare.main(command) == 2
    assert "resnet20_kafswish_x" in capsys.readouterr().err


def test_originals_named_kafs_are_kafs_and_with_a_free_dictionary_kaf_free(tmp_path):
    for name in ("resnet20_kafs_x", "resnet20_kafs_freedictkb_x"):
        one = result(np.arange(N) < 700, np.arange(N) < 300, AttackSettings("rapid"), model=name)
        one.write(tmp_path / name)
    table = original_table(read_results(tmp_path)).set_index("model")
    assert table.loc["resnet20_kafs_x", "activation"] == "kaf"
    assert table.loc["resnet20_kafs_freedictkb_x", "activation"] == "kaf_free"


def test_figure_over_seeds_shows_trainings_means_and_intervals(models):
    (study,) = studies(read_results(models))
    clean, robust = figures.accuracies_over_seeds(study, "PGD").axes
    assert [tick.get_text() for tick in clean.get_yticklabels()] == [
        f"{name}, 3 seeds" for name in ("ReLU", "Swish", "KAF")
    ]
    table = means(study).set_index("activation")
    drawn = {
        (marker, name): 100 * np.array(values)
        for name, row in table.iterrows()
        for marker, values in (
            ("d" if name != "kaf" else "P", [row["robust"]]),
            ("None", [row["robust_low"], row["robust_high"]]),
            (".", np.sort(study.results["robust"][name].mean(axis=1))),
        )
    }
    lines = {(line.get_marker(), line.get_color()): line.get_xdata() for line in robust.lines}
    assert len(lines) == len(robust.lines) == len(drawn)
    for (marker, name), values in drawn.items():
        found = lines[marker, STUDIED[name].color]
        np.testing.assert_allclose(np.sort(found), values)
    plt.close("all")


def test_figure_of_single_seeds_has_no_intervals(tmp_path):
    for activation, standing in (("relu", 300), ("swish", 500)):
        add_network(tmp_path, activation, 0, range(standing))
    (study,) = studies(read_results(tmp_path))
    axes = figures.accuracies_over_seeds(study, "PGD").axes
    assert [len(ax.lines) for ax in axes] == [2, 2]
    assert axes[0].get_yticklabels()[0].get_text() == "ReLU, 1 seed"
    plt.close("all")


def test_claims_are_of_rapid_where_pgd_has_one_seed_of_each(tmp_path, capsys):
    numbers = np.arange(N)
    for seed, (activation, standing) in itertools.product(
        (0, 1), {"relu": 300, "swish": 360}.items()
    ):
        folder = add_network(tmp_path, activation, seed, range(standing))
        if seed:
            shutil.rmtree(folder / "robustness")
        stands = numbers < standing - 20 + seed
        rapid = result(numbers < 700, stands, AttackSettings("rapid"), model=folder.name)
        rapid.write(folder / "robustness")
    assert compare.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "(15 epochs of fast adversarial training), rapid\n" in printed
    assert "Swish is the most robust Swish    ReLU 2 / 2" in printed and "+6.0" in printed
    assert "under PGD-50-10" in printed  # the pairs, of the attack that was asked for


def test_a_few_results_of_a_stronger_attack_do_not_take_the_claims_from_rapid(tmp_path):
    """Three seeds of each under rapid; AutoAttack on 100 images of ReLU, then of Swish as well."""
    models, readme = tmp_path / "models", tmp_path / "README.md"
    readme.write_text("<!-- answer -->\n<!-- /answer -->\n")

    def attack(folder, name, n):
        index = np.arange(n)
        attacked = result(index < 0.7 * n, index < 0.3 * n, AttackSettings(name), model=folder.name)
        attacked.write(folder / "robustness")

    for seed, activation in itertools.product(range(3), ("relu", "swish")):
        folder = add_network(models, activation, seed, range(400))
        if seed:
            shutil.rmtree(folder / "robustness")
        attack(folder, "rapid", N)
    for others in (("relu_seed0", "relu_seed1"), ("swish_seed0",)):
        for name in others:
            attack(models / f"net_{name}", "autoattack", 100)
        results = read_results(models)
        (one,) = compare.tables_of_studies(results, "pgd_true")
        assert one.study.kind == "rapid" and one.study.size == (2, 6, N)
        assert compare.main([str(models), "--answer", str(readme)]) == 0
        assert "| Swish | 3 | 70.0 (" in readme.read_text()
        attacked = [study for kind in TRUE_LABELS for study in studies(results, kind)]
        assert {(study.kind, study.size) for study in report.main_studies(attacked)} == {
            ("rapid", one.study.size)
        }


def test_verdicts_of_several_studies_stand_side_by_side(models):
    def side_by_side():
        found = sorted(studies(read_results(models)), key=lambda s: s.models[0].settings["epochs"])
        tables = map(claims_table, found)
        names = ("short, of 15 epochs", "of 30 epochs")
        return shown_verdicts(dict(zip(names, tables, strict=True)))

    for seed in range(2):
        add_network(models, "relu", seed, range(500 + seed), epochs=30, name=f"long_relu{seed}")
        add_network(models, "elu", seed, range(440 + seed), epochs=30, name=f"long_elu{seed}")
    assert not any(side_by_side().values())  # no pair is in both
    for seed in range(2):
        add_network(models, "swish", seed, range(560 + seed), epochs=30, name=f"long_swish{seed}")
    cells = side_by_side()
    assert list(cells)[3:] == ["short, of 15", "of 30"]  # without the word that both end in
    rows = list(zip(*cells.values(), strict=True))
    assert rows[0] == (
        "Swish is the most robust", "Swish", "ReLU", "+5.8, more robust", "+6.0, more robust",
    )  # fmt: skip
    assert {row[1:3] for row in rows} == {("Swish", "ReLU")}
    assert len({row[0] for row in rows}) == len(rows)


def test_one_seed_of_each_is_judged_by_the_spread_of_another_study(models, capsys):
    for activation, standing in {"relu": 401, "swish": 459, "elu": 402}.items():
        add_network(models, activation, 0, range(standing), epochs=30, name=f"long_{activation}")
    short, long = sorted(
        studies(read_results(models)), key=lambda study: study.models[0].settings["epochs"]
    )
    assert short.lender is None and long.lender == short
    table = claims_table(long, [SWISH_ABOVE_RELU])
    (row,) = table.itertuples()
    # By hand: one seed of each differ by twice the variance between seeds, of 1 image; and 58 of
    # 1,000 images by 1.
    seeds, rest = (getattr(short.noise["robust"], name) for name in ("seed", "rest"))
    assert float(seeds) == pytest.approx(1 / N**2)
    images = (0.058 - 0.058**2) * N / (N - 1) - 2 * float(rest)
    error = np.sqrt(2 * float(seeds) + images / N)
    assert row.verdict == "more robust" and row.seeds == "1 / 1"
    assert row.low < 0.058 - 1.96 * error < row.low + 0.001  # Student's is a little wider
    averages = means(long)
    assert averages.attrs["sd"] == means(short).attrs["sd"]
    assert np.isfinite(averages[["robust_low", "robust_high"]]).all(axis=None)

    assert compare.main([str(models)]) == 0
    printed = capsys.readouterr().out
    assert "pooled over the activations" in printed  # of the study of several seeds
    whose = "taken from ResNet20 on CIFAR-10 (15 epochs of fast adversarial training)"
    assert f"variance between seeds {whose}, as here is one seed of each" in printed
    assert "(30 epochs of fast adversarial training), PGD\n" in printed


@pytest.mark.parametrize("other", [{"epsilon": 4 / 255}, {"dataset": "digits"}, {"n": 500}])
def test_no_study_lends_its_spread_to_one_of_other_images_or_another_radius(models, other):
    for activation in ("relu", "swish"):
        add_network(models, activation, 0, range(400), epochs=30, name=f"long_{activation}")
    short, long = sorted(
        studies(read_results(models)), key=lambda study: study.models[0].settings["epochs"]
    )
    n = other.pop("n", N)
    changed = [replace(m, record=m.record | {"settings": m.settings | other}) for m in long.models]
    assert _with_lender(replace(long, models=tuple(changed), n=n), [short]).lender is None
    assert _with_lender(long, [short]).lender == short


def test_compare_shows_no_claims_of_single_seeds(tmp_path, capsys):
    add_network(tmp_path, "relu", 0, range(300))
    add_network(tmp_path, "swish", 0, range(500))
    assert compare.main([str(tmp_path)]) == 0
    assert "claim" not in capsys.readouterr().out
