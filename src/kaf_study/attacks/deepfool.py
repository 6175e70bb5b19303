"""DeepFool: steps to the nearest class boundary of a linearised model, a minimal perturbation.

Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599: Algorithm 2 for L2, with the clipping and
the constants of IBM ART's `DeepFool`, and its extension to other norms (section 3.3), here L-inf
(p = inf, q = 1). It knows no epsilon: each of its points is cut to the ball, and judged there. With
a radius of 255/255, which cuts nothing, an image falls at the perturbation that DeepFool finds.
"""

import math

import numpy as np

from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.loop import BatchAttack, per_image, project

# How far beyond the boundary, as a share of the way: ART's `epsilon`, and the paper's eta
OVERSHOOT = {2: 1e-6, math.inf: 0.02}
TOLERANCE = 10e-8  # against division by 0; ART's


class DeepFool(BatchAttack):
    """`steps` steps at most; `x_uncut` (B, H, W, C) is the point that no ball has cut.

    Args:
        norm: of the perturbation that is to be small, 2 or inf.
    """

    def __init__(
        self, classifier: CompiledClassifier, *, epsilon: float, steps: int, norm: float = 2
    ):
        super().__init__(classifier, epsilon=epsilon, steps=steps)
        self.norm = norm

    def begin(self, x, y, images, restart, seed):
        return {"x": x, "y": y, "x_uncut": x, "x_adv": x}

    def look(self, state):
        x_uncut, n = state["x_uncut"], len(state["x"])
        classes = np.tile(np.arange(self.classifier.classes), (n, 1))
        return self.classifier.predict(state["x_adv"], n), {
            "logits": self.classifier.predict(x_uncut, n),
            "gradients": self.classifier.class_gradients(x_uncut, classes),
        }

    def propose(self, state, found, iteration):
        x, y, each = state["x"], state["y"], np.arange(len(state["x"]))
        has_fallen = found["logits"].argmax(axis=-1) != y  # uncut; nothing is left to do
        difference = found["logits"] - found["logits"][each, y][:, None]  # (B, classes)
        w = found["gradients"] - found["gradients"][each, y][:, None]  # (B, classes, H, W, C)
        # Of the dual norm: how fast the difference changes along the best direction
        slope = np.linalg.norm(
            w.reshape(*difference.shape, -1), ord=1 if self.norm == math.inf else 2, axis=-1
        )
        distance = np.abs(difference) / (slope + TOLERANCE)
        distance[each, y] = np.inf
        nearest = distance.argmin(axis=-1)
        direction, missing, slope = (a[each, nearest] for a in (w, np.abs(difference), slope))
        if self.norm == math.inf:
            direction, length = np.sign(direction), missing / (slope + TOLERANCE)
        else:
            length = missing / (slope**2 + TOLERANCE)
        step = per_image(np.where(has_fallen, 0, length)) * direction
        state["x_uncut"] = np.clip(state["x_uncut"] + step, 0.0, 1.0).astype("float32")
        overshot = x + (1 + OVERSHOOT[self.norm]) * (state["x_uncut"] - x)
        state["x_adv"] = project(overshot, x, self.epsilon)
        return np.where(has_fallen, self.steps - iteration - 1, 0)
