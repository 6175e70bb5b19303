"""Auto-PGD: projected gradient descent that chooses its own step size (Croce & Hein 2020).

"Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, arXiv 2003.01690: Algorithm 1, with one of four losses to raise:

- `ce`, the cross-entropy;
- `dlr`, the difference of logits ratio (equation 6), which no rescaling of the logits changes: a
  saturated cross-entropy has a gradient of 0, this has not;
- `targeted dlr` (equation 7), towards one other class at a time;
- `margin`, the logit of one other class at a time less the label's: `rapid`'s, not the paper's.

Written here because ART's `AutoProjectedGradientDescent` (1.20.1) has no targeted DLR, counts an
iterate as progress when it beats the best so far (the paper: when it beats the one before), stops
a whole batch at once, and keeps the last iterate, whether or not an earlier one was misclassified.
What it shares with this one (the DLR, the checkpoints) is compared in the tests.
README.md, here, says where the authors' own code differs from their paper, which this follows.
"""

import math

import numpy as np
import tensorflow as tf

from kaf_study.attacks.classifier import (
    CompiledClassifier,
    cross_entropy,
    likeliest_other,
    logit_difference,
)
from kaf_study.attacks.loop import BatchAttack, State, per_image, project, random_starts

MOMENTUM = 0.75  # alpha of the paper, weight of the new step against the last one
PROGRESS = 0.75  # rho: halve the step where fewer than this fraction of the steps made progress


def difference_of_logits_ratio(logits: tf.Tensor, y: tf.Tensor, *_) -> tf.Tensor:
    """(B,): -(z_y - max_{i != y} z_i) / (z_1st - z_3rd); positive where y is not predicted."""
    ranked = tf.sort(logits, direction="DESCENDING")
    z_y = tf.gather(logits, y, batch_dims=1)
    z_other = tf.where(z_y == ranked[:, 0], ranked[:, 1], ranked[:, 0])
    return -(z_y - z_other) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def targeted_difference_of_logits_ratio(
    logits: tf.Tensor, y: tf.Tensor, target: tf.Tensor
) -> tf.Tensor:
    """(B,): -(z_y - z_target) / (z_1st - (z_3rd + z_4th) / 2)."""
    ranked = tf.sort(logits, direction="DESCENDING")
    z_y, z_t = (tf.gather(logits, c, batch_dims=1) for c in (y, target))
    return -(z_y - z_t) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12)


LOSSES = {
    "ce": cross_entropy,
    "dlr": difference_of_logits_ratio,
    "targeted dlr": targeted_difference_of_logits_ratio,
    "margin": logit_difference,
}
TARGETED = ("targeted dlr", "margin")


def checkpoints(steps: int) -> list[int]:
    """Iterations after which the step size may be halved: p_0 = 0, p_1 = 0.22, ... times steps."""
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    return [math.ceil(round(fraction * steps, 9)) for fraction in p if fraction <= 1]


class APGD(BatchAttack):
    """Auto-PGD in the L-inf ball, on each image with its own step size.

    Args:
        loss: a key of LOSSES. Of TARGETED, restart r aims at the class that is r-th likeliest of
            the others for the clean image.
    """

    def __init__(self, classifier: CompiledClassifier, loss: str, *, epsilon: float, steps: int):
        super().__init__(classifier, epsilon=epsilon, steps=steps)
        self.is_targeted = loss in TARGETED
        self._loss_logits_gradient = classifier.differentiable(LOSSES[loss])
        self.checkpoints = checkpoints(steps)

    def begin(self, x, y, images, restart, seed):
        start = random_starts(x, images, epsilon=self.epsilon, seed=seed, restart=restart)
        return self.begin_at(start, x, y, self._targets(x, y, restart))

    def begin_at(
        self, x_adv: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray
    ) -> State:
        """The state whose first points are x_adv (B, H, W, C)."""
        n = len(x)
        return {
            "x": x,
            "y": y,
            "target": target,
            "x_adv": x_adv,
            "x_before": x_adv,
            "step": np.full(n, 2 * self.epsilon, "float32"),
            "loss_before": np.full(n, np.inf, "float32"),  # the start is no progress over anything
            "best_x": x_adv,
            "best_loss": np.full(n, -np.inf, "float32"),
            "best_gradient": np.zeros_like(x),
            "progress": np.zeros(n, int),  # steps since the last checkpoint that raised the loss
            "was_halved": np.zeros(n, bool),  # at the last checkpoint
            "best_at_checkpoint": np.full(n, -np.inf, "float32"),
        }

    def _targets(self, x, y, restart):
        if not self.is_targeted:
            return y
        return likeliest_other(self.classifier.predict(x), y, restart)

    def look(self, state):
        loss, logits, gradient = self._loss_logits_gradient(
            state["x_adv"], state["y"], state["target"]
        )
        return logits, {"loss": loss, "gradient": gradient}

    def propose(self, state, found, iteration):
        """From x^(k), its loss and gradient to x^(k+1); Algorithm 1, lines 3 to 16."""
        loss, gradient = found["loss"], found["gradient"]
        is_best = loss > state["best_loss"]
        state["best_loss"] = np.where(is_best, loss, state["best_loss"])
        for best, now in (("best_x", state["x_adv"]), ("best_gradient", gradient)):
            state[best] = np.where(per_image(is_best), now, state[best])
        state["progress"] = state["progress"] + (loss > state["loss_before"])
        state["loss_before"] = loss
        x_adv, x_before = state["x_adv"], state["x_before"]

        if iteration == 0:
            state["best_at_checkpoint"] = state["best_loss"]
        elif iteration in self.checkpoints:
            length = iteration - self.checkpoints[self.checkpoints.index(iteration) - 1]
            is_stuck = ~state["was_halved"] & (state["best_at_checkpoint"] >= state["best_loss"])
            halve = (state["progress"] < PROGRESS * length) | is_stuck
            state["step"] = np.where(halve, state["step"] / 2, state["step"])
            # Go on from the best iterate, with its gradient. x^(k-1) stays what it was, as in the
            # paper and its authors' code: the momentum is then x_max - x^(k-1).
            x_adv = np.where(per_image(halve), state["best_x"], x_adv)
            gradient = np.where(per_image(halve), state["best_gradient"], gradient)
            state["was_halved"] = halve
            state["best_at_checkpoint"] = state["best_loss"]
            state["progress"] = np.zeros_like(state["progress"])

        z = project(x_adv + per_image(state["step"]) * np.sign(gradient), state["x"], self.epsilon)
        weight = 1.0 if iteration == 0 else MOMENTUM
        moved = x_adv + weight * (z - x_adv) + (1 - weight) * (x_adv - x_before)
        state["x_before"], state["x_adv"] = x_adv, project(moved, state["x"], self.epsilon)
