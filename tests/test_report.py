"""The report says what the result files say, and nothing that was typed by hand."""

import hashlib
import itertools
import json
import re
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import result, training_record, write_training

from kaf_study import InputError, report, report_original, report_tests, tables
from kaf_study.attacks.registry import ATTACKS, AttackSettings
from kaf_study.cards import told_apart
from kaf_study.claims import studies
from kaf_study.latex import latex, span, tabular
from kaf_study.records import read_results

ROOT = Path(__file__).parents[1]
THESIS = ROOT / "thesis"
GENERATED = THESIS / "generated"
SOURCE = re.sub(r"(?<!\\)%.*", "", (THESIS / "report.tex").read_text(encoding="utf-8"))
PREAMBLE, _, BODY = SOURCE.partition(r"\begin{document}")
NUMBERS = (GENERATED / "numbers.tex").read_text(encoding="utf-8")
DEFINED = set(re.findall(r"\\newcommand\{\\(\w+)\}", NUMBERS))
BIBLIOGRAPHY = (THESIS / "references.bib").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", BIBLIOGRAPHY, re.DOTALL))
OF_LATEX = {"Delta", "Pi"}


# --------------------------------------------------------------------------- the text


def test_generated_numbers_are_those_of_the_result_files(tmp_path):
    assert report.main(["--root", str(ROOT), "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in GENERATED.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (GENERATED / path.name).read_bytes(), path.name


def test_every_macro_is_defined_and_used():
    used = set(re.findall(r"\\([A-Z][A-Za-z]+)", SOURCE)) - OF_LATEX
    assert used == DEFINED


def test_results_tell_of_the_original_networks_what_the_report_tells():
    told = " ".join((ROOT / "RESULTS.md").read_text(encoding="utf-8").split())
    for macro in ("OriginalTwins", "OriginalOverSeeds"):
        text = re.search(rf"\\newcommand\{{\\{macro}\}}\{{(.*)\}}\n", NUMBERS)[1]
        assert text.replace(r"\_", "_").replace(r"\,\%", " %") in told, macro


def test_every_table_is_there_and_shown():
    shown = re.findall(r"\\generated\{(\w+)\}", BODY)
    assert sorted([*shown, "numbers"]) == sorted(path.stem for path in GENERATED.iterdir())


def test_every_reference_is_in_the_bibliography_with_its_number():
    cited = {key for keys in re.findall(r"\\cite\{(.*?)\}", BODY) for key in keys.split(",")}
    assert cited == set(ENTRIES)
    for key, fields in ENTRIES.items():
        arxiv = re.search(r"eprint\s*= \{(\d{4}\.\d{4,5})\}", fields)
        doi = re.search(r"doi\s*= \{(10\.\d{4,}/\S+)\}", fields)
        address = re.search(r"note\s*= \{[^@]*\\url\{https://\S+\}\}", fields)
        assert arxiv or doi or address, key
        if arxiv and not doi:  # the style shows a doi, and a note
            assert f"{{arXiv:{arxiv[1]}}}" in fields, key


def test_every_label_is_there_once_and_every_figure():
    labels = re.findall(r"\\label\{(.*?)\}", BODY)
    assert len(labels) == len(set(labels))
    assert set(re.findall(r"\\(?:eq)?ref\{(.*?)\}", BODY)) <= set(labels)
    figures = re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", BODY)
    assert len(figures) == 4
    for figure in figures:
        assert figure.startswith("../imgs/") and (THESIS / figure).is_file(), figure


# Typed digits. Names of things, and constants of the published work and of the method:
NAMES = r"AVX-512|CIFAR-10|ResNet20|ResNet-18|PGD-10"
CONSTANTS = {
    "2020": "year of the thesis",
    "60": "epochs of its VGG-like network",
    "80": "epochs of its ResNet20",
    "16": "bits",
    "32": "bits",
    "64": "bits",
    "75": "JPEG quality of the copy",
    "5": "level of the tests, percent",
    "95": "confidence of the intervals, percent",
    "83.8": "Wong et al. 2020, clean",
    "46.1": "Wong et al. 2020, under PGD",
}
IN_RESULTS = {"95", "16", "32"}


def typed_digits(text):
    """The numbers in a text that no macro brings: without formulas, commands and references."""
    for pattern in (
        r"\\begin\{equation\}.*?\\end\{equation\}",
        r"\\begin\{tabular\}.*?\\end\{tabular\}",  # of commands
        r"\$[^$]*\$",
        r"\\(?:cite|ref|eqref|label|generated|includegraphics|setlength|cmd)(?:\[.*?\])?\{.*?\}"
        r"(?:\{.*?\})?",
        rf"\b(?:{NAMES})s?\b",
        r"\\[A-Za-z]+\*?",
        r"\[0pt\]|=0pt|0pt|2pt|4pt",
    ):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def sections():
    """{title: text}; the abstract is its own."""
    parts = re.split(r"\\section\{(.*?)\}", BODY)
    return {"Abstract": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def test_words_of_the_attacks_are_their_constants():
    """In words, as a number of this module would have the report import TensorFlow."""
    source = (ROOT / "src/kaf_study/attacks/rapid.py").read_text(encoding="utf-8")
    assert re.search(r"^SHORT = 12 ", source, re.MULTILINE)
    assert re.search(r"^NEAR = 0.1 ", source, re.MULTILINE)
    assert ATTACKS["margin-t"].steps == 100
    assert "twelve steps, and a hundred more" in BODY and "at most a tenth of what" in BODY


def test_no_number_is_typed():
    assert set(typed_digits(BODY)) <= set(CONSTANTS)
    found = sections()
    results = ("What the published figures count", "Results", "Mechanism", "Cost", "Conclusion")
    for title in results:
        assert set(typed_digits(found[title])) <= IN_RESULTS, title
    assert set(typed_digits(found["Abstract"])) <= {"2020"}
    # Formulas are spared above: outside of the method they hold no number.
    for title in (*results, "Abstract", "Limits"):
        formulas = re.findall(r"\$[^$]*\$|\\begin\{equation\}.*?\\end\{equation\}",
                              found[title], re.DOTALL)  # fmt: skip
        assert not any(re.search(r"\d", formula) for formula in formulas), title


# --------------------------------------------------------------------------- the PDF


def streams():
    """The PDF and what its streams hold, decompressed."""
    content = (THESIS / "report.pdf").read_bytes()
    yield content
    for found in re.finditer(rb"stream\r?\n(.*?)endstream", content, re.DOTALL):
        try:
            yield zlib.decompressobj().decompress(found[1])
        except zlib.error:
            continue  # a font


def test_the_pdf_is_of_these_sources():
    whole = b"\n".join(streams())
    (digest,) = re.findall(r"\\ResultsDigest\}\{(\w+)\}", NUMBERS)
    assert digest.encode() in whole, "make report"
    text = hashlib.md5((THESIS / "report.tex").read_bytes()).hexdigest().upper()
    assert text.encode() in whole, "make report"


def test_the_pdf_is_small_and_tells_nothing_of_the_machine():
    assert (THESIS / "report.pdf").stat().st_size < 1_000_000
    whole = b"\n".join(streams())
    assert not re.search(rb"/(?:root|home|work|tmp|usr|Users)/|/CreationDate|/PTEX", whole)
    pages = len(re.findall(rb"/Type\s*/Page\b", whole))
    assert 8 <= pages <= 14


# --------------------------------------------------------------------------- the command


def test_what_cannot_be_used_is_one_line(tmp_path, capsys):
    assert report.main(["--root", str(tmp_path)]) == 2
    (tmp_path / "models").mkdir()
    assert report.main(["--root", str(tmp_path)]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("kaf_study.report: error: ")
    assert not (tmp_path / "thesis").exists()


N = 400


def outcome(robust, settings, model):
    stands = np.arange(N) < robust * N
    return result(np.arange(N) < 0.8 * N, stands, settings, model=model)


@pytest.fixture
def clone(tmp_path):
    """Result files of three activations: a function that adds a network, and the folder."""
    shutil.copytree(ROOT / "pilots", tmp_path / "pilots")
    (tmp_path / "benchmarks").mkdir()
    for name in ("results.json", "results_avx512.json", "against_autoattack.json"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")

    def add(activation, seed, robust, architecture="resnet20"):
        settings = {"dataset": "cifar10", "activation": activation, "seed": seed, "epochs": 3}
        settings |= {"architecture": architecture}
        folder = tmp_path / f"models/cifar10_{architecture}_{activation}_seed{seed}"
        write_training(folder, training_record(**settings))
        history = pd.read_csv(folder / "history.csv").assign(curvature_1=0.5, curvature_2=0.7)
        history.to_csv(folder / "history.csv", index=False)
        kappa = {"before_training": [0.5], "after_training": [0.6]}
        curvature = {"model_sha256": "ab", "dataset": {"name": "cifar10"}, "n": 512} | kappa
        (folder / "curvature.json").write_text(json.dumps(curvature))
        for one in (AttackSettings(), AttackSettings(labels="predicted"), AttackSettings("rapid")):
            outcome(robust, one, folder.name).write(folder / "robustness")

    for activation, robust in (("relu", 0.30), ("swish", 0.40), ("kaf", 0.30)):
        add(activation, 0, robust)
        name = f"resnet20_{activation}_original"
        outcome(robust, AttackSettings("rapid"), name).write(tmp_path / "results/original" / name)
    in_float16(tmp_path, {f"resnet20_{a}_original": 0 for a in ("relu", "swish", "kaf")})
    return tmp_path, add


def in_float16(folder, counts):
    """The images of 1,000 that float16 gives another class, of each original network."""
    rows = [{"file": name, "images": 1000, "other_class": k} for name, k in counts.items()]
    pd.DataFrame(rows).to_csv(folder / "results/original/float16.csv", index=False)


def numbers_of(folder):
    written = report.reported(folder)
    return written.numbers, written.tables


def test_sentences_follow_the_verdicts(clone):
    folder, add = clone
    numbers, tables = numbers_of(folder)
    assert numbers["SeedsOf"] == "one seed of ReLU, Swish and KAF"
    assert numbers["StudySwishRobust"] == "less robust: ReLU, KAF"
    assert numbers["OriginalSwishRobust"] == "less robust: KAF, ReLU"
    assert numbers["ShortAnswer"].startswith("no activation is shown to be more robust than ReLU; ")
    nothing = "Swish and KAF are undecided against ReLU; ReLU and KAF are undecided against Swish"
    assert numbers["OriginalOverSeeds"] == nothing
    assert numbers["OriginalNetworks"] == "3" and numbers["OriginalLeftOut"].startswith("None")
    overfitted = folder / "results/original/resnet20_relu_b"
    outcome(0.0, AttackSettings("rapid"), overfitted.name).write(overfitted)
    names = [path.parent.name for path in (folder / "results/original").glob("*/*.json")]
    in_float16(folder, dict.fromkeys(names, 0))
    again, _ = numbers_of(folder)
    assert "ReLU (" in again["OriginalLeftOut"] and "< 0.7 % under" in again["OriginalLeftOut"]
    left_alone = {name for name, text in numbers.items() if again[name] == text}
    assert numbers.keys() - left_alone == {"OriginalLeftOut"}
    assert numbers["WhatRemains"].startswith("All of the 6 comparisons over seeds are undecided")
    # More seeds come: they are there by themselves, and the answer is one over seeds.
    for seed in (1, 2):
        for activation, robust in (("relu", 0.30), ("swish", 0.40), ("kaf", 0.30)):
            add(activation, seed, robust + 0.005 * seed)
    numbers, tables = numbers_of(folder)
    assert numbers["SeedsOf"] == "3 seeds of ReLU, Swish and KAF"
    assert numbers["ShortAnswer"] == (
        "Swish is 10.0 points more robust than ReLU; no KAF is shown to be more robust than Swish, "
        "and no KAF is shown to be more accurate than ReLU"
    )
    assert numbers["OriginalOverSeeds"] == (
        "Swish is more robust than ReLU; KAF is undecided against ReLU; "
        "ReLU and KAF are less robust than Swish"
    )
    assert numbers["PairsOnce"] == (
        "These rows hold 4 different comparisons, of which 0 are undecided in every claim. "
        "Corrected for all 4 at once, every difference stays and every equality stays but that of "
        "KAF and ReLU."
    )
    assert "undecided" not in numbers["SeedSpread"]
    assert numbers["WhatRemains"] == "None of the 6 comparisons over seeds is undecided"
    for table in ("all", "networks", "labels"):
        assert "seed2" in tables[table] or "seed 2" in tables[table], table
    for table in ("means", "validation", "curvature"):
        assert tables[table].count(" & 3 & ") == 3, table
    # A study of one seed of each takes the spread between seeds from this one.
    assert numbers["Elsewhere"] == ""
    for activation, robust in (("relu", 0.25), ("swish", 0.40)):
        add(activation, 0, robust, "vgg")
    told = numbers_of(folder)[0]["Elsewhere"]
    assert told.startswith("VGG on ") and f", {N:,} images: " in told
    assert "ReLU 25.0 and Swish 40.0 % are robust. Swish is more robust than ReLU (+15.0" in told
    assert told.endswith(", with the spread between seeds of the networks above.")
    # One KAF does otherwise: nothing holds over such seeds.
    add("kaf", 3, 0.70)
    numbers, tables = numbers_of(folder)
    assert numbers["SeedsOf"] == "3 to 4 seeds of ReLU, Swish and KAF"
    assert "no activation is shown" in numbers["ShortAnswer"]
    assert numbers["OriginalOverSeeds"] == nothing


def test_records_may_lack_what_came_later(clone):
    """The images of a training, and whether it was stopped: a dash, no number that is made up."""
    folder, _ = clone
    pilot = write_training(folder / "pilots" / "early", training_record())
    for path in [pilot, *(folder / "models").iterdir()]:
        record = json.loads((path / "training.json").read_text())
        del record["dataset"]
        (path / "training.json").write_text(json.dumps(record))
        history = pd.read_csv(path / "history.csv").assign(accuracy=0.5)
        history.to_csv(path / "history.csv", index=False)
    numbers, tables = numbers_of(folder)
    assert (numbers["TrainImages"], numbers["ValidationImages"]) == ("–", "–")
    (row,) = [line for line in tables["pilots"].splitlines() if line.startswith("early &")]
    assert row.endswith(r"& -- \\")


def test_activations_of_no_claim_are_refused_in_one_line(clone):
    folder, _ = clone
    for name in ("swish", "kaf"):
        shutil.rmtree(folder / f"models/cifar10_resnet20_{name}_seed0")
    (study,) = studies(read_results(folder / "models"), "rapid")
    with pytest.raises(InputError, match=r"no claim is of two .*; there are ReLU$"):
        report_tests.verdicts(report.Report(), study, pd.DataFrame())


def test_attacks_without_labels_on_original_networks_are_told_of(clone):
    folder, _ = clone
    before, _ = numbers_of(folder)
    assert "was not repeated" in before["OriginalWithoutLabels"]
    assert before["OriginalSizes"] == f"{N} images"
    name = "resnet20_swish_original"
    for labels in ("true", "predicted"):  # the 20 % that are wrong when clean become right
        one = outcome(0.40, AttackSettings(labels=labels), name)
        one.write(folder / "results/original" / name)
    numbers, _ = numbers_of(folder)
    assert numbers["OriginalSizes"] == f"{N} images (PGD: {N})"
    assert numbers["OriginalWithoutLabels"] == (
        f"Attacked as published, by PGD-50-10 without labels on {N} images, one network stands at "
        "60.0 %, where 53.9 % were published. Of the 13.9 points by which these fall under rapid, "
        "the labels make 20.0, the stronger attack 0.0; -6.1 remain."
    )


def test_two_states_of_a_training_are_one_of_the_activation(clone):
    folder, _ = clone
    place = folder / "results/original"
    assert numbers_of(folder)[0]["OriginalTwins"].startswith("No two files")
    last = "resnet20_kaf_original_last"
    outcome(0.25, AttackSettings("rapid"), last).write(place / last)
    counts = {"relu_original": 0, "swish_original": 1, "kaf_original": 2, "kaf_original_last": 4}
    in_float16(folder, {f"resnet20_{name}": count for name, count in counts.items()})
    numbers, _ = numbers_of(folder)
    assert numbers["OriginalTwins"].startswith(
        "The two files of KAF are right or wrong together on"
    )
    assert numbers["HalfOthers"] == "0.4" and numbers["HalfRidge"] == "–"
    table = tables.original_table(read_results(place))
    seeds = report_original.of_each_training(table)
    assert sorted(seeds["activation"]) == ["kaf", "relu", "swish"]


def test_networks_of_an_activation_are_told_of_together():
    """Three of KAF, two of ELU and of Swish, one of KAF_ELU, against that of ReLU."""
    kinds = {"elu": 2, "swish": 2, "kaf": 3, "kaf_elu": 1}
    networks = {f"{name}_{number}": name for name, n in kinds.items() for number in range(n)}
    table = pd.DataFrame({"model": ["relu", *networks], "activation": ["relu", *networks.values()]})
    pairs = pd.DataFrame(
        {
            "model": list(networks),
            "p_holm": [0.01, 0.2, 0.01, 0.01, 0.01, 0.01, 0.3, 0.01],
            "robust_difference": [-0.1, -0.1, 0.1, 0.1, -0.1, -0.1, -0.1, 0.1],
        }
    )
    named = partial(report_tests._named, of=table.set_index("model")["activation"])
    told = told_apart(pairs, "p_holm", "robust_difference", report_tests.WORDS, named)
    assert told == (
        "more robust: both of Swish, KAF_ELU; less robust: 1 of 2 of ELU, 2 of 3 of KAF; "
        "not told apart: 1 of 2 of ELU, 1 of 3 of KAF"
    )
    everything = report_tests._named(networks, table.set_index("model")["activation"])
    assert everything == "both of ELU, both of Swish, all 3 of KAF, KAF_ELU"


def test_seeds_of_some_activations_are_told_beside_the_pairs_of_all(clone):
    """PGD on one seed of each of three, rapid on three seeds of two."""
    folder, add = clone
    numbers, _ = numbers_of(folder)
    assert numbers["SeedsOf"] == "one seed of ReLU, Swish and KAF"
    assert numbers["SeedsAnswer"] == "no pair is told apart"
    shutil.rmtree(folder / "models/cifar10_resnet20_kaf_seed0/robustness")
    add("kaf", 7, 0.30)
    for path in (folder / "models/cifar10_resnet20_kaf_seed7/robustness").glob("rapid*"):
        path.unlink()
    for seed, activation in itertools.product((1, 2), ("relu", "swish")):
        add(activation, seed, (0.30 if activation == "relu" else 0.40) + 0.005 * seed)
        for path in (folder / "models").glob(f"*_{activation}_seed{seed}/robustness/pgd*"):
            path.unlink()
    numbers, tables = numbers_of(folder)
    assert (numbers["StudyAttack"], numbers["SeedsAttack"]) == ("PGD-50-10", "rapid")
    assert numbers["SeedsOf"] == "3 seeds of ReLU and Swish"
    assert numbers["SeedsAnswer"].startswith("Swish is more robust than ReLU (+10.0 points, +")
    assert numbers["SeedsAnswer"].count("than") == 1  # once, though two claims have the pair
    assert tables["means"].count(" & 3 & ") == 2


def test_the_study_is_that_of_most_networks(clone):
    folder, add = clone
    assert numbers_of(folder)[0]["StudyAttack"] == "PGD-50-10"  # both have three: the first found
    shutil.rmtree(folder / "models/cifar10_resnet20_kaf_seed0/robustness")
    add("kaf", 1, 0.3)
    for path in (folder / "models/cifar10_resnet20_kaf_seed1/robustness").glob("pgd-50-10-true*"):
        path.unlink()
    assert numbers_of(folder)[0]["StudyAttack"] == "rapid"


def test_text_becomes_latex():
    assert latex("KAF_ReLU -0.5 to +1.2 %, p < 0.001*") == (
        r"KAF\_ReLU $-$0.5 to +1.2\,\%, p $<$ 0.001$^*$"
    )
    assert latex("PGD-50-10 2026-11") == "PGD-50-10 2026-11"
    assert span([np.nan, 0.365, 0.387]) == "36.5 to 38.7" and span([0.1, 0.1]) == "10.0"
    assert tabular({"a": ["x"], "b": [1]}).splitlines()[2:5] == [
        r"a & b \\",
        r"\midrule",
        r"x & 1 \\",
    ]
    assert r"\multicolumn{1}{l}{\emph{of x}} \\x \\" in tabular({"a": ["x"]}, "l", ["of x"])
