"""Square attack: random search with square patches, no gradients (Andriushchenko et al. 2020).

"Square attack: a query-efficient black-box adversarial attack via random search", ECCV 2020, arXiv
1912.00049: Algorithms 1 and 2 (L-inf). It sees the logits alone, so no masking of gradients
deceives it.

Written here because ART's `SquareAttack` (1.20.1) draws one square for all images that still stand,
from NumPy's global generator, and never one that touches the last row or column: what happens to an
image there depends on the others. Here each image draws its own, named by (seed, image, restart).
"""

import numpy as np

from kaf_study.attacks.classifier import CompiledClassifier, likeliest_other
from kaf_study.attacks.loop import BatchAttack, per_image, project

INITIAL_FRACTION = 0.8  # p: of the pixels that the first squares cover; AutoAttack's p_init
# Queries, of 10,000, after which p is halved: `p_selection` of the authors' code
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square_side(query: int, queries: int, height: int, width: int) -> int:
    """Side in pixels of the square that is tried at `query` (from 0) of `queries`."""
    halvings = sum(query / queries * 10_000 > limit for limit in HALVINGS)
    fraction = INITIAL_FRACTION / 2**halvings
    side = round(np.sqrt(fraction * height * width))
    return int(np.clip(side, 1, min(height, width)))


class Square(BatchAttack):
    """`steps` queries for each image after the first, which is of vertical stripes.

    Args:
        scheduled: how many queries the schedule of sides is for; `steps` unless given. AutoAttack
            (arXiv 2003.01690) makes 5,000 of 10,000.
    """

    def __init__(
        self,
        classifier: CompiledClassifier,
        *,
        epsilon: float,
        steps: int,
        scheduled: int | None = None,
    ):
        super().__init__(classifier, epsilon=epsilon, steps=steps)
        self.scheduled = scheduled or steps

    def begin(self, x, y, images, restart, seed):
        *_, width, channels = x.shape
        # A stream of its own, not the one of the random starts
        generators = [np.random.default_rng((seed, int(i), restart, 1)) for i in images]
        stripes = np.stack([g.choice([-1.0, 1.0], (1, width, channels)) for g in generators])
        return {
            "x": x,
            "y": y,
            "x_adv": project(x + self.epsilon * stripes, x, self.epsilon),
            "best_x": x,
            "best_margin": np.full(len(x), np.inf, "float32"),
            "places": np.stack([g.random((self.steps, 2), "float32") for g in generators]),
            "signs": np.stack(
                [g.choice(np.int8([-1, 1]), (self.steps, channels)) for g in generators]
            ),
        }

    def look(self, state):
        logits = self.classifier.predict(state["x_adv"], len(state["x_adv"]))
        y, rows = state["y"], np.arange(len(logits))
        return logits, {"margin": logits[rows, y] - logits[rows, likeliest_other(logits, y)]}

    def propose(self, state, found, iteration):
        is_better = found["margin"] < state["best_margin"]
        state["best_margin"] = np.where(is_better, found["margin"], state["best_margin"])
        state["best_x"] = np.where(per_image(is_better), state["x_adv"], state["best_x"])
        height, width = state["x"].shape[1:3]
        side = square_side(iteration, self.scheduled, height, width)
        # Any place in the image where the square fits: top and left in 0 .. height - side.
        room = np.array([height - side + 1, width - side + 1])
        corner = (state["places"][:, iteration] * room).astype(int)
        rows, columns = (
            (np.arange(size) >= first[:, None]) & (np.arange(size) < first[:, None] + side)
            for size, first in ((height, corner[:, 0]), (width, corner[:, 1]))
        )
        square = (rows[:, :, None] & columns[:, None, :])[..., None]
        change = 2 * self.epsilon * state["signs"][:, iteration][:, None, None, :] * square
        state["x_adv"] = project(state["best_x"] + change, state["x"], self.epsilon)
