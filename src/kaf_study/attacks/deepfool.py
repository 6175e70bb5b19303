"""DeepFool: steps to the nearest class boundary of a linearised model, a minimal L2 perturbation.

Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599, Algorithm 2, with the clipping and the
constants of IBM ART's `DeepFool`, against which the tests hold it. It knows no epsilon: each of its
points is cut to the ball, and judged there.
"""

import numpy as np

from kaf_study.attacks.loop import BatchAttack, per_image, project

OVERSHOOT = 1e-6  # beyond the boundary; ART's `epsilon`
TOLERANCE = 10e-8  # against division by 0; ART's


class DeepFool(BatchAttack):
    """`steps` steps at most; `x_uncut` (B, H, W, C) is the point that no ball has cut."""

    def begin(self, x, y, images, restart, seed):
        return {"x": x, "y": y, "x_uncut": x, "x_adv": x}

    def look(self, state):
        x_uncut, n = state["x_uncut"], len(state["x"])
        classes = np.tile(np.arange(self.classifier.nb_classes), (n, 1))
        return self.classifier.predict(state["x_adv"], n), {
            "logits": self.classifier.predict(x_uncut, n),
            "gradients": self.classifier.class_gradients(x_uncut, classes),
        }

    def propose(self, state, found, iteration):
        x, y, each = state["x"], state["y"], np.arange(len(state["x"]))
        has_fallen = found["logits"].argmax(axis=-1) != y  # uncut; nothing is left to do
        difference = found["logits"] - found["logits"][each, y][:, None]  # (B, classes)
        w = found["gradients"] - found["gradients"][each, y][:, None]  # (B, classes, H, W, C)
        norm = np.linalg.norm(w.reshape(*difference.shape, -1), axis=-1)
        distance = np.abs(difference) / (norm + TOLERANCE)
        distance[each, y] = np.inf
        nearest = distance.argmin(axis=-1)
        length = np.abs(difference[each, nearest]) / (norm[each, nearest] ** 2 + TOLERANCE)
        step = per_image(np.where(has_fallen, 0, length)) * w[each, nearest]
        state["x_uncut"] = np.clip(state["x_uncut"] + step, 0.0, 1.0).astype("float32")
        overshot = x + (1 + OVERSHOOT) * (state["x_uncut"] - x)
        state["x_adv"] = project(overshot, x, self.epsilon)
        return np.where(has_fallen, self.steps - iteration - 1, 0)
