"""The attacks of the study: everything that is known about each by name, and the settings of one.

To add an attack: a file with a `BatchAttack`, and an entry in ATTACKS. Nothing here needs
TensorFlow: commands check what they were given before they import it.
"""

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from kaf_study import InputError

if TYPE_CHECKING:
    from kaf_study.attacks.classifier import CompiledClassifier
    from kaf_study.attacks.loop import BatchAttack

LABELS = ("true", "predicted")
DEFAULT_DATASET = "cifar10"
DEFAULT_N = 1000

# What is beyond these is a slip of the keyboard: Square is published with up to 10,000 queries.
MOST_STEPS = 100_000
MOST_RESTARTS = 10_000
MOST_IMAGES_TOGETHER = 10_000
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Attack:
    """One attack. alpha, steps and restarts are what it does unless told otherwise.

    label: its name in tables and figures.
    implementation: where it is, or what it consists of, as records tell it.
    alpha: step size in the units of x; None: it has none, or chooses its own.
    most_steps: beyond which steps are refused.
    made_by: "module.Class" in kaf_study.attacks, called with the classifier, epsilon, steps, alpha
        if it has one, and `arguments`.
    is_random: if not, a restart or a seed would change nothing.
    needs_gradient: if not, it sees the logits alone.
    labels: the protocols it exists for.
    classes: how many the model must have. is_targeted: a restart is one of its other classes.
    points_after: its points beyond `steps`, of a final search or of a look before the long one.
    members: of a suite, which has no class of its own: (name, settings that differ from its own).
    """

    label: str
    implementation: str
    made_by: str = ""
    alpha: float | None = None
    steps: int | None = None
    restarts: int | None = 1
    most_steps: int = MOST_STEPS
    is_random: bool = True
    needs_gradient: bool = True
    labels: tuple[str, ...] = ("true",)
    classes: int = 2
    is_targeted: bool = False
    points_after: int = 0
    arguments: dict = field(default_factory=dict)
    members: tuple[tuple[str, dict], ...] = ()


ATTACKS = {
    "pgd": Attack(
        "PGD",
        "kaf_study.attacks.pgd: the steps of IBM ART ProjectedGradientDescentTensorFlowV2",
        "pgd.PGD",
        alpha=2 / 255,
        steps=50,
        restarts=10,
        labels=LABELS,
    ),
    "fgsm": Attack(
        "FGSM",
        "kaf_study.attacks.pgd: one step of IBM ART's PGD from the clean image",
        "pgd.FGSM",
        steps=1,
        most_steps=1,
        is_random=False,
        labels=LABELS,
    ),
    "apgd-ce": Attack(
        "APGD-CE",
        "kaf_study.attacks.apgd",
        "apgd.APGD",
        steps=100,
        arguments={"loss": "ce"},
    ),
    "apgd-dlr": Attack(
        "APGD-DLR",
        "kaf_study.attacks.apgd",
        "apgd.APGD",
        steps=100,
        classes=3,
        arguments={"loss": "dlr"},
    ),
    "apgd-t": Attack(
        "APGD-T",
        "kaf_study.attacks.apgd, targeted DLR",
        "apgd.APGD",
        steps=100,
        restarts=9,  # restart r: r-th likeliest other class
        classes=4,
        is_targeted=True,
        arguments={"loss": "targeted dlr"},
    ),
    "margin-t": Attack(
        "margin-T",
        "kaf_study.attacks.rapid: a short look at each target, a long one where it came near",
        "rapid.TwoLooks",
        steps=100,  # of the long look
        restarts=3,  # as in apgd-t
        is_targeted=True,
        points_after=13,
    ),
    "fab-t": Attack(
        "FAB-T",
        "kaf_study.attacks.fab",
        "fab.FAB",
        steps=100,
        restarts=9,  # as in apgd-t
        is_random=False,
        is_targeted=True,
        points_after=3,
    ),
    "square": Attack(
        "Square",
        "kaf_study.attacks.square",
        "square.Square",
        steps=1000,  # queries
        needs_gradient=False,
    ),
    "square-5000": Attack(
        "Square",
        "kaf_study.attacks.square, the first half of the schedule for 10,000 queries",
        "square.Square",
        steps=5000,
        most_steps=10_000,
        needs_gradient=False,
        arguments={"scheduled": 10_000},
    ),
    "deepfool": Attack(
        "DeepFool",
        "kaf_study.attacks.deepfool (L2), its points cut to the L-inf ball",
        "deepfool.DeepFool",
        steps=50,
        is_random=False,
    ),
    "deepfool-linf": Attack(
        "L-inf DeepFool",
        "kaf_study.attacks.deepfool (L-inf), its points cut to the L-inf ball",
        "deepfool.DeepFool",
        steps=50,
        is_random=False,
        arguments={"norm": math.inf},
    ),
    "cw": Attack(
        "Carlini-Wagner",
        "kaf_study.attacks.carlini_wagner (L-inf) at tau = epsilon",
        "carlini_wagner.CarliniWagner",
        steps=40,
        is_random=False,
    ),
    # Its few departures from the authors' code: README.md, here.
    "autoattack": Attack(
        "AutoAttack",
        "standard AutoAttack (Croce & Hein 2020), each member on what the ones before left",
        restarts=None,
        members=(("apgd-ce", {}), ("apgd-t", {}), ("fab-t", {}), ("square-5000", {})),
    ),
    "rapid": Attack(
        "rapid",
        "not AutoAttack: PGD, then each of three targets, on what the ones before left standing",
        restarts=None,
        members=(("pgd", {"steps": 10, "restarts": 1}), ("margin-t", {})),
    ),
    "suite": Attack(
        "suite",
        "each member on what the ones before left standing",
        restarts=None,
        members=(("apgd-ce", {}), ("apgd-t", {}), ("square", {}), ("pgd", {})),
    ),
}


@dataclass(frozen=True)
class AttackSettings:
    """What decides the verdict on an image. Defaults: PGD-50-10 at 8/255, as in the reference.

    What is None is the attack's own (`ATTACKS`). steps are queries for "square" and "square-5000";
    restarts are target classes for "apgd-t", "fab-t" and "margin-t". The members of "autoattack",
    "rapid" and "suite" run one after the other, each on what the ones before left standing. Labels
    "predicted" exist for "pgd" and "fgsm".
    """

    attack: str = "pgd"
    epsilon: float = 8 / 255  # L-inf radius, images in [0, 1]
    alpha: float | None = None  # step size of pgd
    steps: int | None = None
    restarts: int | None = None
    labels: str = "true"
    seed: int = 0

    def __post_init__(self):
        check_choice("attack", self.attack, ATTACKS)
        check_choice("labels", self.labels, LABELS)
        own = ATTACKS[self.attack]
        if self.labels not in own.labels:
            raise InputError(
                f"labels {self.labels} only exist for {_those_with(self.labels)}, to compare with "
                f"published figures; attack {self.attack} needs labels {' or '.join(own.labels)}"
            )
        check_between("epsilon", self.epsilon, "--eps", least_is_in=True)
        for name in ("alpha", "steps", "restarts"):
            default, given = getattr(own, name), getattr(self, name)
            if default is None and given is not None:
                raise InputError(
                    f"the attack {self.attack} chooses its own {name}; got {given:g}, leave it out"
                )
            object.__setattr__(self, name, default if given is None else given)
        if self.alpha is not None:
            check_between("alpha", self.alpha, "--step", least_is_in=False)
        if not own.members:
            check_count(f"steps of {self.attack}", self.steps, 1, own.most_steps)
            most = MOST_RESTARTS if own.is_random or own.is_targeted else 1
            check_count(f"restarts of {self.attack}", self.restarts, 1, most)
        check_count("seed", self.seed, 0, MOST_SEED)
        if self.seed and not own.is_random:
            raise InputError(f"{self.attack} draws nothing at random; leave the seed out")
        for name, kind in (
            ("epsilon", float),
            ("alpha", float),
            ("steps", int),
            ("restarts", int),
            ("seed", int),
        ):  # NumPy's numbers do not go into JSON.
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def implementation(self) -> str:
        return ATTACKS[self.attack].implementation

    @property
    def is_random(self) -> bool:
        return ATTACKS[self.attack].is_random

    @property
    def needs_gradient(self) -> bool:
        return any(ATTACKS[member.attack].needs_gradient for member in self.members)

    @property
    def members(self) -> tuple["AttackSettings", ...]:
        """The attacks that are run, in their order: a suite's, or this one."""
        return tuple(
            AttackSettings(
                name,
                self.epsilon,
                seed=self.seed if ATTACKS[name].is_random else 0,
                **changed,
            )
            for name, changed in ATTACKS[self.attack].members
        ) or (self,)

    def fitted(self, classes: int) -> "AttackSettings":
        """A targeted attack, left at its number of targets, aims at no more than there are."""
        own = ATTACKS[self.attack]
        if not own.is_targeted or self.restarts != own.restarts:
            return self
        return replace(self, restarts=max(1, min(int(own.restarts or 1), classes - 1)))

    def members_for(self, classes: int) -> tuple["AttackSettings", ...]:
        """`members`, fitted to a model of so many classes."""
        return tuple(member.fitted(classes) for member in self.members)

    def made_for(self, classifier: "CompiledClassifier") -> "BatchAttack":
        """This attack (no suite) on a `CompiledClassifier`, or why its model cannot be attacked so.

        Raises:
            InputError: the model has too few classes.
        """
        own, classes = ATTACKS[self.attack], classifier.classes
        if classes < own.classes:
            raise InputError(
                f"{self.attack} needs at least {own.classes} classes, the model has {classes}; "
                "choose apgd-ce or pgd"
            )
        if own.is_targeted and int(self.restarts or 0) > classes - 1:
            raise InputError(
                f"{self.attack} aims at one other class per restart, so the model's {classes} "
                f"classes allow {classes - 1} restarts; got {self.restarts}"
            )
        module, name = own.made_by.split(".")
        make = getattr(importlib.import_module(f"kaf_study.attacks.{module}"), name)
        step = {} if self.alpha is None else {"alpha": self.alpha}
        return make(classifier, epsilon=self.epsilon, steps=self.steps, **step, **own.arguments)

    def stem(self, n: int, dataset: str | None = None) -> str:
        """Name of the result files for n images; see the first lines of result_files.py."""
        parts = [self.attack, *self._counts(), self.labels]
        if dataset not in (None, DEFAULT_DATASET):
            parts.append(dataset)
        if n != DEFAULT_N:
            parts.append(f"n{n}")
        for name, value, default in (
            ("eps", self.epsilon, 8 / 255),
            ("step", self.alpha, ATTACKS[self.attack].alpha),
        ):
            if value is not None and not math.isclose(value, default or 0, rel_tol=1e-9):
                parts.append(f"{name}{value * 255:.10g}")
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)

    def _counts(self):
        return [str(count) for count in (self.steps, self.restarts) if count is not None]

    def protocol(self, n: int, dataset: str | None = None) -> str:
        """The protocol in words, for tables."""
        attack = "-".join([ATTACKS[self.attack].label, *self._counts()])
        step = "" if self.alpha is None else f"step {self.alpha * 255:g}/255, "
        return (
            f"{attack}, eps {self.epsilon * 255:g}/255, {step}{self.labels} labels, first {n} "
            f"{dataset + ' ' if dataset else ''}test images, seed {self.seed}"
        )


def _those_with(labels):
    return " and ".join(name for name, attack in ATTACKS.items() if labels in attack.labels)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_between(name: str, value: float, option: str, *, least_is_in: bool) -> None:
    """A radius or step size, in the units of x, must lie in [0, 1], or in (0, 1]."""
    if not (0 <= value <= 1 and (least_is_in or value)):
        bracket, start = ("[", "from") if least_is_in else ("(", "above")
        allowed = f"{bracket}0, 1] ({option} {start} 0 to 255)"
        raise InputError(f"{name} must lie in {allowed}, got {value * 255:g}/255")


def check_count(name: str, value: int, least: int, most: int) -> None:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (is_whole and least <= value <= most):
        allowed = f"{least}" if least == most else f"a whole number from {least} to {most}"
        raise InputError(f"{name} must be {allowed}, got {value}")
