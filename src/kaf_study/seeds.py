"""Activations against each other over several trainings: what of a difference is the activation?

Each activation was trained with several seeds, and every network attacked on the same n images.
Whether image i stands under seed s of activation a, x_asi in {0, 1}, is taken as

    x_asi = mean_a + seed_as + image_ai + rest_asi

with images shared by all activations (so their differences are paired), seeds by none. Both are
samples: another training gives other seeds, another test set other images. For a contrast
sum_a w_a mean_a, a difference or a mean, estimated by the means over images and seeds,

    variance = W V_seed + (V_image - W V_rest) / n,    W = sum_a w_a^2 / (number of seeds of a)

where V_seed is the variance of an accuracy on these images from seed to seed, pooled over the
activations, V_image that of sum_a w_a mean_s x_asi over the images, and V_rest the mean square of
rest_asi. The last is subtracted because V_seed and V_image both hold it: the mean squares of a
two-way crossed table, with their expectations (Searle, Casella & McCulloch 1992, "Variance
components", chapter 4). Intervals are Student's with Satterthwaite's degrees of freedom (1946,
Biometrics Bulletin 2), few as V_seed comes from few seeds. Two or three seeds are too few to be
resampled: a bootstrap over them says too little, by a factor of sqrt((S - 1) / S) at least.

Equal within a margin is what two one-sided tests say (Schuirmann 1987, Journal of Pharmacokinetics
and Biopharmaceutics 15). Verdicts hold at 5 % for a whole family of comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from kaf_study import InputError
from kaf_study.paired import LEVEL, holm

MARGIN = 0.01  # below it activations count as equal: 1 point
MORE, LESS, EQUAL, UNDECIDED = "more", "less", "equal", "undecided"

Outcomes = Mapping[str, NDArray[np.bool_]]  # {activation: (..., seeds, images)}


@dataclass(frozen=True)
class Spread:
    """How networks differ from seed to seed, pooled over the activations.

    seed: variance of an accuracy between seeds, on the same images. rest: mean square per image of
    what neither the seed nor the image explains. df: degrees of freedom of `seed`: seeds less one,
    summed over the activations; 0 where no activation has two, and the others then NaN.
    """

    seed: NDArray[np.float64]
    rest: NDArray[np.float64]
    df: int

    @property
    def sd(self) -> NDArray[np.float64]:
        """Standard deviation of an accuracy between seeds, a fraction."""
        return np.sqrt(self.seed)


def spread(results: Outcomes) -> Spread:
    """The spread between seeds of activations that were attacked on the same images.

    It is taken to be the same for all, so that two or three seeds of each are enough.
    """
    n = _images(results)
    df = sum(x.shape[-2] - 1 for x in results.values())
    between, rest = 0.0, 0.0
    for x in results.values():
        seeds, image = x.mean(axis=-1), x.mean(axis=-2)
        centre = seeds.mean(axis=-1)
        squares = ((seeds - centre[..., None]) ** 2).sum(axis=-1)
        # Of zeros and ones: sum of (x - image)^2 over the seeds is S image (1 - image).
        within = x.shape[-2] * (image * (1 - image)).sum(axis=-1)
        between = between + squares
        rest = rest + within - n * squares
    with np.errstate(invalid="ignore"):
        return Spread(np.divide(between, df), np.divide(rest, df * (n - 1)), df)


def _images(results: Outcomes) -> int:
    """How many images all were attacked on."""
    counts = {name: x.shape[-1] for name, x in results.items()}
    if len(set(counts.values())) != 1 or min(counts.values()) < 2:
        raise InputError(
            "activations are compared on the same images, two at least; there are "
            + ", ".join(f"{count} of {name}" for name, count in counts.items())
        )
    return next(iter(counts.values()))


@dataclass(frozen=True)
class Estimate:
    """A contrast of accuracies: its value and standard error (fractions), degrees of freedom.

    Without a spread between seeds the error is infinite: nothing is known.
    """

    value: NDArray[np.float64]
    error: NDArray[np.float64]
    df: NDArray[np.float64]

    def interval(self, confidence: float = 1 - LEVEL) -> tuple[NDArray, NDArray]:
        """Low and high, two-sided."""
        reach = student.ppf((1 + confidence) / 2, self.df) * self.error
        return self.value - reach, self.value + reach

    @property
    def p_different(self) -> NDArray[np.float64]:
        """Two-sided p-value of a value of 0."""
        return 2 * student.sf(np.abs(self.value) / self.error, self.df)

    def p_equal(self, margin: float = MARGIN) -> NDArray[np.float64]:
        """Of two one-sided tests, that the value is `margin` or more away from 0, the larger p."""
        return student.sf((margin - np.abs(self.value)) / self.error, self.df)


def estimate(results: Outcomes, weights: Mapping[str, float], noise: Spread) -> Estimate:
    """The contrast sum_a w_a mean_a of accuracies.

    Args:
        weights: {activation: w}: {"swish": 1, "relu": -1} is a difference, {"swish": 1} a mean.
        noise: of `spread`, over all activations that were trained alike.
    """
    n = _images(results)
    image = sum(w * results[a].mean(axis=-2) for a, w in weights.items())  # (..., n)
    value = image.mean(axis=-1)
    if noise.df == 0:
        return Estimate(value, np.full_like(value, np.inf), np.ones_like(value))
    share = sum(w**2 / results[a].shape[-2] for a, w in weights.items())
    of_seeds = share * noise.seed
    of_images = np.maximum(image.var(axis=-1, ddof=1) - share * noise.rest, 0) / n
    # Where every image and seed agree, almost 0: then p is 1 or 0, not 0 / 0.
    variance = np.maximum(of_seeds + of_images, 1e-30)
    df = variance**2 / (of_seeds**2 / noise.df + of_images**2 / (n - 1) + 1e-90)
    return Estimate(value, np.sqrt(variance), np.minimum(df, noise.df + n - 1))


def difference(results: Outcomes, first: str, second: str, noise: Spread) -> Estimate:
    """Of the accuracies of two activations, first less second."""
    return estimate(results, {first: 1.0, second: -1.0}, noise)


def verdicts_of(
    found: Sequence[Estimate],
) -> tuple[NDArray[np.str_], NDArray[np.float64], NDArray[np.float64]]:
    """`verdicts` of a family of single contrasts."""
    return verdicts(
        [float(one.value) for one in found],
        [float(one.p_different) for one in found],
        [float(one.p_equal()) for one in found],
    )


def verdicts(
    values: ArrayLike, p_different: ArrayLike, p_equal: ArrayLike
) -> tuple[NDArray[np.str_], NDArray[np.float64], NDArray[np.float64]]:
    """What a family of k comparisons says at 5 %: "more", "less", "equal" or "undecided".

    Each comparison is tested twice, for a difference and for equality within the margin. Of these
    2 k hypotheses no more than k are true, as a value is not both 0 and at least a margin away, so
    Holm's factors end at k (Shaffer 1986, JASA 81): the chance of any false verdict is 5 % at most.
    A difference that is smaller than the margin for certain is a difference: its size is shown.

    Returns:
        Verdicts (k,), and the corrected p-values of difference and of equality.
    """
    values = np.asarray(values, float)
    k = len(values)
    corrected = holm(np.concatenate([p_different, p_equal]), true_at_most=k)
    different, equal = corrected[:k], corrected[k:]
    said = np.select(
        [(different < LEVEL) & (values > 0), different < LEVEL, equal < LEVEL],
        [MORE, LESS, EQUAL],
        UNDECIDED,
    )
    return said, different, equal
