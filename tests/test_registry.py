"""The settings of an attack: what it does unless told otherwise, its name, what is refused."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from kaf_study import InputError
from kaf_study.attacks import registry
from kaf_study.attacks.registry import (
    ATTACKS,
    MOST_RESTARTS,
    MOST_SEED,
    MOST_STEPS,
    AttackSettings,
    check_between,
    check_count,
)


def test_defaults_are_the_published_attacks():
    pgd = AttackSettings()
    assert (pgd.attack, pgd.labels, pgd.seed) == ("pgd", "true", 0)
    assert (pgd.epsilon, pgd.alpha) == (8 / 255, 2 / 255)
    counts = {name: (AttackSettings(name).steps, AttackSettings(name).restarts) for name in ATTACKS}
    assert counts == {
        "pgd": (50, 10),
        "fgsm": (1, 1),
        "apgd-ce": (100, 1),
        "apgd-dlr": (100, 1),
        "apgd-t": (100, 9),
        "margin-t": (100, 3),
        "fab-t": (100, 9),
        "square": (1000, 1),
        "square-5000": (5000, 1),
        "deepfool": (50, 1),
        "deepfool-linf": (50, 1),
        "cw": (40, 1),
        "autoattack": (None, None),
        "rapid": (None, None),
        "suite": (None, None),
    }


def test_the_readme_describes_every_attack():
    readme = Path(registry.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in readme.splitlines() if line.startswith("| `")]
    assert set(re.findall("`(.+?)`", " ".join(rows))) == {"--attack", *ATTACKS}


def test_a_suite_runs_its_members_with_their_defaults():
    members = AttackSettings("suite", 0.1, seed=3).members
    assert members == tuple(
        AttackSettings(name, 0.1, seed=3) for name in ("apgd-ce", "apgd-t", "square", "pgd")
    )
    alone = AttackSettings("square", steps=7)
    assert alone.members == (alone,)


def test_a_suite_can_change_what_its_members_do(monkeypatch):
    changed = replace(ATTACKS["suite"], members=(("fgsm", {}), ("square", {"steps": 5000})))
    monkeypatch.setitem(ATTACKS, "suite", changed)
    fgsm, square = AttackSettings("suite", seed=4).members
    assert (fgsm.seed, square.seed, square.steps) == (0, 4, 5000)


def test_a_targeted_attack_aims_at_no_more_classes_than_there_are():
    def targets(settings, *classes):
        return [settings.fitted(n).restarts for n in classes]

    assert targets(AttackSettings("apgd-t"), 2, 4, 9, 10, 100) == [1, 3, 8, 9, 9]
    assert targets(AttackSettings("margin-t"), 1, 2, 3, 4, 10) == [1, 1, 2, 3, 3]
    assert targets(AttackSettings("apgd-t", restarts=5), 2, 10) == [5, 5]  # as asked for
    assert targets(AttackSettings(), 2, 10) == [10, 10]  # random starts
    assert [m.restarts for m in AttackSettings("autoattack").members_for(4)] == [1, 3, 3, 1]


@pytest.fixture
def making(monkeypatch):
    """Function: (settings, classes) -> what the attack of these settings is made with."""

    class Made(dict):
        def __init__(self, classifier, **settings):
            super().__init__(settings)

    module = ModuleType("kaf_study.attacks.made")
    module.Made = Made
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, attack in ATTACKS.items():
        monkeypatch.setitem(ATTACKS, name, replace(attack, made_by="made.Made"))
    return lambda settings, classes: settings.made_for(SimpleNamespace(classes=classes))


def test_an_attack_is_made_with_its_settings_and_a_step_only_if_it_takes_one(making):
    assert making(AttackSettings("pgd", 0.5, 0.25, 3), 2) == {
        "epsilon": 0.5,
        "alpha": 0.25,
        "steps": 3,
    }
    assert making(AttackSettings("apgd-t", 0.5, steps=7), 10) == {
        "epsilon": 0.5,
        "steps": 7,
        "loss": "targeted dlr",
    }
    assert AttackSettings("apgd-t").implementation == "kaf_study.attacks.apgd, targeted DLR"
    assert AttackSettings("fgsm").is_random is False


@pytest.mark.parametrize(
    ("name", "fewest"), [("pgd", 2), ("apgd-ce", 2), ("apgd-dlr", 3), ("apgd-t", 4), ("fab-t", 2)]
)
def test_a_model_needs_as_many_classes_as_the_loss(name, fewest, making):
    settings = AttackSettings(name).fitted(fewest)
    assert making(settings, fewest)["epsilon"] == settings.epsilon
    with pytest.raises(InputError, match=f"{name} needs at least {fewest} classes.* {fewest - 1}"):
        making(settings, fewest - 1)


def test_there_is_one_target_for_each_other_class(making):
    assert making(AttackSettings("apgd-t", restarts=4), 5)
    assert making(AttackSettings("apgd-t", restarts=3), 5)
    with pytest.raises(InputError, match="5 classes allow 4 restarts; got 5"):
        making(AttackSettings("apgd-t", restarts=5), 5)


def test_what_is_given_is_kept_as_plain_numbers():
    settings = AttackSettings("pgd", np.float32(0.5), np.float32(0.25), np.int64(3), np.int32(2))
    assert (settings.epsilon, settings.alpha, settings.steps, settings.restarts) == (
        0.5,
        0.25,
        3,
        2,
    )
    kinds = [type(v) for v in (settings.epsilon, settings.alpha, settings.steps, settings.restarts)]
    assert kinds == [float, float, int, int]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "pgd-50-10-true"),
        ({"labels": "predicted"}, "pgd-50-10-predicted"),
        ({"epsilon": 4 / 255}, "pgd-50-10-true-eps4"),
        ({"epsilon": 0}, "pgd-50-10-true-eps0"),
        (
            {"epsilon": 0.031, "alpha": 0.003, "steps": 40, "restarts": 40},
            "pgd-40-40-true-eps7.905-step0.765",
        ),
        ({"seed": 3}, "pgd-50-10-true-seed3"),
        ({"seed": 12345678901}, "pgd-50-10-true-seed12345678901"),
        ({"attack": "suite"}, "suite-true"),
        ({"attack": "square", "steps": 5}, "square-5-1-true"),
    ],
)
def test_results_of_other_settings_have_other_names(settings, name):
    assert AttackSettings(**settings).stem(1000) == name


def test_results_of_other_images_have_other_names():
    names = [AttackSettings().stem(*of) for of in ((1000, "cifar10"), (256,), (1000, "digits"))]
    assert names == ["pgd-50-10-true", "pgd-50-10-true-n256", "pgd-50-10-true-digits"]


def test_the_protocol_says_what_decides_a_verdict():
    settings = AttackSettings("pgd", 4 / 255, 1 / 255, 20, 3, "predicted", 5)
    assert settings.protocol(64, "digits") == (
        "PGD-20-3, eps 4/255, step 1/255, predicted labels, first 64 digits test images, seed 5"
    )
    assert AttackSettings("square").protocol(9) == (
        "Square-1000-1, eps 8/255, true labels, first 9 test images, seed 0"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attack": "nonsense"}, "attack must be one of pgd, fgsm, .* got 'nonsense'"),
        ({"labels": "maybe"}, "labels must be one of true, predicted, got 'maybe'"),
        ({"attack": "suite", "labels": "predicted"}, "only exist for pgd and fgsm.* labels true"),
        ({"epsilon": 300 / 255}, r"epsilon must lie in \[0, 1\].*got 300/255"),
        ({"epsilon": -1 / 255}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"alpha": 0}, r"alpha must lie in \(0, 1\]"),
        ({"alpha": -2 / 255}, "alpha"),
        ({"alpha": 256 / 255}, "alpha"),
        ({"attack": "square", "alpha": 0.1}, "square chooses its own alpha; got 0.1"),
        ({"attack": "suite", "steps": 5}, "suite chooses its own steps"),
        ({"attack": "suite", "restarts": 5}, "suite chooses its own restarts"),
        ({"steps": 0}, "steps of pgd must be a whole number from 1 to"),
        ({"steps": 1.5}, "steps of pgd"),
        ({"steps": MOST_STEPS + 1}, "steps of pgd"),
        ({"restarts": 0}, "restarts of pgd"),
        ({"restarts": True}, "restarts of pgd"),
        ({"restarts": MOST_RESTARTS + 1}, "restarts of pgd"),
        ({"attack": "fgsm", "steps": 2}, "steps of fgsm must be 1, got 2"),
        ({"attack": "deepfool", "restarts": 2}, "restarts of deepfool must be 1, got 2"),
        ({"attack": "cw", "seed": 1}, "cw draws nothing at random; leave the seed out"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": MOST_SEED + 1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        AttackSettings(**settings)


def test_bounds_themselves_are_allowed():
    AttackSettings(epsilon=0, steps=1, restarts=1, seed=0)
    AttackSettings(epsilon=1, alpha=1, steps=MOST_STEPS, restarts=MOST_RESTARTS, seed=MOST_SEED)
    check_count("n", 3, 3, 3)
    assert np.int64(MOST_SEED) == MOST_SEED and MOST_STEPS >= 10_000  # Square's published queries
    check_between("epsilon", 0, "--eps", least_is_in=True)


def test_settings_are_checked_without_tensorflow():
    program = "import sys, kaf_study.attacks.registry; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
