"""The L-inf attack of Carlini & Wagner 2017 (arXiv 1608.04644, section VI C) at tau = epsilon.

The paper lowers tau until no adversarial example is found; whether there is one within epsilon
needs tau = epsilon alone. Its penalty on what exceeds tau is here its change of variable, applied
to the ball: the images are midpoint + half_width * tanh(w) of the box that the ball and [0, 1]
leave each pixel, so that no constant c weighs one against the other. w starts at 0 and is moved by
Adam down the margin z_y - max_{i != y} z_i (the paper's f_6).
"""

import numpy as np
import tensorflow as tf

from kaf_study.attacks.classifier import CompiledClassifier, logit
from kaf_study.attacks.loop import BatchAttack, project

LEARNING_RATE = 0.1  # of Adam in w, which saturates at 2 or so: within reach of 40 steps
BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-8  # Adam's own


def margin(logits: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """(B,): z_y - max_{i != y} z_i of logits (B, classes); negative where y is not predicted."""
    is_y = tf.one_hot(y, tf.shape(logits)[1], on_value=True, off_value=False)
    others = tf.where(is_y, logits.dtype.min, logits)
    return logit(logits, y) - tf.reduce_max(others, axis=-1)


class CarliniWagner(BatchAttack):
    """`steps` steps of Adam; nothing is random."""

    def __init__(self, classifier: CompiledClassifier, *, epsilon: float, steps: int):
        super().__init__(classifier, epsilon=epsilon, steps=steps)
        self._loss_logits_gradient = classifier.differentiable(margin)

    def begin(self, x, y, images, restart, seed):
        w = np.zeros_like(x)
        return {"x": x, "y": y, "w": w, "mean": w, "square": w, "x_adv": self.image(x, w)}

    def box(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Midpoint and half width of what each pixel of x (B, H, W, C) may be."""
        low, high = np.maximum(x - self.epsilon, 0), np.minimum(x + self.epsilon, 1)
        return (low + high) / 2, (high - low) / 2

    def image(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        midpoint, half_width = self.box(x)
        return project(midpoint + half_width * np.tanh(w), x, self.epsilon)

    def look(self, state):
        _, logits, gradient = self._loss_logits_gradient(state["x_adv"], state["y"])
        return logits, {"gradient": gradient}

    def propose(self, state, found, iteration):
        _, half_width = self.box(state["x"])
        gradient = found["gradient"] * half_width * (1 - np.tanh(state["w"]) ** 2)  # in w
        state["mean"] = BETA_1 * state["mean"] + (1 - BETA_1) * gradient
        state["square"] = BETA_2 * state["square"] + (1 - BETA_2) * gradient**2
        mean = state["mean"] / (1 - BETA_1 ** (iteration + 1))
        square = state["square"] / (1 - BETA_2 ** (iteration + 1))
        state["w"] = state["w"] - LEARNING_RATE * mean / (np.sqrt(square) + TINY)
        state["x_adv"] = self.image(state["x"], state["w"])
