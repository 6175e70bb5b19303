"""Networks against each other on the same images: McNemar's test, differences, intervals.

Of n images b stand under the first network only and c under the second only; all others say
nothing about the difference (b - c) / n. McNemar's test (1947, Psychometrika 12) asks whether b and
c could come from a fair coin; here the exact, binomial one, two-sided, corrected for the number of
comparisons by Holm (1979, Scandinavian Journal of Statistics 6). The 95 % interval is Wald's for
paired proportions (Agresti 2013, "Categorical data analysis", section 11.1).

All of it is about two trained networks. What another training would give is in `seeds`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from kaf_study import InputError

LEVEL = 0.05  # a difference is told apart below it


def outcomes(
    index: Sequence[int] | NDArray | pd.Series, is_clean: ArrayLike, is_robust: ArrayLike
) -> pd.DataFrame:
    """What became of each image: bool columns clean and robust, indexed and sorted by image.

    Args:
        index: numbers of the images in the test set (n,), each once.
    """
    columns = {"clean": np.asarray(is_clean, bool), "robust": np.asarray(is_robust, bool)}
    frame = pd.DataFrame(columns, index=pd.Index(np.asarray(index), name="index"))
    if not frame.index.is_unique:
        twin = frame.index[frame.index.duplicated()][0]
        raise InputError(f"image {twin} is there twice; every image counts once")
    return frame.sort_index()


def same_images(results: Mapping[str, pd.DataFrame]) -> None:
    """Refuses `outcomes` {name: DataFrame} that are not of the same images."""
    (first, base), *others = results.items()
    for name, frame in others:
        if not frame.index.equals(base.index):
            odd = frame.index.symmetric_difference(base.index)
            raise InputError(
                f"{name} and {first} were attacked on different images: {len(odd)} are in one "
                f"result only, such as index {odd[0]}; evaluate both alike"
            )


def differences(results: Mapping[str, pd.DataFrame], reference: str) -> pd.DataFrame:
    """Each network against a reference, image by image: one row per other network.

    Args:
        results: {name: `outcomes`}, all of the same images.

    Returns:
        Columns model, reference, n, robust_difference (fraction; above 0 where the reference is
        less robust), low, high (95 %), only_model, only_reference (images that stand under one
        alone), p (McNemar, exact), clean_difference, clean_p, and p_holm and clean_p_holm,
        corrected for the number of rows.
    """
    base = results[reference]
    same_images({reference: base, **results})
    frame = pd.DataFrame(
        [
            {"model": name, "reference": reference} | _difference(one, base)
            for name, one in results.items()
            if name != reference
        ]
    )
    if len(frame):
        frame["p_holm"] = holm(frame["p"])
        frame["clean_p_holm"] = holm(frame["clean_p"])
    return frame


def _difference(one: pd.DataFrame, base: pd.DataFrame) -> dict:
    n = len(base)
    b, c = _discordant(one["robust"], base["robust"])
    difference, margin = (b - c) / n, 1.96 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    return {
        "n": n,
        "robust_difference": difference,
        "low": difference - margin,
        "high": difference + margin,
        "only_model": b,
        "only_reference": c,
        "p": mcnemar(b, c),
        "clean_difference": float(one["clean"].mean() - base["clean"].mean()),
        "clean_p": mcnemar(*_discordant(one["clean"], base["clean"])),
    }


def _discordant(one: pd.Series, other: pd.Series) -> tuple[int, int]:
    """How many images only `one` has, and how many only `other`."""
    return int((one & ~other).sum()), int((other & ~one).sum())


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of b against c discordant pairs; 1 if there are none."""
    return float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def holm(p: ArrayLike, true_at_most: int | None = None) -> NDArray[np.float64]:
    """Holm's step-down correction of p-values (k,).

    true_at_most: how many of the k hypotheses can be true together, where it is fewer than k
        (Shaffer 1986, JASA 81).
    """
    p = np.asarray(p, float)
    order = np.argsort(p)
    factors = np.minimum(len(p) - np.arange(len(p)), true_at_most or len(p))
    corrected = np.maximum.accumulate(p[order] * factors)
    return np.minimum(corrected, 1.0)[np.argsort(order)]
