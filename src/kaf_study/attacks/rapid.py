"""What `rapid` adds to ten steps of PGD: runs on the margin that stop where nothing is near.

`rapid` is AutoAttack's verdict at a fraction of its cost, not AutoAttack. Most images that fall do
so within a few steps, and towards one of their likeliest classes; most that stand have a margin
that no more steps would bridge. So each image is attacked towards its likeliest other classes in
turn, in a short look, and again in a long one only where the short one came near (after the "CR
attack" of the FastAT benchmark, arXiv 2604.22853, which judges by the margin itself; here it is
judged by what the short look has gained, so that scaling the logits changes nothing).
"""

import numpy as np

from kaf_study.attacks.apgd import APGD
from kaf_study.attacks.classifier import CompiledClassifier
from kaf_study.attacks.loop import BatchAttack, per_image

SHORT = 12  # steps of the short look: a few take nearly all of the margin, the rest is reserve
NEAR = 0.1  # what is left of the margin, as a fraction of what the short look has taken away


class TwoLooks(BatchAttack):
    """Auto-PGD on the margin towards one class: a short look, and a long one where that came near.

    The long look begins at the best point of the short one. Restart r aims at the class that is
    r-th likeliest of the others for the clean image.

    Args:
        steps: of the long look.
    """

    def __init__(self, classifier: CompiledClassifier, *, epsilon: float, steps: int):
        # The long look's start is a point that was looked at before.
        super().__init__(classifier, epsilon=epsilon, steps=SHORT + 1 + steps)
        self.short, self.long = (
            APGD(classifier, "margin", epsilon=epsilon, steps=length) for length in (SHORT, steps)
        )

    def begin(self, x, y, images, restart, seed):
        state = self.short.begin(x, y, images, restart, seed)
        return state | {"first_loss": np.zeros(len(x), "float32")}

    def look(self, state):
        return self.short.look(state)

    def propose(self, state, found, iteration):
        if iteration == 0:
            state["first_loss"] = found["loss"]
        if iteration > SHORT:
            return self.long.propose(state, found, iteration - SHORT - 1)
        if iteration == SHORT:
            is_best = per_image(found["loss"] > state["best_loss"])
            start = np.where(is_best, state["x_adv"], state["best_x"])
            state.update(self.long.begin_at(start, state["x"], state["y"], state["target"]))
            return None
        self.short.propose(state, found, iteration)
        if iteration < SHORT - 1:
            return None
        # The loss is minus the margin. Where it is far from 0 the next point is the last one.
        left, taken = -state["best_loss"], state["best_loss"] - state["first_loss"]
        return np.where(left > NEAR * taken, self.steps - SHORT, 0)
