"""The attacks of the study by name, and the settings that decide a verdict.

Nothing here needs TensorFlow: commands check what they were given before they import it.
"""

import math
from dataclasses import dataclass

import numpy as np

from kaf_study import InputError

LABELS = ("true", "predicted")
DEFAULT_DATASET = "cifar10"
DEFAULT_N = 1000

# What each attack does unless told otherwise. alpha is None where the attack has no fixed step.
DEFAULTS = {
    "pgd": {"alpha": 2 / 255, "steps": 50, "restarts": 10},
    "fgsm": {"alpha": None, "steps": 1, "restarts": 1},
    "apgd-ce": {"alpha": None, "steps": 100, "restarts": 1},
    "apgd-dlr": {"alpha": None, "steps": 100, "restarts": 1},
    "apgd-t": {"alpha": None, "steps": 100, "restarts": 9},  # restart r: r-th likeliest other class
    "square": {"alpha": None, "steps": 1000, "restarts": 1},  # steps: queries
    "deepfool": {"alpha": None, "steps": 50, "restarts": 1},
    "cw": {"alpha": None, "steps": 40, "restarts": 1},
    "suite": {"alpha": None, "steps": None, "restarts": None},  # those of its members
}
ATTACKS = tuple(DEFAULTS)
SUITE = ("apgd-ce", "apgd-t", "square", "pgd")
ONE_RESTART = ("fgsm", "deepfool", "cw")  # nothing in them is random


@dataclass(frozen=True)
class AttackSettings:
    """What decides the verdict on an image. Defaults: PGD-50-10 at 8/255, as in the reference.

    What is None is the attack's own (`DEFAULTS`). steps are queries for "square"; restarts are
    target classes for "apgd-t". The members of a "suite" (`SUITE`) run with their defaults, each
    on what the ones before left standing. Labels "predicted" exist for "pgd" and "fgsm".
    """

    attack: str = "pgd"
    epsilon: float = 8 / 255  # L-inf radius, images in [0, 1]
    alpha: float | None = None  # step size of pgd
    steps: int | None = None
    restarts: int | None = None
    labels: str = "true"
    seed: int = 0

    def __post_init__(self):
        if self.attack not in ATTACKS:
            raise InputError(f"attack must be one of {', '.join(ATTACKS)}, got {self.attack!r}")
        if self.labels not in LABELS:
            raise InputError(f"labels must be one of {', '.join(LABELS)}, got {self.labels!r}")
        if self.labels == "predicted" and self.attack not in ("pgd", "fgsm"):
            raise InputError(
                f"labels predicted only exist for pgd and fgsm, to compare with published figures; "
                f"attack {self.attack} needs labels true"
            )
        if not 0 <= self.epsilon <= 1:
            raise InputError(
                f"epsilon must lie in [0, 1] (--eps from 0 to 255), got {self.epsilon * 255:g}/255"
            )
        for name, default in DEFAULTS[self.attack].items():
            given = getattr(self, name)
            if default is None and given is not None:
                raise InputError(
                    f"the attack {self.attack} chooses its own {name}; got {given:g}, leave it out"
                )
            object.__setattr__(self, name, default if given is None else given)
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise InputError(
                "alpha must lie in (0, 1] (--step above 0, up to 255), "
                f"got {self.alpha * 255:g}/255"
            )
        check_count("seed", self.seed, 0)
        if self.attack != "suite":
            check_count("steps", self.steps, 1)
            check_count("restarts", self.restarts, 1)
        if self.attack in ONE_RESTART and self.restarts != 1:
            raise InputError(f"{self.attack} has nothing random to restart; got {self.restarts}")
        if self.attack == "fgsm" and self.steps != 1:
            raise InputError(f"fgsm makes one step, got {self.steps}; choose pgd for more")
        # NumPy's numbers do not go into JSON.
        for name, kind in (
            ("epsilon", float),
            ("alpha", float),
            ("steps", int),
            ("restarts", int),
            ("seed", int),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def members(self):
        """The attacks that are run, in their order: a suite's, or this one."""
        if self.attack != "suite":
            return (self,)
        return tuple(AttackSettings(name, self.epsilon, seed=self.seed) for name in SUITE)

    def stem(self, n, dataset=None):
        """Name of the result files for n images; see the first lines of kaf_study.evaluation."""
        parts = [self.attack, *self._counts(), self.labels]
        if dataset not in (None, DEFAULT_DATASET):
            parts.append(dataset)
        if n != DEFAULT_N:
            parts.append(f"n{n}")
        for name, value, default in (
            ("eps", self.epsilon * 255, 8),
            ("step", 2 if self.alpha is None else self.alpha * 255, 2),
            ("seed", self.seed, 0),
        ):
            if not math.isclose(value, default, rel_tol=1e-9):
                parts.append(f"{name}{value:.10g}")
        return "-".join(parts)

    def _counts(self):
        return [str(count) for count in (self.steps, self.restarts) if count is not None]

    def protocol(self, n, dataset=None):
        """The protocol in words, for tables."""
        step = "" if self.alpha is None else f"step {self.alpha * 255:g}/255, "
        return (
            f"{'-'.join([self.attack.upper(), *self._counts()])}, eps {self.epsilon * 255:g}/255, "
            f"{step}{self.labels} labels, first {n} "
            f"{dataset + ' ' if dataset else ''}test images, seed {self.seed}"
        )


def check_count(name, value, least):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value}")
