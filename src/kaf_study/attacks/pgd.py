"""Projected gradient descent in the L-inf ball (Madry et al. 2018, arXiv 1706.06083), and FGSM.

Its steps are IBM ART's (`ProjectedGradientDescentTensorFlowV2`), pixel by pixel, and so the verdict
at the last iterate; the tests hold them against each other. Once an image's iterates repeat (a
fixed point or a cycle of two) the rest of its run is known, and left out, as in "Stop Walking in
Circles!" (Doldo et al. 2025, arXiv 2503.19347). That takes for granted that a model gives one
gradient for one image: of one that draws at random the steps left out could have led elsewhere
(`--check` finds such models).
"""

import numpy as np

from kaf_study.attacks.classifier import CompiledClassifier, cross_entropy
from kaf_study.attacks.loop import BatchAttack, random_starts


class PGD(BatchAttack):
    """`steps` signed gradient steps of `alpha` on the cross-entropy, from a random start."""

    def __init__(self, classifier: CompiledClassifier, *, epsilon: float, alpha: float, steps: int):
        super().__init__(classifier, epsilon=epsilon, steps=steps)
        self.alpha = float(alpha)
        self._loss_logits_gradient = classifier.differentiable(cross_entropy)

    def begin(self, x, y, images, restart, seed):
        return {
            "x": x,
            "y": y,
            "x_adv": self.start(x, images, restart, seed),
            "x_before": np.full_like(x, np.nan),  # equal to nothing: there is no iterate before
        }

    def start(self, x: np.ndarray, images: np.ndarray, restart: int, seed: int) -> np.ndarray:
        """First iterates of the images x (B, H, W, C)."""
        return random_starts(x, images, epsilon=self.epsilon, seed=seed, restart=restart)

    def look(self, state):
        _, logits, gradient = self._loss_logits_gradient(state["x_adv"], state["y"])
        return logits, {"gradient": gradient}

    def propose(self, state, found, iteration):
        x, x_adv, before = state["x"], state["x_adv"], state["x_before"]
        step = np.float32(self.alpha) * np.sign(found["gradient"])
        stepped = np.clip(x_adv + step, 0.0, 1.0)
        delta = np.clip(stepped - x, -np.float32(self.epsilon), np.float32(self.epsilon))
        state["x_adv"], state["x_before"] = x + delta, x_adv  # in [0, 1], also when rounded
        return whole_cycles(before, x_adv, state["x_adv"], self.steps - iteration - 1)


class FGSM(PGD):
    """One signed step of epsilon from the clean image (Goodfellow et al. 2015, arXiv 1412.6572)."""

    def __init__(self, classifier: CompiledClassifier, *, epsilon: float, steps: int = 1):
        super().__init__(classifier, epsilon=epsilon, alpha=epsilon, steps=steps)

    def start(self, x, images, restart, seed):
        return x


def whole_cycles(before: np.ndarray, now: np.ndarray, after: np.ndarray, left: int) -> np.ndarray:
    """How many of the `left` iterations after `after` (B, H, W, C) may be left out, (B,) int.

    Signed steps of one size inside a box end, after a while, in a fixed point or go to and fro
    between two: an iterate equal to the last or the last but one starts a cycle of 1 or 2, which
    the rest of the run repeats. Whole cycles are left out; what remains ends at the same iterate.
    """
    axes = (1, 2, 3)
    is_fixed, is_pair = (after == now).all(axis=axes), (after == before).all(axis=axes)
    return np.where(is_fixed, left, np.where(is_pair, left - left % 2, 0))
