"""What all attacks share: the loop over images, random starts, projection, the check afterwards.

`BatchAttack.run` attacks N images once. Nothing is computed that cannot change a verdict, and
what happens to an image does not depend on the others:

- A pool of at most `batch_size` images is looked at together, each at its own iteration: whatever
  falls leaves at once, and the next images take its place.
- Where an attack knows that the rest of an image's run repeats what has been, it is left out.
- Random draws are named by (seed, image, restart). (Float rounding inside a convolution may differ
  in the last bit between batch sizes; nothing else does.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kaf_study import InputError
from kaf_study.attacks.classifier import CompiledClassifier

State = dict[str, np.ndarray]


@dataclass
class Run:
    """What one restart did to N images.

    x_adv (N, H, W, C): where each image fell, else its last iterate; predictions (N,) there;
    iterations (N,): the number of that iterate, 0 being the start; fell (N,) bool.
    """

    x_adv: np.ndarray
    predictions: np.ndarray
    iterations: np.ndarray
    fell: np.ndarray


class BatchAttack:
    """An attack that looks at points one after the other.

    Subclasses say where it begins, what it looks at, and where it goes next. All they keep for B
    images is a dict of arrays (B, ...), of which `x`, `y` and `x_adv` must be there, so that
    some of a batch is the same as a smaller batch. The dict keeps its keys.

    Args:
        epsilon: L-inf radius in the units of x.
        steps: points after the first.
    """

    def __init__(self, classifier: CompiledClassifier, *, epsilon: float, steps: int):
        self.classifier, self.epsilon, self.steps = classifier, float(epsilon), steps

    def begin(
        self, x: np.ndarray, y: np.ndarray, images: np.ndarray, restart: int, seed: int
    ) -> State:
        """The state (dict of arrays) with the first point, `x_adv` (B, H, W, C)."""
        raise NotImplementedError

    def look(self, state: State) -> tuple[np.ndarray, State]:
        """Logits (B, classes) at `x_adv`, and whatever else `propose` needs, a dict of (B, ...)."""
        raise NotImplementedError

    def propose(self, state: State, found: State, iteration: int) -> np.ndarray | None:
        """Change `state` so that `x_adv` is the next point; `iteration` (from 0) was the last.

        Returns:
            None, or how many of the points to come may be left out, (B,) int: the one proposed is
            then also that many iterations later.
        """
        raise NotImplementedError

    def run(
        self,
        x: np.ndarray,
        y: np.ndarray,
        images: np.ndarray,
        restart: int,
        *,
        seed: int,
        batch_size: int,
        judge_every: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Run:
        """Attack N images once.

        Args:
            x: original images (N, H, W, C), float32 in [0, 1]; left as they are.
            y: classes (N,); an image falls when it is predicted otherwise.
            images: numbers (N,) of the images, which name their random draws.
            restart: from 1.
            judge_every: an image falls at the first point (the start included) that is
                misclassified and is then left alone; this fells every image that judging the last
                point fells, or more. False: only the last point is judged, as ART does.
            progress: called after every step with how many image iterations are settled by it
                (those an image need no longer go through included) and how many images fell.
        """
        n = len(x)
        run = Run(np.empty_like(x), np.empty(n, int), np.zeros(n, int), np.zeros(n, bool))
        chunk = max(1, batch_size // 4)  # images that enter together
        waiting = [np.arange(n)[i : i + chunk] for i in range(0, n, chunk)][::-1]
        at = np.empty(0, int)  # positions in x of the images in the pool
        state: State = {}
        while waiting or len(at):
            while waiting and len(at) + len(waiting[-1]) <= batch_size:
                new = waiting.pop()
                state = _joined(state, self.begin(x[new], y[new], images[new], restart, seed))
                at = np.append(at, new)
            logits, found = self._look_padded(state, batch_size)
            predictions = logits.argmax(axis=-1)

            last = run.iterations[at] == self.steps
            fell = (predictions != y[at]) & (last | judge_every)
            leaving = fell | last
            run.fell[at[fell]] = True
            run.x_adv[at[leaving]] = state["x_adv"][leaving]
            run.predictions[at[leaving]] = predictions[leaving]
            settled = len(at) + int((self.steps - run.iterations[at[fell]]).sum())

            at, state, found = at[~leaving], _some(state, ~leaving), _some(found, ~leaving)
            skipped = self._propose_each(state, found, run.iterations[at])
            run.iterations[at] += 1 + skipped
            if progress is not None:
                progress(settled + int(skipped.sum()), int(fell.sum()))
        return run

    def _look_padded(self, state, batch_size):
        """`look` at a pool lengthened to its `padded_size` by repeating its first image."""
        count = len(state["x"])
        size = padded_size(count, batch_size, is_compiled=self.classifier.is_compiled_by_shape)
        padded = np.append(np.arange(count), np.zeros(size - count, int))
        logits, found = self.look(_some(state, padded) if size > count else state)
        if not np.all(np.isfinite(logits)):
            raise InputError("the model gives NaN or infinite outputs under attack; train it again")
        return logits[:count], _some(found, slice(count))

    def _propose_each(self, state, found, iterations):
        """`propose` for images (B,) at different iterations; how many each may leave out."""
        skipped = np.zeros(len(iterations), int)
        for iteration in np.unique(iterations):
            group = iterations == iteration
            part = _some(state, group)
            left_out = self.propose(part, _some(found, group), int(iteration))
            for name, value in part.items():
                state[name][group] = value
            skipped[group] = 0 if left_out is None else left_out
        return skipped


def _some(arrays, which):
    return {name: value[which] for name, value in arrays.items()}


def _joined(state, new):
    return {name: np.concatenate([state[name], new[name]]) for name in new} if state else new


def padded_size(count: int, batch_size: int, *, is_compiled: bool) -> int:
    """The batch shape for `count` images: 2, 3, 4, 6, 8, 12 or 16 16ths of `batch_size`.

    Shapes are few, because a layer that XLA compiles is compiled anew for each. Where it compiles
    none (not `is_compiled`), any 64ths up to a quarter, and any 32nds: oneDNN prepares a
    convolution for each shape, but quickly.
    """
    parts = (8, 12, 16, 24, 32, 48, 64) if is_compiled else (*range(1, 16), *range(16, 65, 2))
    sizes = (max(1, batch_size * part // 64) for part in parts)
    return next(size for size in sizes if size >= count)


def random_start(
    x: np.ndarray, *, epsilon: float, seed: int, image: int, restart: int
) -> np.ndarray:
    """Uniform start in the epsilon-ball around one image x (H, W, C), clipped to [0, 1].

    As in ART (`random_sphere`, norm inf), but from a generator named by (seed, image, restart).
    """
    generator = np.random.default_rng((seed, image, restart))
    delta = generator.uniform(-epsilon, epsilon, x.shape).astype("float32")
    return np.clip(x + delta, 0.0, 1.0)


def random_starts(
    x: np.ndarray, images: np.ndarray, *, epsilon: float, seed: int, restart: int
) -> np.ndarray:
    """`random_start` of each of the images x (B, H, W, C), whose numbers are `images` (B,)."""
    return np.stack(
        [
            random_start(one, epsilon=epsilon, seed=seed, image=int(image), restart=restart)
            for one, image in zip(x, images, strict=True)
        ]
    )


def project(x_adv: np.ndarray, x: np.ndarray, epsilon: float) -> np.ndarray:
    """Nearest point of the epsilon-ball around x (..., H, W, C) and of [0, 1]; float32."""
    return np.clip(np.clip(x_adv, x - epsilon, x + epsilon), 0.0, 1.0).astype("float32")


def per_image(values: np.ndarray) -> np.ndarray:
    """(B,) -> (B, 1, 1, 1)"""
    return values[:, None, None, None]


def check_perturbation(x: np.ndarray, x_adv: np.ndarray, epsilon: float) -> np.ndarray:
    """Raise if an attack left what it was allowed; return |x_adv - x|_inf per image (N,).

    Allowed: within epsilon + 1e-6, in [0, 1], finite.
    """
    if not np.all(np.isfinite(x_adv)):
        raise RuntimeError("the attack produced NaN or infinite pixels")
    if x_adv.min() < 0 or x_adv.max() > 1:
        raise RuntimeError(f"the attack left [0, 1]: {x_adv.min()} to {x_adv.max()}")
    linf = np.abs(x_adv - x).max(axis=(1, 2, 3))
    if linf.max() > epsilon + 1e-6:
        raise RuntimeError(f"the attack left the ball: {linf.max()} > {epsilon}")
    return linf
