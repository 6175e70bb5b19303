"""FAB, targeted: the fast adaptive boundary attack (Croce & Hein 2020).

"Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020, arXiv
1907.02044: Algorithm 1 for the L-inf norm, with the linearisation between the label and one target
class only (FAB-T, as in AutoAttack, arXiv 2003.01690). It looks for the nearest misclassified point
and knows no epsilon: an image falls when a point it finds lies within epsilon.

From the iterate x^(i) the model is taken as linear, and its boundary between label and target as a
hyperplane. The next iterate is an average of the hyperplane's nearest point to x^(i) and its
nearest point to the clean image, both in [0, 1] and overshot by eta; misclassified iterates are
pulled back towards the clean image. Nothing is random: restart r begins at the clean image and aims
at its r-th likeliest other class.
"""

import numpy as np

from kaf_study.attacks.classifier import CompiledClassifier, likeliest_other, logit_difference
from kaf_study.attacks.loop import BatchAttack, per_image

# The paper's settings for L-inf, which AutoAttack has as well
ALPHA_MAX = 0.1  # most that the clean image's side of the average weighs
ETA = 1.05  # overshooting past the hyperplane
BETA = 0.9  # what is left of a misclassified iterate's perturbation after the backward step
SEARCH_STEPS = 3  # of the final search


def to_hyperplane(x: np.ndarray, normal: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The smallest change, in L-inf, that brings x onto a hyperplane without leaving [0, 1].

    The paper's projection, solved exactly: every pixel moves by lambda in its helpful direction,
    or as far as it can; lambda is the root of a concave, piecewise linear function, which Newton's
    method reaches from the left, each step finding more pixels at their end.

    Args:
        x: points (B, H, W, C) in [0, 1].
        normal: normals w (B, H, W, C) of the hyperplanes value + w . change = 0.
        value: (B,), what the linear function is at x.

    Returns:
        Change (B, H, W, C); the nearest to the hyperplane that [0, 1] allows if it is out of reach.
    """
    weight = np.abs(normal)
    direction = -np.sign(normal) * per_image(np.sign(value))
    room = np.where(direction > 0, 1 - x, x)
    is_free = np.ones(x.shape, bool)  # not yet at its end
    while True:
        slope = _sum(weight * is_free)
        missing = np.abs(value) - _sum(weight * room * ~is_free)
        with np.errstate(divide="ignore", invalid="ignore"):
            length = np.where(slope > 0, missing / slope, np.inf)
        still_free = is_free & (room > per_image(length))
        if np.array_equal(still_free, is_free):
            return direction * np.minimum(per_image(length), room)
        is_free = still_free


class FAB(BatchAttack):
    """Targeted FAB in L-inf: `iterations` of Algorithm 1, then the final search.

    An iteration is a forward pass at the point proposed, and a gradient there, or further back
    where it is misclassified. What is proposed may lie outside the ball; `x_adv`, the point that is
    judged, is then the clean image.
    """

    def __init__(self, classifier: CompiledClassifier, *, epsilon: float, steps: int):
        super().__init__(classifier, epsilon=epsilon, steps=steps + SEARCH_STEPS)
        self.iterations = steps
        self._loss_and_gradient = classifier.differentiable(logit_difference)

    def begin(self, x, y, images, restart, seed):
        logits = self.classifier.predict(x, len(x))
        return {
            "x": x,
            "y": y,
            "target": likeliest_other(logits, y, restart),
            "logits": logits,
            "x_adv": x,
            "proposed": x,
            # The nearest misclassified point so far, and how far it is; the same for no point.
            "best_x": x,
            "best_logits": logits,
            "best_norm": np.full(len(x), np.inf, "float32"),
            # Of the final search: the end of the segment that is classified right.
            "inner_x": x,
            "inner_logits": logits,
        }

    def look(self, state):
        x, proposed = state["x"], state["proposed"]
        logits = self.classifier.predict(proposed, len(proposed))
        is_adversarial = logits.argmax(axis=-1) != state["y"]
        backward = per_image(np.where(is_adversarial, BETA, 1)).astype("float32")
        walk = x + backward * (proposed - x)
        value, _, normal = self._loss_and_gradient(walk, state["y"], state["target"])
        is_inside = _norm(proposed - x) <= self.epsilon
        judged = np.where(is_inside[:, None], logits, state["logits"])
        return judged, {"logits": logits, "walk": walk, "value": value, "normal": normal}

    def propose(self, state, found, iteration):
        x, looked_at, logits = state["x"], state["proposed"], found["logits"]
        is_adversarial = logits.argmax(axis=-1) != state["y"]
        norm = _norm(looked_at - x)
        is_better = is_adversarial & (norm < state["best_norm"])
        state["best_norm"] = np.where(is_better, norm, state["best_norm"])
        _keep(state, "best", is_better, looked_at, logits)
        if iteration < self.iterations:
            proposed = _averaged(x, found["walk"], found["value"], found["normal"])
        else:
            if iteration > self.iterations:
                _keep(state, "inner", ~is_adversarial, looked_at, logits)
            proposed = _searched(state)
        state["proposed"] = proposed
        is_inside = _norm(proposed - x) <= self.epsilon
        state["x_adv"] = np.where(per_image(is_inside), proposed, x)


def _keep(state, end, takes, points, logits):
    """Take points (B, H, W, C), and their logits, as `end` where `takes` (B,)."""
    state[f"{end}_x"] = np.where(per_image(takes), points, state[f"{end}_x"])
    state[f"{end}_logits"] = np.where(takes[:, None], logits, state[f"{end}_logits"])


def _averaged(x, walk, value, normal):
    """Algorithm 1, the next iterate: the biased average of the two projections, overshot."""
    delta = to_hyperplane(walk, normal, value)
    delta_clean = to_hyperplane(x, normal, value + _sum(normal * (x - walk)))
    near, far = (np.maximum(_norm(d), 1e-8) for d in (delta, delta_clean))
    alpha = per_image(np.minimum(near / (near + far), ALPHA_MAX))
    average = (1 - alpha) * (walk + ETA * delta) + alpha * (x + ETA * delta_clean)
    return np.clip(average, 0, 1).astype("float32")


def _searched(state):
    """The final search: where the margin between the ends of a segment would be 0, if linear.

    The inner end is classified right (the clean image at first), the outer one is the best point;
    the margin is that of the label against the outer end's class.
    """
    y, rows = state["y"], np.arange(len(state["y"]))
    other = state["best_logits"].argmax(axis=-1)
    inside, outside = (
        state[logits][rows, y] - state[logits][rows, other]
        for logits in ("inner_logits", "best_logits")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(inside / (inside - outside))
    share = per_image(np.clip(share, 0, 1))
    return ((1 - share) * state["inner_x"] + share * state["best_x"]).astype("float32")


def _sum(values):
    """(B, H, W, C) -> (B,)"""
    return values.reshape(len(values), -1).sum(axis=1)


def _norm(delta):
    """(B, H, W, C) -> (B,), L-inf"""
    return np.abs(delta).reshape(len(delta), -1).max(axis=1)
