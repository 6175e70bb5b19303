"""The workflow makes what is missing, and nothing of what is there, whatever the file times."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SNAKEFILE = ROOT / "workflow" / "Snakefile"
TINY = {
    "trainings": [
        {
            "name": "digits_light_cnn_{activation}_seed{seed}",
            "settings": {
                "dataset": "digits",
                "architecture": "light_cnn",
                "recipe": "adam",
                "epochs": 1,
                "train-n": 64,
                "batch-size": 32,
            },
            "seeds": {"elu": [0]},
        }
    ],
    "attacks": [{"attack": "pgd", "steps": 1, "restarts": 1, "n": 8}],
    "attacks_on_first_seeds": [],
    "figures": [{"kind": "scatter", "out": "imgs/scatter.png"}],
    "tables": {
        "folders": "models",
        "curvature": "models/*",
        "into": "RESULTS.md",
        "answer": "RESULTS.md",
        "originals": None,
        "cards": "models/README.md",
    },
}
MARKED = "# Mine\n\n" + "".join(
    f"<!-- {name} -->\n<!-- /{name} -->\n"
    for name in ("table", "paired", "claims", "answer", "curvature")
)


def run(directory, study, *arguments):
    (directory / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--cores", "2"]
    command += ["--directory", directory, "--configfile", directory / "study.yaml", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_a_tiny_study_is_trained_attacked_compared_and_drawn(tmp_path):
    (tmp_path / "RESULTS.md").write_text(MARKED)
    done = run(tmp_path, TINY)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "digits_light_cnn_elu_seed0"
    settings = json.loads((folder / "training.json").read_text())["settings"]
    assert (settings["epochs"], settings["train_n"]) == (1, 64)
    assert (folder / "robustness" / "pgd-1-1-true-digits-n8.json").exists()
    assert (tmp_path / "imgs" / "scatter.png").read_bytes().startswith(b"\x89PNG")
    for text in ("RESULTS.md", "models/README.md"):
        assert folder.name in (tmp_path / text).read_text()
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Mine")

    again = run(tmp_path, TINY)
    assert again.returncode == 0 and "Nothing to be done" in again.stderr, again.stderr

    more = TINY | {"attacks": [*TINY["attacks"], {"attack": "fgsm", "n": 8}]}
    planned = run(tmp_path, more, "--dry-run").stdout
    assert "fgsm-1-1-true-digits-n8.json" in planned and "rule train" not in planned
    assert "rule tables" in planned and "rule figure" in planned

    other = json.loads(json.dumps(TINY))
    other["trainings"][0]["settings"]["epochs"] = 2
    refused = run(tmp_path, other)
    assert refused.returncode == 1
    assert "belongs to a run of other settings (epochs: there 1, asked 2)" in refused.stderr


def test_of_what_is_committed_nothing_is_to_be_done_whatever_the_times(tmp_path):
    study = yaml.safe_load((ROOT / "workflow" / "study.yaml").read_text())
    for kind in ("models", "imgs"):
        leave_out = shutil.ignore_patterns("*.keras", "*.npz", "*.pdf")
        shutil.copytree(ROOT / kind, tmp_path / kind, ignore=leave_out)
    for path in sorted(tmp_path.rglob("*")):
        os.utime(path, (0, random.Random(path.name).randrange(10**9)))
    # Of each activation the first seed, where it was attacked by more than `rapid` so far
    attacks = study["attacks_on_first_seeds"]
    for group in study["trainings"]:
        group["seeds"] = {
            activation: seeds[:1]
            for activation, seeds in group["seeds"].items()
            for name in [group["name"].format(activation=activation, seed=seeds[0])]
            if (ROOT / "models" / name / "robustness/pgd-50-10-true.json").exists()
        }
    assert sum(len(group["seeds"]) for group in study["trainings"]) >= 8
    study |= {"attacks": attacks, "attacks_on_first_seeds": []}
    done = run(tmp_path, study, "--dry-run")
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, done.stderr

    (tmp_path / "models/cifar10_resnet20_relu_seed0/robustness/pgd-50-10-true.json").unlink()
    missing = run(tmp_path, study, "--dry-run").stdout
    assert "cifar10_resnet20_relu_seed0/robustness/pgd-50-10-true.json" in missing
    assert "rule train" not in missing and "swish_seed0 --attack" not in missing
