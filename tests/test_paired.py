"""Paired statistics of two networks on the same images, against hand computations."""

import numpy as np
import pandas as pd
import pytest

from kaf_study import InputError
from kaf_study.paired import differences, holm, mcnemar, outcomes

N = 100


def stands_on(images, *, clean=range(90), index=range(N)):
    """Outcomes of a network that is right on `clean` and stands on those of them in `images`."""
    index = np.asarray(index)
    is_clean = np.isin(index, clean)
    return outcomes(index, is_clean, is_clean & np.isin(index, images))


@pytest.fixture
def results():
    """One stands alone on 10 images, the reference on 20; each is right alone on 10 and 0."""
    return {
        "one": stands_on(range(40), clean=range(100)),
        "reference": stands_on(range(10, 60)),
        "same": stands_on(range(10, 60)),
    }


def test_discordant_pairs_are_counted_and_tested_as_by_hand(results):
    one = differences(results, "reference").set_index("model").loc["one"]
    assert (one["n"], one["only_model"], one["only_reference"]) == (100, 10, 20)
    # Exact McNemar: twice the chance of at most 10 heads among 30 tosses.
    heads = [1.0]
    for k in range(10):
        heads.append(heads[-1] * (30 - k) / (k + 1))
    p = 2 * sum(heads) / 2**30
    assert one["p"] == pytest.approx(p) and one["p_holm"] == pytest.approx(2 * p)
    assert one["robust_difference"] == pytest.approx(-0.10)
    margin = 1.96 * np.sqrt(30 - 100 / 100) / 100
    assert (one["low"], one["high"]) == pytest.approx((-0.1 - margin, -0.1 + margin))
    assert one["clean_difference"] == pytest.approx(0.10)
    assert one["clean_p"] == pytest.approx(2 / 2**10)
    assert one["clean_p_holm"] == pytest.approx(4 / 2**10)


def test_a_network_differs_from_itself_in_nothing(results):
    same = differences(results, "reference").set_index("model").loc["same"]
    zeros = ["robust_difference", "low", "high", "only_model", "only_reference", "clean_difference"]
    assert (same[zeros] == 0).all() and (same[["p", "p_holm", "clean_p"]] == 1).all()


def test_pairs_are_matched_by_index_not_by_position(results):
    order = np.random.default_rng(0).permutation(N)
    shuffled = stands_on(range(40), clean=range(100), index=order)
    pd.testing.assert_frame_equal(
        differences(results | {"one": shuffled}, "reference"), differences(results, "reference")
    )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (range(1, N + 1), "one and reference .* 2 are in one result only, such as index 0"),
        (range(N - 1), "one and reference .* 1 are in one result only, such as index 99"),
        ([0, *range(N - 1)], "image 0 is there twice"),
    ],
)
def test_other_images_are_refused(results, index, message):
    with pytest.raises(InputError, match=message):
        differences(
            {"reference": results["reference"], "one": stands_on(range(40), index=index)},
            "reference",
        )


def test_swapping_the_reference_flips_the_sign(results):
    pair = {name: results[name] for name in ("one", "reference")}
    (one,) = differences(pair, "reference").itertuples()
    (other,) = differences(pair, "one").itertuples()
    assert (other.model, other.reference) == ("reference", "one")
    assert other.robust_difference == -one.robust_difference
    assert (other.low, other.high) == (-one.high, -one.low)
    assert (other.only_model, other.only_reference) == (one.only_reference, one.only_model)
    assert other.p == one.p


def test_a_network_alone_has_no_differences(results):
    assert differences({"one": results["one"]}, "one").empty


def test_mcnemar_is_two_sided_and_exact():
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == mcnemar(6, 0) == pytest.approx(2 / 2**6)


def test_holm_corrects_as_by_hand():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert len(holm([])) == 0
