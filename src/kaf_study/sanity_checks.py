"""Is an evaluation to be trusted? What Carlini et al. 2019 say must hold, held against one model.

"On evaluating adversarial robustness", arXiv 1902.06705, section 5: an attack that does not behave
as attacks must is not measuring robustness, whatever figure it gives. A model that hides its
gradients (saturated, discontinuous, randomised) fails some of these checks; it is not robust, it is
hard to attack by gradients.

    report = check_model(model, x[:64], y[:64])
    print(*report.lines(), sep="\\n")

Each check is a function of the few runs they share (`_Runs`), and says in one line what it saw.
With n images no figure is sharper than one image, so one image (or 2 % of n, if that is more) is
the tolerance wherever two attacks or two radii are compared: an attack is a search, not a proof.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import tensorflow as tf

from kaf_study import InputError
from kaf_study.attacks.classifier import cross_entropy, likeliest_other
from kaf_study.attacks.registry import AttackSettings
from kaf_study.evaluation import (
    Execution,
    Subject,
    checked_images,
    clean_logits,
    compiled,
    evaluate,
)
from kaf_study.saved_models import HOW_ATTACKED, PROBABILITIES, SQUASHED

RADII = (0, 1, 2, 4, 8, 16, 32)  # of the curve, in 255ths
ITERATIONS = (1, 5, 10, 20, 50, 100)
RESTARTS = 5
CHECKED = AttackSettings(restarts=RESTARTS)
NOISE_DRAWS = 100
FAB_STEPS = 20  # towards each target, of the 100 that it has in AutoAttack
SMALL_STEP = 1 / 255  # over which the margin must change as its gradient says
PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


@dataclass(frozen=True)
class Check:
    """status: "pass", "fail" or "not run"; text: one line; figures: what was measured (JSON)."""

    name: str
    status: str
    text: str
    figures: dict = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """The checks of one model; curve: {"eps": 255ths, "accuracy": fractions, "n": images}."""

    checks: tuple
    curve: dict

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if check.status == FAIL]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
        if self.passed:
            return "no sign of masked gradients"
        return f"NOT to be trusted: fails {', '.join(self.failed)}"

    def lines(self) -> list[str]:
        """For printing: one line per check, then the verdict."""
        width = max(len(check.name) for check in self.checks)
        shown = {PASS: "pass", FAIL: "FAIL", NOT_RUN: "----"}
        return [f"{shown[c.status]}  {c.name:{width}}  {c.text}" for c in self.checks] + [
            f"=> {self.verdict}"
        ]

    def as_dict(self) -> dict:
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "checks": [asdict(check) for check in self.checks],
            "curve": self.curve,
        }


def check_model(
    model: Callable,
    x: np.ndarray,
    y: np.ndarray,
    settings: AttackSettings = CHECKED,
    *,
    queries: int = 1000,
    batch_size: int = 128,
    classes: int | None = None,
    transfer_from: Sequence[tuple[str, Callable]] = (),
) -> CheckReport:
    """Run all checks on a few images.

    Args:
        model: Keras model, or callable f(x, training=False).
        x: images (N, H, W, C) in [0, 1], 64 or so; y: true labels (N,).
        settings: of the PGD that is checked.
        queries: of the Square attack.
        classes: the number of outputs that is expected, where known.
        transfer_from: pairs (name, model); examples found on them are tried on this one.

    Raises:
        InputError: for what `evaluate` refuses, of the models of `transfer_from` too; if the
            settings are not those of a PGD with true labels; if no image is classified correctly.
    """
    if (settings.attack, settings.labels) != ("pgd", "true"):
        given = f"{settings.attack} with labels {settings.labels}"
        raise InputError(f"the checks are of pgd with true labels, got {given}")
    x, y = checked_images(x, y)
    execution = Execution(batch_size)
    runs = _Runs(model, x, y, settings, execution, classes, tuple(transfer_from), queries)
    if not runs.is_clean.any():
        raise InputError(
            f"none of the {len(runs.x)} images is classified correctly, so there is nothing to "
            "check; give a model trained on this data set, or more images (--n)"
        )
    runs.classifier.check_gradient(x[:8], y[:8])
    transferred = runs.transferred  # first: what does not fit is refused before the long attacks
    checks = (
        better_than_chance(runs),
        outputs_are_logits(runs),
        nothing_is_optimised(runs),
        the_same_twice(runs),
        gradients_are_not_zero(runs),
        loss_follows_its_gradient(runs),
        nothing_changes_at_radius_0(runs),
        nothing_stands_at_radius_128(runs),
        falls_with_the_radius(runs),
        falls_with_iterations(runs),
        falls_with_restarts(runs),
        *beats_the_weaker(runs),
        *transfers(runs, transferred),
    )
    curve = {
        "eps": list(RADII),
        "accuracy": [float(stands.mean()) for stands in runs.curve],
        "n": len(runs.x),
    }
    return CheckReport(checks, curve)


@dataclass
class _Runs:
    """The attacks that the checks look at, each run once. `stands` is (N,) bool everywhere."""

    model: Callable
    x: np.ndarray
    y: np.ndarray
    settings: AttackSettings
    execution: Execution
    classes: int | None
    transfer_from: tuple
    queries: int

    def stands(self, settings):
        """Which images are correct when clean and stand under an attack."""
        result = evaluate(self.classifier, self.x, self.y, settings, execution=self.execution)
        return np.asarray(result.is_robust)

    def under(self, attack, steps=None):
        """`stands`, for another attack at the same radius."""
        settings = AttackSettings(attack, self.settings.epsilon, steps=steps)
        if settings.is_random:
            settings = replace(settings, seed=self.settings.seed)
        return self.stands(settings)

    def under_pgd(self, **changed):
        return self.stands(replace(self.settings, **changed))

    @cached_property
    def compiled(self):
        """What all attacks are run on, compiled once, and what its outputs are."""
        return compiled(self.model, self.x, self.y, self.classes, self.batch_size)

    @property
    def classifier(self):
        return self.compiled[0]

    @cached_property
    def clean_logits(self):
        return clean_logits(self.classifier, self.x, self.batch_size)

    @cached_property
    def is_clean(self):
        return self.clean_logits.argmax(axis=-1) == self.y

    @cached_property
    def pgd(self):
        """The attack in question."""
        return self.under_pgd()

    @cached_property
    def square(self):
        return self.under("square", self.queries)

    @cached_property
    def rapid(self):
        return self.under("rapid")

    @cached_property
    def one_restart(self):
        """One restart from starts that the others do not use."""
        return self.under_pgd(restarts=1, seed=self.settings.seed + 1)

    @cached_property
    def curve(self):
        """At each radius, with as many steps of a size that crosses the ball as often."""
        return [
            self.under_pgd(epsilon=r / 255, alpha=max(r, 0.1) / 4 / 255, steps=20, restarts=1)
            for r in RADII
        ]

    @cached_property
    def iterations(self):
        """What the iterate after 1, 5, ... steps of one run does: {iterations: stands (N,)}."""
        numbers, seed = np.arange(len(self.x)), self.settings.seed
        found = {}
        for steps in ITERATIONS:
            attack = replace(self.settings, steps=steps).made_for(self.classifier)
            run = attack.run(
                self.x,
                self.y,
                numbers,
                restart=1,
                seed=seed,
                batch_size=self.batch_size,
                judge_every=False,
            )
            found[steps] = self.is_clean & ~run.fell
        return found

    def under_noise(self):
        """Uniform in the ball, and its corners, by turns; the first that fools fells an image."""
        generator = np.random.default_rng(self.settings.seed)
        stands = self.is_clean.copy()
        for draw in range(NOISE_DRAWS):
            noise = generator.uniform(-1, 1, self.x.shape)
            noise = self.settings.epsilon * (np.sign(noise) if draw % 2 else noise)
            stands &= self.predicted(np.clip(self.x + noise, 0, 1)) == self.y
        return stands

    @property
    def transferred(self):
        """{name of another model: stands (N,) under the examples found on it}."""
        found = {}
        for name, model in self.transfer_from:
            try:
                x_adv = evaluate(
                    model,
                    self.x,
                    self.y,
                    replace(self.settings, restarts=1),
                    subject=Subject(classes=self.classes),
                    execution=self.execution,
                ).x_adv
            except InputError as error:
                raise InputError(f"--transfer-from {name!r}: {error}") from None
            found[name] = self.is_clean & (self.predicted(x_adv) == self.y)
        return found

    def in_batches(self, function, *arrays):
        """The arrays (N, ...) that `function` gives, called on `batch_size` images at a time."""
        size = self.batch_size
        parts = [
            function(*(array[i : i + size] for array in arrays))
            for i in range(0, len(self.x), size)
        ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def predicted(self, x):
        return self.classifier.predict(x.astype("float32"), self.batch_size).argmax(axis=-1)

    @property
    def batch_size(self):
        return self.execution.batch_size

    @property
    def tolerance(self):
        """Images by which two attacks may differ."""
        return max(1, int(0.02 * len(self.x)))


def _check(name, passed, text, **figures):
    return Check(name, PASS if passed else FAIL, text, figures)


def _percent(stands):
    return f"{stands.mean():.1%}"


# --------------------------------------------------------------------------- the model


def better_than_chance(runs: _Runs) -> Check:
    """Of a network that guesses nothing can be learned: 3 standard deviations above is asked."""
    n, chance = len(runs.x), 1 / runs.classifier.classes
    least = chance + 3 * np.sqrt(chance * (1 - chance) / n)
    accuracy = float(runs.is_clean.mean())
    text = f"{accuracy:.1%} correct when clean, chance is {chance:.1%}"
    if accuracy <= least:
        text += " (was it trained on these classes, in this pixel range? --input)"
    return _check("better than chance", accuracy > least, text, accuracy=accuracy)


def outputs_are_logits(runs: _Runs) -> Check:
    """A softmax that cannot be taken off must at least not be saturated."""
    name = "outputs"
    _, kind = runs.compiled
    if kind not in (PROBABILITIES, SQUASHED):
        return _check(name, True, f"attacked {HOW_ATTACKED[kind]}")
    (p,) = runs.in_batches(lambda x: [np.asarray(runs.model(x, training=False))], runs.x)
    saturated = float((p.max(axis=-1) >= 1).mean())
    text = f"{kind} outputs whose logits are out of reach; {saturated:.1%} of them exactly 1"
    return _check(name, saturated <= 0.01, text, saturated=saturated)


def nothing_is_optimised(runs: _Runs) -> Check:
    """Croce & Hein's "optimization at test time": gradients that the forward pass takes itself.

    Attacks then follow the gradient of a descent, and may be misled by it.
    """
    count = gradients_in_forward_pass(runs.classifier.model, runs.x.shape[1:])
    text = f"{count or 'no'} operations of its own gradients in the forward pass"
    return _check("no optimisation at test time", not count, text, operations=count)


def gradients_in_forward_pass(model: Callable, shape: tuple[int, ...]) -> int:
    """How many operations of a model's graph are gradients that TensorFlow took in it.

    Args:
        model: f(x, training=False). shape: of one image.
    """

    @tf.function(input_signature=[tf.TensorSpec((None, *shape), tf.float32)])
    def forward(x):
        return model(x, training=False)

    graph = forward.get_concrete_function().graph.as_graph_def()
    functions = {f.signature.name: f.node_def for f in graph.library.function}
    seen: set[str] = set()
    waiting, count = [graph.node], 0
    while waiting:
        for node in waiting.pop():
            # TensorFlow's names for what GradientTape.gradient and tf.gradients make
            count += bool(re.match(r"(.*/)?(gradient_tape|gradients(_\d+)?)/", node.name))
            called = {node.op} | {
                function.name
                for value in node.attr.values()
                for function in (value.func, *value.list.func)
            }
            waiting += [functions[name] for name in called & (functions.keys() - seen)]
            seen |= called
    return count


def the_same_twice(runs: _Runs) -> Check:
    """The same seed, the same figure; and the model gives the same outputs for the same images."""
    again = runs.classifier.predict(runs.x, runs.batch_size)
    scale = np.abs(runs.clean_logits).max() + 1e-12
    moved = float(np.abs(again - runs.clean_logits).max() / scale)
    second = runs.under_pgd(restarts=1, seed=runs.settings.seed + 1)
    differing = int((second != runs.one_restart).sum())
    text = f"{differing} verdicts differ; logits by {moved:.1e} of the largest"
    passed = differing == 0 and moved < 1e-4
    return _check("same figure twice", passed, text, differing=differing, logits_moved=moved)


def gradients_are_not_zero(runs: _Runs) -> Check:
    """Float32 saturation, or activations that are flat: nothing to follow (allowed: 1 %)."""
    *_, gradient = runs.in_batches(runs.classifier.differentiable(cross_entropy), runs.x, runs.y)
    is_zero = (gradient == 0).reshape(len(runs.x), -1)
    images, pixels = float(is_zero.all(axis=1).mean()), float(is_zero.mean())
    text = f"{images:.1%} of the images have none; {pixels:.1%} of all pixels"
    return _check("input gradients", images <= 0.01, text, images=images, pixels=pixels)


def loss_follows_its_gradient(runs: _Runs) -> Check:
    """Over one grey level the margin changes as the gradient says, wrong by less than that itself.

    A network that is differentiable nearly everywhere, a ReLU network included, is nearly linear
    over such a step (median error of trained ones: 0 to 10 %); k-WTA jumps, since other units win
    (several times the expected change).
    """
    y, n = runs.y, len(runs.x)
    other = likeliest_other(runs.clean_logits, y)

    def margins(x):
        z = runs.classifier.predict(x.astype("float32"), runs.batch_size).astype("float64")
        return z[np.arange(n), y] - z[np.arange(n), other]

    (gradients,) = runs.in_batches(
        lambda x, classes: [runs.classifier.class_gradients(x, classes)],
        runs.x,
        np.stack([y, other], axis=1),
    )
    gradient = gradients[:, 0] - gradients[:, 1]
    step = np.where(runs.x < 0.5, SMALL_STEP, -SMALL_STEP) * (gradient != 0)  # stays in [0, 1]
    expected = (gradient * step).reshape(n, -1)
    # Only pixels that pull the same way: a sum of both signs would cancel to rounding.
    step = np.where(expected.reshape(step.shape) < 0, step, 0)
    expected = np.minimum(expected, 0).sum(axis=1)
    changed = margins(runs.x + step) - margins(runs.x)
    error = float(np.median(np.abs(changed - expected) / (np.abs(expected) + 1e-12)))
    text = f"over {SMALL_STEP * 255:g}/255 the margin moves as predicted, +- {error:.0%} (median)"
    return _check("local linearity", error <= 1, text, median_relative_error=error)


# --------------------------------------------------------------------------- the attack


def nothing_changes_at_radius_0(runs: _Runs) -> Check:
    stands = runs.under_pgd(epsilon=0.0, steps=2, restarts=1)
    differing = int((stands != runs.is_clean).sum())
    text = f"{_percent(runs.is_clean)} clean, {_percent(stands)} at 0; {differing} images differ"
    return _check("eps 0", differing == 0, text, differing=differing)


def nothing_stands_at_radius_128(runs: _Runs) -> Check:
    """Within half of the pixel range any image can be made grey."""
    alpha = min(1.0, (runs.settings.alpha or 0) * (128 / 255) / max(runs.settings.epsilon, 1e-9))
    stands = runs.under_pgd(epsilon=128 / 255, alpha=alpha, restarts=2)
    text = f"{_percent(stands)} stand at 128/255"
    return _check("eps 128", not stands.any(), text, accuracy=float(stands.mean()))


def falls_with_the_radius(runs: _Runs) -> Check:
    counts = [int(stands.sum()) for stands in runs.curve]
    rise = max(b - a for a, b in pairwise(counts))
    shown = ", ".join(f"{r}: {s.mean():.0%}" for r, s in zip(RADII, runs.curve, strict=True))
    passed = rise <= runs.tolerance
    return _check("falls with eps", passed, shown, standing=counts, largest_rise=rise)


def falls_with_iterations(runs: _Runs) -> Check:
    """Of the last iterate, as ART judges; judged at every iterate it could not but fall."""
    counts = [int(stands.sum()) for stands in runs.iterations.values()]
    rise = max(b - a for a, b in pairwise(counts))
    last = abs(counts[-1] - counts[-2])
    shown = ", ".join(f"{k}: {s.mean():.0%}" for k, s in runs.iterations.items())
    # 1 point, or one image where that is more
    passed = rise <= runs.tolerance and last <= max(1, 0.01 * len(runs.x))
    return _check("falls with iterations", passed, shown, standing=counts, last_change=last)


def falls_with_restarts(runs: _Runs) -> Check:
    """The restarts against one from another seed, which they could well miss."""
    missed = int((runs.pgd & ~runs.one_restart).sum())
    text = (
        f"1: {_percent(runs.one_restart)}, {runs.settings.restarts}: {_percent(runs.pgd)}; "
        f"{missed} fell to the one alone"
    )
    return _check("falls with restarts", missed <= runs.tolerance, text, missed=missed)


def as_strong_as(runs: _Runs, name: str, stands: np.ndarray, than: str = "PGD") -> Check:
    """PGD, or `rapid`, fells what a weaker attack fells."""
    standing = runs.rapid if than == "rapid" else runs.pgd
    missed = int((standing & ~stands).sum())
    text = f"{than} {_percent(standing)}, {name} {_percent(stands)}; {missed} fell to {name} alone"
    passed = missed <= runs.tolerance
    title = f"rapid beats {name}" if than == "rapid" else f"beats {name}"
    return _check(title, passed, text, missed=missed, accuracy=float(stands.mean()))


def beats_the_weaker(runs: _Runs) -> list[Check]:
    square = f"Square {runs.queries}"
    return [
        as_strong_as(runs, "FGSM", runs.under("fgsm")),
        as_strong_as(runs, f"noise x{NOISE_DRAWS}", runs.under_noise()),
        as_strong_as(runs, square, runs.square),
        as_strong_as(runs, square, runs.square, than="rapid"),
        as_strong_as(runs, f"FAB {FAB_STEPS}", runs.under("fab-t", FAB_STEPS), than="rapid"),
    ]


def transfers(runs: _Runs, transferred: dict[str, np.ndarray]) -> list[Check]:
    """Examples found on other models."""
    if not transferred:
        text = "no other model was given (--transfer-from)"
        return [Check("beats transfer", NOT_RUN, text)]
    return [
        as_strong_as(runs, f"transfer from {name}", stands) for name, stands in transferred.items()
    ]
