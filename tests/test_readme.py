"""What README and RESULTS show is so: Python runs, figures are those of the result files."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kaf_study import compare, mechanism
from kaf_study.activations import RANDOM_KAF, RIDGE_KAF, STUDIED, is_kaf, kind_of
from kaf_study.attacks.registry import LABELS
from kaf_study.claims import claims_table, means, studies
from kaf_study.latex import listed
from kaf_study.lr_policy import LRFinderResult
from kaf_study.model_folder import dataset_label, trained_models
from kaf_study.records import FORMAT, Evaluation, is_kept, read_json, read_results
from kaf_study.tables import original_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_TEXT = " ".join(README.split())
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
RESULTS_TEXT = " ".join(RESULTS.split())


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_tables_are_those_of_the_result_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    copy, readme = tmp_path / "RESULTS.md", tmp_path / "README.md"
    copy.write_text(RESULTS, encoding="utf-8")
    readme.write_text(README, encoding="utf-8")
    cards = tmp_path / "cards.md"
    arguments = [
        "models/",
        "pilots/relu_seed1",
        "--into",
        str(copy),
        "--answer",
        str(readme),
        "--originals",
        "results/original",
        "--cards",
        str(cards),
    ]
    assert compare.main(arguments) == 0
    told = cards.read_text().replace(str(cards), "models/README.md")
    assert told == (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    assert copy.read_text(encoding="utf-8") == RESULTS
    assert readme.read_text(encoding="utf-8") == README


def test_table_of_the_curvature_is_that_of_the_records(tmp_path):
    copy = tmp_path / "RESULTS.md"
    copy.write_text(RESULTS, encoding="utf-8")
    folders = sorted(map(str, (ROOT / "models").glob("cifar10_resnet20_*")))
    assert mechanism.main([*folders, "--into", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == RESULTS


def test_table_of_the_benchmarks_is_that_of_their_results(tmp_path):
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "table", "--into", copy]
    subprocess.run(command, check=True)
    assert copy.read_text(encoding="utf-8") == text


def test_trainings_in_half_precision_are_told_as_recorded():
    models = trained_models(ROOT / "results/precision")
    settings = [m.settings | {"precision": None, "seed": None} for m in models]
    assert all(one == settings[0] for one in settings)

    def told(precision, figure, digits):
        of = [figure(m) for m in models if m.settings["precision"] == precision]
        ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(of), max(of)))
        return " to ".join(ends)

    def percent(name, what):
        return told(name, lambda m: 100 * m.record["results"][f"validation_{what}"], 1)

    def loss(name):
        return told(name, lambda m: m.history["loss"].iloc[-1], 2)

    half = "mixed_float16", "mixed_bfloat16"
    float16, bfloat16 = (f"at {percent(name, 'clean')} and {percent(name, 'pgd')}" for name in half)
    text = " ".join(RESULTS.split())
    (images,) = {m.record["results"]["validation_n"] for m in models}
    assert (
        f"three seeds in float32 are at {percent('float32', 'clean')} % clean and "
        f"{percent('float32', 'pgd')} under PGD-10 on {images} "
        f"validation images, mixed_float16 (one seed) {float16}, mixed_bfloat16 (one) {bfloat16}, "
    ) in text
    assert f"losses are {loss('float32')}, {loss(half[0])} and {loss(half[1])}." in text


def test_sentences_of_the_benchmarks_are_of_their_results():
    told = " ".join((ROOT / "benchmarks/README.md").read_text(encoding="utf-8").split())
    measured = json.loads((ROOT / "benchmarks/results.json").read_text())
    ratios = measured["step"]["resnet20"]["to swish"]
    half = [ratios[f"swish, mixed_{name}"]["median"] for name in ("bfloat16", "float16")]
    assert f"a step takes {half[0]:.2g} (bfloat16) and {half[1]:.2g} (float16) times" in told
    wide = json.loads((ROOT / "benchmarks/results_avx512.json").read_text())
    layers = wide["layer"]["shapes"]["128x32x32x16"]["forward and gradients"]["to kaf"]
    assert f"layer are {layers['kaf plain']['median']:.1f} times as fast as the plain" in told
    ratios = {name: one["median"] for name, one in wide["step"]["resnet20"]["to swish"].items()}
    step = f"{ratios['kaf']:.2f} (KAF) and {ratios['kaf_free']:.2f} (KAF_Free) times Swish's"
    assert f"step of a ResNet20 takes {step}" in told
    half = ratios["swish, mixed_bfloat16"], ratios["kaf, mixed_bfloat16"] / ratios["kaf"]
    assert f"takes {half[0]:.2f} of a step's time with Swish and {half[1]:.2f} with KAF" in told
    assert f"in no such form, {ratios['swish, mixed_float16']:.0f} times as long" in told
    beside = json.loads((ROOT / "benchmarks/against_autoattack.json").read_text())
    found = beside["cifar10_resnet20_swish_seed0"]["verdicts of the first 64"]
    ours, theirs = (sum(found["seconds"][side]) for side in ("ours", "theirs"))
    standing = {len(found["stand"][side].split()) for side in ("ours", "theirs")}
    assert f"took {ours:.0f} s here and {theirs:.0f} s by its authors' PyTorch" in told
    assert f": {ours / theirs:.2f} of its time" in told
    rapid = sum(found["rapid"]["seconds"])
    assert f"`rapid` took {rapid:.1f} s on these images, {rapid / ours:.3f} of AutoAttack's" in told
    assert found["rapid"]["stand"] == found["stand"]["ours"] == found["stand"]["theirs"]
    assert standing == {17} and f"{found['right when clean']} right when clean, the same 17" in told


def test_tables_of_the_original_networks_are_those_of_the_result_files(tmp_path):
    text = (ROOT / "results/original/README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    (command,) = re.findall(r"robustness_eval.py compare (results/original .*)", text)
    arguments = shlex.split(command)
    arguments[0], arguments[-1] = str(ROOT / arguments[0]), str(copy)
    assert compare.main(arguments) == 0
    assert copy.read_text(encoding="utf-8") == text
    # What RESULTS and the README tell of them
    table = original_table(read_results(ROOT / "results/original")).set_index("model")
    (overfitted,) = table.index[table["failed"]]
    assert table.loc[overfitted, "rapid"] == 0
    fgsm = Evaluation.read(ROOT / f"results/original/{overfitted}/fgsm-1-1-true.json").is_robust
    said = f"after the single step of FGSM {100 * fgsm.mean():.1f} % of the first {len(fgsm):,} do"
    assert said in " ".join(RESULTS.split())
    swish, relu = (100 * table.loc[f"resnet20_{x}_ocrob_lrf", "rapid"] for x in ("swish", "relu"))
    kafs = 100 * table.loc[table.index.str.startswith("resnet20_kaf"), "rapid"]
    above = (
        f"Swish's stands {swish - relu:.1f} points above ReLU's ({swish:.1f} against {relu:.1f} %"
    )
    assert above in README_TEXT
    below, above = relu - kafs.min(), kafs.max() - relu
    others = f"those with KAFs between {below:.1f} below and {above:.1f} above it"
    assert others in README_TEXT


def test_every_result_is_known_as_of_the_copy():
    paths = [*ROOT.glob("models/*/robustness/*.json"), *ROOT.glob("results/original/*/*.json")]
    summaries = [read_json(path) for path in paths]
    data = [one["dataset"] for one in summaries if one.get("format") == FORMAT]
    labels = {dataset_label(one["name"], one["fingerprint"]) for one in data}
    assert len(data) > 80 and labels == {"a JPEG copy of CIFAR-10"}


def test_every_original_network_is_told_of_with_its_interval():
    tables = (ROOT / "results/original/README.md").read_text(encoding="utf-8")
    of_relu = tables.split("| against resnet20_relu_ocrob_lrf |")[1]
    rows = re.findall(r"^\| (resnet20_\w+) \| (\S+) \| (\S+) to (\S+) \|", of_relu, re.MULTILINE)
    told = RESULTS.split("<!-- /originals -->")[1].split("## ")[0]
    told = " ".join(told.replace("(95 %: ", "(").split())
    told = told.replace("points below it (", "(").replace("points (", "(")
    assert len(rows) >= 10
    for name, *figures in rows:
        difference, low, high = map(float, figures)
        if difference < 0:
            difference, low, high = -difference, -high, -low
        if name != "resnet20_relu_ocrob":  # which overfitted
            assert f" {difference:.1f} ({low:.1f} to {high:.1f})" in told, name
    clean = dict(
        re.findall(r"^\| (resnet20_kaf\w+) .* \| (\S+) \| [^|]+ \|$", of_relu, re.MULTILINE)
    )
    gained = [
        " and ".join(figure[1:] for name, figure in clean.items() if name.startswith(kaf))
        for kaf in (f"resnet20_{x}" for x in ("kafswish", "kafrelu", "kafelu", "kafs_free"))
    ]
    assert (
        "{} points more accurate than ReLU, KAF_ReLU {}, KAF_ELU {}, KAF_Free {}.".format(*gained)
        in told
    )


def test_what_float16_did_to_the_original_networks_is_told():
    """The counts themselves are repeated, of two networks, in test_graphs.py."""
    counts = pd.read_csv(ROOT / "results/original/float16.csv").set_index("file")
    table = original_table(read_results(ROOT / "results/original")).set_index("model")
    assert sorted(counts.index) == sorted(table.index)
    assert set(counts["images"]) == {1000}
    share = 100 * counts["other_class"] / counts["images"]
    is_ridge = table["activation"].map(kind_of).loc[share.index] == RIDGE_KAF
    ridge, others = share[is_ridge], share[~is_ridge]
    assert (
        "those whose KAFs began by ridge regression give "
        f"{ridge.min():.1f} to {ridge.max():.1f} % of the first 1,000 images another class than in "
        f"float32, the others at most {others.max():.1f} %"
    ) in RESULTS_TEXT


def test_what_labels_did_to_the_original_networks_is_told():
    told = []
    for name in ("swish_ocrob_lrf", "relu_ocrob_lrf", "elu_ocrob_lrf", "kafswish_ocrob_lrfinder"):
        folder = ROOT / f"results/original/resnet20_{name}"
        true, predicted = (
            Evaluation.read(folder / f"pgd-50-10-{labels}.json") for labels in LABELS
        )
        with_labels = true.is_robust.mean()
        without = is_kept(predicted.images).mean()
        told.append([100 * without, 100 * with_labels, 100 * (without - with_labels)])
    (swish, relu, elu, kaf_swish), with_labels, labels = (
        [f"{figure:.1f}" for figure in figures] for figures in zip(*told, strict=True)
    )
    published = [
        f"{100 * STUDIED[name].published['resnet20'][1]:.2f}"
        for name in ("swish", "relu", "elu", "kaf_swish")
    ]
    expected = (
        f"without labels, Swish's stands at {swish} % of 1,000 images (published: {published[0]}), "
        f"ReLU's at {relu} % ({published[1]}), the better of ELU's at {elu} % ({published[2]}), "
        f"one of KAF_Swish's at {kaf_swish} % ({published[3]}); with labels the same attack leaves "
        f"{listed(with_labels)} %. So {listed(labels)} points of such figures are the labels."
    )
    assert expected in RESULTS_TEXT


@pytest.fixture(scope="module")
def of_rapid():
    """The studies under `rapid`: that of several seeds, and all."""
    found = studies(read_results(ROOT / "models"), "rapid")
    (study,) = [one for one in found if one.has_several_seeds]
    return study, found


def test_the_answer_over_seeds_is_that_of_the_result_files(of_rapid):
    study, found = of_rapid
    table = claims_table(study).set_index(["claim", "first", "second"])
    seeds = {
        study.seeds[name] for name in ("relu", "swish", "kaf", "kaf_relu", "kaf_elu", "kaf_swish")
    }
    assert seeds == {3} and study.n == 10_000
    over_relu = {"swish": table.loc["Swish is the most robust", "swish", "relu"]} | {
        name: row
        for (name, _), row in table.loc["KAFs are more robust than ReLU"].iterrows()
        if row["verdict"] == "more robust"
    }
    assert over_relu["swish"]["verdict"] == "more robust"
    told = listed([STUDIED[name].label for name in over_relu])
    assert f"{told} are more robust than ReLU" in README_TEXT
    trained = table.loc["A KAF that starts as X is more robust than X", "kaf_swish", "swish"]

    def interval(row):
        low, high = 100 * row[["low", "high"]]
        return f"{low:.1f} to {high:.1f}"

    for name, row in over_relu.items():
        points = f"{100 * row['difference']:.1f}"
        beginning = f"{STUDIED[name].label} stands {points} points above ReLU (95 %: "
        if name != "swish":
            beginning = f"{STUDIED[name].label} {points} ("
        assert f"{beginning}{interval(row)})" in README_TEXT, name
    (vgg,) = [one for one in found if one.architecture == "vgg"]
    assert set(vgg.seeds.values()) == {1}
    of_vgg = claims_table(vgg).set_index(["claim", "first", "second"])
    over_relu = {"swish": of_vgg.loc["Swish is the most robust", "swish", "relu"]} | {
        name: row
        for (name, _), row in of_vgg.loc["KAFs are more robust than ReLU"].iterrows()
        if row["verdict"] == "more robust"
    }
    swish = over_relu["swish"]
    assert swish["verdict"] == "more robust"
    told = ", ".join(
        f"{STUDIED[name].label} {100 * row['difference']:.1f} ({interval(row)})"
        for name, row in over_relu.items()
    )
    assert f"in a VGG-like network, one seed of each, {told}." in README_TEXT
    figures = 100 * means(vgg).set_index("activation")
    robust, clean = (
        [f"{figures.loc[name, measure]:.1f}" for name in ("swish", "relu")]
        for measure in ("robust", "clean")
    )
    told = (
        f"by {100 * swish['difference']:.1f} points (95 %: {interval(swish)}, with the spread "
        f"between seeds that the ResNet20s have): {' against '.join(robust)} % of 10,000 images "
        f"stand, {' and '.join(clean)} % are right when clean."
    )
    assert told in RESULTS_TEXT
    of_relu = of_vgg.loc["KAFs are more accurate than ReLU", "kaf_swish", "relu"]
    of_swish = of_vgg.loc["A KAF that starts as X is more robust than X", "kaf_swish", "swish"]
    assert (of_relu["verdict"], of_swish["verdict"]) == ("more accurate", "undecided")
    told = (
        f"KAF_Swish stands {100 * over_relu['kaf_swish']['difference']:.1f} points above ReLU "
        f"({interval(over_relu['kaf_swish'])}) and is not told apart from Swish "
        f"({100 * of_swish['difference']:+.1f}, {interval(of_swish)}); of clean images it is right "
        f"on {figures.loc['kaf_swish', 'clean']:.1f} %, {100 * of_relu['difference']:.1f} points "
        f"more than ReLU ({interval(of_relu)})"
    )
    assert told in RESULTS_TEXT
    smooth = "Smooth activations are more robust than ReLU"
    elu, of_resnet20 = (one.loc[smooth, "elu", "relu"] for one in (of_vgg, table))
    kaf = of_vgg.loc["Swish is the most robust", "swish", "kaf"]
    below = of_vgg.loc[smooth, "kaf", "relu"]
    assert {elu["verdict"], of_resnet20["verdict"], below["verdict"]} == {"undecided"}
    assert kaf["verdict"] == "more robust"
    told = (
        f"ELU stands {100 * elu['difference']:.1f} points above ReLU here ({interval(elu)}; "
        f"undecided among {len(of_vgg.loc[smooth])} comparisons; in the ResNet20s "
        f"{-100 * of_resnet20['difference']:.1f} below it, undecided). KAF's difference "
        f"from ReLU is {100 * below['difference']:+.1f} ({interval(below)}; undecided); as there, "
        f"it is less robust than Swish, by {100 * kaf['difference']:.1f} points ({interval(kaf)})."
    )
    assert told in RESULTS_TEXT, told
    few, many = (
        table.loc[claim]
        for claim in ("A KAF that starts as X is more robust than X", "Swish is the most robust")
    )
    assert many.loc[("swish", "kaf_swish"), "verdict"] == "undecided"
    told = (
        f"KAF_Swish stands {100 * trained['difference']:.1f} points above Swish "
        f"(95 %: {interval(trained)}; {trained['verdict']} among {len(few)} comparisons, not "
        f"among {len(many)})"
    )
    assert told in README_TEXT, told


def test_results_tell_the_verdicts_over_seeds(of_rapid):
    study, _ = of_rapid
    table = claims_table(study).set_index("claim")
    text = " ".join(RESULTS.split())

    def labels(claim, column, verdict):
        rows = table.loc[claim]
        return listed([STUDIED[name].label for name in rows[column][rows["verdict"] == verdict]])

    less, equal, rest = (
        labels("Swish is the most robust", "second", verdict)
        for verdict in ("more robust", "equal within 1 point", "undecided")
    )
    told = (
        f"| It is more robust than {less} and equal to {equal} within a point; {rest} are not told"
    )
    assert told in text
    rows = table.loc["KAFs are more accurate than ReLU"]
    rows = rows[rows["verdict"] == "less accurate"]
    less = labels("KAFs are more accurate than ReLU", "first", "less accurate")
    points = listed([f"{-100 * value:.1f}" for value in rows["difference"]])
    assert f"{less}, which start at random, are less accurate, by {points} points. |" in text
    more = labels("KAFs are more robust than ReLU", "first", "more robust")
    rows = table.loc["KAFs are more robust than ReLU"]
    undecided = rows["first"][rows["verdict"] == "undecided"]
    rest = listed([f"{STUDIED[name].label} {study.seeds[name]}" for name in undecided])
    assert f"| {more} are; undecided, with so many seeds: {rest}." in text
    table = table.loc["A KAF that starts as X is more robust than X"].set_index("first")
    assert table.loc["kaf_swish", "verdict"] == "equal within 1 point"
    gained = f"{100 * table.loc['kaf_elu', 'difference']:.1f}"
    assert f"a KAF that starts as ELU stands {gained} points above ELU" in text
    assert table.loc["kaf_elu", "verdict"] == "more robust"


def test_what_the_attacks_were_held_against_is_told_as_it_is_kept():
    told = (ROOT / "src/kaf_study/attacks/README.md").read_text(encoding="utf-8")
    told = " ".join(told.split())
    kept = json.loads((ROOT / "benchmarks/against_autoattack.json").read_text())
    ((name, of_network),) = kept.items()
    verdicts = of_network["verdicts"]
    n, standing = verdicts["images"], verdicts["stand"]["ours"].split()
    rapid = is_robust(name, "rapid-true-n10000")
    same = int((rapid[:n] == np.isin(np.arange(n), np.array(standing, int))).sum())
    assert f"the first {n} test images of a JPEG copy of CIFAR-10, `{name}`" in told
    assert f"the same verdict on {verdicts['same verdict']} of {n}, {len(standing)} stand." in told
    assert f"`rapid` gives the same verdict on {same} of these {n}." in told
    found = of_network["perturbations of fab-t"]
    least, *_, most = found["ours / theirs, quantiles 0, 5, 50, 95, 100 %"]
    pairs = f"towards {found['targets']} classes of {found['images']} of these images"
    agree = f"within {100 * max(1 - least, most - 1):.2f} %, {found['found by both']} of"
    assert f"{pairs} are theirs {agree} {found['targets'] * found['images']}." in told
    suites = sorted(ROOT.glob("models/*/robustness/suite-true-n500.json"))
    counts = []
    for path in suites:
        suite = is_robust(network := path.parts[-3], path.stem)
        rapid = is_robust(network, "rapid-true-n10000")[: len(suite)]
        counts.append((len(suite), (rapid & ~suite).sum(), (suite & ~rapid).sum()))
    n, only_suite, only_rapid = np.sum(counts, axis=0)
    assert len(suites) == 8
    assert f"it leaves {only_suite - only_rapid} of {n:,} more than `suite`" in told
    assert f"({only_suite} fell under the suite alone, {only_rapid} under `rapid` alone" in told
    figures, others = [], []
    for path in sorted(ROOT.glob("models/cifar10_resnet20_*/robustness/autoattack-true*.json")):
        autoattack = is_robust(network := path.parts[-3], path.stem)
        rapid = is_robust(network, "rapid-true-n10000")[: len(autoattack)]
        if path.stem == "autoattack-true":
            figures.append(f"{autoattack.sum()} and {rapid.sum()} (`{network}`)")
        else:
            others.append(f"`{network}`")
        suite = is_robust(network, "suite-true-n500")
        np.testing.assert_array_equal(autoattack[: len(suite)], suite)
    first = "Of the first 1,000 images there stand under `autoattack` and under `rapid`"
    assert f"{first}: {', '.join(figures)}; on the suite's {len(suite)} of these" in told
    also = f"`autoattack` gives its verdict on every one, as it does on those of {listed(others)}."
    assert also in told
    stronger = [*suites, *ROOT.glob("models/*/robustness/autoattack-true*.json")]
    felled_by = pd.concat([Evaluation.read(path).images["felled_by"] for path in stronger])
    assert set(felled_by.dropna()) == {"apgd-ce", "apgd-t"}
    assert "In all these runs only `apgd-ce` and `apgd-t` felled images, so" in told
    network = "cifar10_light_cnn_kwta_seed0"
    assert not is_robust(network, "autoattack-true").any()
    assert not is_robust(network, "rapid-true-n10000").any()
    (checks,) = (ROOT / "models" / network / "robustness").glob("checks-*.json")
    assert json.loads(checks.read_text())["verdict"].startswith("NOT to be trusted")


def test_what_is_told_of_distances_is_that_of_the_result_files():
    text = " ".join(RESULTS.split())
    medians, standing = {}, {8: {}, 24: {}}
    for name in STUDIED:
        network = f"cifar10_resnet20_{name}_seed0"
        path = ROOT / f"models/{network}/robustness/deepfool-linf-50-1-true-eps255.json"
        if path.exists():
            result = Evaluation.read(path)
            norms = 255 * result.images["linf"].where(result.is_clean)
            assert result.is_robust.sum() == 0 and len(norms) == 1000
            medians[STUDIED[name].label] = norms.median()
            for radius, shares in standing.items():
                shares[name] = 100 * (norms > radius).mean()
    low, high = min(medians, key=medians.get), max(medians, key=medians.get)
    ends = f"{medians[low]:.1f}/255 ({low}) to {medians[high]:.1f}/255 ({high})"
    assert f"right when clean have fallen at {ends}, and" in text

    def span(shares):
        return f"{min(shares):.1f} to {max(shares):.1f}"

    assert f"{span(standing[8].values())} % of all stand at 8/255" in text
    kafs = [share for name, share in standing[24].items() if is_kaf(name)]
    fixed = [share for name, share in standing[24].items() if not is_kaf(name)]
    assert (len(kafs), len(fixed)) == (5, 3)
    assert f"it leaves {span(kafs)} % with the five KAFs, {span(fixed)} with ReLU, ELU" in text
    left = [
        f"{100 * is_robust(f'cifar10_resnet20_{name}_seed0', 'rapid-true-eps24').mean():.1f}"
        for name in ("swish", "kaf_swish", "kaf")
    ]
    assert "leaves {} % with Swish, {} with KAF_Swish and {} with KAF:".format(*left) in text


def test_rates_of_the_vgg_are_those_of_its_range_tests():
    least, losses = {}, {}
    for path in ROOT.glob("results/range_test_vgg/steps200/*.csv"):
        table = pd.read_csv(path)
        found = LRFinderResult(*table[["learning_rate", "loss"]].to_numpy().T, diverged=False)
        least[path.stem] = found.lrs[np.argmin(found.smoothed)]
        losses[path.stem] = found.smoothed.min()
    random = {name for name in least if STUDIED[name].kind == RANDOM_KAF}
    assert len(least) == 7 and random == {"kaf", "kaf_free"}
    assert all((losses[name] > 2.2) == (name in random) for name in losses)  # chance: 2.303
    least = {STUDIED[name].label: rate for name, rate in least.items() if name not in random}
    ends = [f"{least[name]:.3f} ({name})" for name in sorted(least, key=least.get)]
    assert f"least at {ends[0]} to {ends[-1]}; KAF and KAF_Free" in " ".join(RESULTS.split())


def is_robust(network, stem):
    """(N,) bool, of a result."""
    path = ROOT / "models" / network / "robustness" / f"{stem}.json"
    return Evaluation.read(path).is_robust.to_numpy()


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"(?:imgs|src|tests|benchmarks|results)/[\w/.]+", README + RESULTS))),
)
def test_files_named_in_the_readme_exist(path):
    assert (ROOT / path).exists() or path == "imgs/demo_scatter.png"
