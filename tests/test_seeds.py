"""The statistics over seeds and images, on studies whose true differences are known."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from kaf_study import InputError
from kaf_study.seeds import Spread, difference, estimate, spread, verdicts

# Of the networks of this study: between two of them 8.5 % of the images are discordant, and the
# accuracy differs from seed to seed by 0.3 points (standard deviation).
SHARED, OWN = 0.9615, 0.01
SEED_SD = 0.003


def simulated(rng, accuracy, *, studies, seeds=3, n=10_000, seed_sd=SEED_SD):
    """Outcomes {activation: bool (studies, seeds, n)} whose expectations are {activation: p}.

    Image i stands where a standard normal, most of it the image's, some the activation's with the
    image, the rest the seed's with the image, is below a threshold that differs with the seed.
    """
    found = {}
    image = np.sqrt(SHARED) * rng.standard_normal((studies, 1, n), dtype="float32")
    for name, p in accuracy.items():
        z = norm.ppf(p)
        spread_of_z = seed_sd / norm.pdf(z)
        threshold = rng.normal(z * np.sqrt(1 + spread_of_z**2), spread_of_z, (studies, seeds, 1))
        own = np.sqrt(OWN) * rng.standard_normal((studies, 1, n), dtype="float32")
        value = rng.standard_normal((studies, seeds, n), dtype="float32")
        value *= np.float32(np.sqrt(1 - SHARED - OWN))
        value += image
        value += own.astype("float32")
        found[name] = value < threshold.astype("float32")
    return found


class Simulation:
    """`total` studies of four activations, of which the first is `gain` above the others."""

    NAMES = "abcd"
    PAIRS = (("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d"))

    def __init__(self, gain, total, n, seed_sd, part=20):
        rng = np.random.default_rng(0)
        self.accuracy = dict.fromkeys(self.NAMES, 0.38) | {"a": 0.38 + gain}
        self.true = np.array([self.accuracy[a] - self.accuracy[b] for a, b in self.PAIRS])
        covers, covers_mean, said, self.discordance, self.sd = [], [], [], [], []
        for _ in range(total // part):
            results = simulated(rng, self.accuracy, studies=part, n=n, seed_sd=seed_sd)
            noise = spread(results)
            found = [difference(results, *pair, noise) for pair in self.PAIRS]
            covers.append([self.holds(one, d) for one, d in zip(found, self.true, strict=True)])
            means = [(estimate(results, {a: 1.0}, noise), p) for a, p in self.accuracy.items()]
            covers_mean.append([self.holds(one, p) for one, p in means])
            values, different, equal = (
                np.array([get(one) for one in found]).T
                for get in (lambda e: e.value, lambda e: e.p_different, lambda e: e.p_equal())
            )
            said += [verdicts(*row)[0] for row in zip(values, different, equal, strict=True)]
            self.discordance.append((results["a"][:, 0] != results["b"][:, 0]).mean())
            self.sd.append(noise.sd)
        self.coverage = np.mean(covers)
        self.coverage_of_means = np.mean(covers_mean)
        self.said = np.array(said)  # (total, pairs)

    @staticmethod
    def holds(found, truth):
        low, high = found.interval()
        return (low <= truth) & (truth <= high)

    def any_false(self, margin=0.01):
        """Share of studies with a false verdict on any pair."""
        difference = np.round(self.true, 12)
        false = (self.said == "more") & (difference <= 0) | (self.said == "less") & (
            difference >= 0
        )
        false |= (self.said == "equal") & (np.abs(difference) >= margin)
        return false.any(axis=1).mean()


@pytest.fixture(scope="module")
def no_difference():
    return Simulation(0.0, total=400, n=2_000, seed_sd=SEED_SD * np.sqrt(5))


@pytest.fixture(scope="module")
def one_point():
    return Simulation(0.01, total=200, n=10_000, seed_sd=SEED_SD)


def test_intervals_hold_the_true_difference_in_95_percent_of_studies(no_difference, one_point):
    for simulation in (no_difference, one_point):
        assert 0.93 < simulation.coverage < 0.975
        assert 0.92 < simulation.coverage_of_means < 0.98


def test_false_verdicts_are_5_percent_for_the_whole_family(no_difference, one_point):
    for simulation in (no_difference, one_point):
        assert simulation.any_false() < 0.07  # 5 % and two standard errors


def test_one_point_is_seen_with_3_seeds_and_10000_images(one_point):
    """In half of the studies after correction for 6 comparisons, never the wrong way round."""
    assert np.mean(one_point.discordance) == pytest.approx(0.085, abs=0.002)
    assert (one_point.said[:, :3] == "more").mean() > 0.45
    assert not (one_point.said[:, :3] == "less").any()
    assert (one_point.said[:, 3:] == "equal").mean() > 0.3


def test_a_bootstrap_over_three_seeds_is_too_narrow():
    """Why the intervals are not percentiles: with all variance from seeds, it covers 4 in 5."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 1, (2, 2000, 3))  # true difference 0
    drawn = rng.integers(0, 3, (2, 200, 2000, 3))
    means = [
        np.take_along_axis(x[None], i, -1).mean(axis=-1) for x, i in zip(seeds, drawn, strict=True)
    ]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975], axis=0)
    assert ((low <= 0) & (0 <= high)).mean() == pytest.approx(0.8, abs=0.03)


def test_difference_is_the_one_computed_by_hand():
    """Two activations, two and three seeds, four images: the crossed table written out."""
    x = {
        "a": np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool),
        "b": np.array([[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]], bool),
    }
    seed_squares = 2 * (1 / 8) ** 2 + (1 / 6) ** 2 + 2 * (1 / 12) ** 2  # 1/2, 1/4; 1/4, 1/2, 1/2
    noise = spread(x)
    assert noise.df == 3 and noise.seed == pytest.approx(seed_squares / 3)
    residual = 0.0
    for table in x.values():
        rest = table - table.mean(axis=0) - table.mean(axis=1)[:, None] + table.mean()
        residual += (rest**2).sum()
    assert noise.rest == pytest.approx(residual / 9)
    found = difference(x, "a", "b", noise)
    share = 1 / 2 + 1 / 3
    of_seeds = share * noise.seed
    image = np.array([1, 1 / 2, -1, -2 / 3])
    of_images = (image.var(ddof=1) - share * noise.rest) / 4
    assert found.value == pytest.approx(3 / 8 - 5 / 12) and of_images > 0
    assert found.error**2 == pytest.approx(of_seeds + of_images)
    df = (of_seeds + of_images) ** 2 / (of_seeds**2 / 3 + of_images**2 / 3)
    assert found.df == pytest.approx(df)
    reach = student.ppf(0.975, df) * found.error
    assert found.interval() == pytest.approx((found.value - reach, found.value + reach))


def test_p_values_agree_with_intervals():
    """p is 5 % where the 95 % interval ends at 0, and of equality where the 90 % one at 1 point."""
    x = simulated(np.random.default_rng(1), {"a": 0.4, "b": 0.38}, studies=1, n=500)
    one = difference(x, "a", "b", spread(x))
    reach = one.interval()[1] - one.value
    at_zero = type(one)(reach, one.error, one.df)
    assert at_zero.p_different == pytest.approx(0.05)
    reach = one.interval(0.90)[1] - one.value
    for sign in (1, -1):
        at_margin = type(one)(sign * (0.1 - reach), one.error, one.df)
        assert at_margin.p_equal(0.1) == pytest.approx(0.05)
    assert type(one)(np.array([0.2]), one.error, one.df).p_equal(0.1) > 0.5


def test_difference_is_paired_by_image():
    """Seeds that agree with each other: what is left is the difference from image to image."""
    a = np.repeat(np.arange(1000)[None] < 400, 3, axis=0)
    b = np.repeat(np.arange(1000)[None] < 380, 3, axis=0)
    found = difference({"a": a, "b": b}, "a", "b", spread({"a": a, "b": b}))
    assert found.value == pytest.approx(0.02)
    assert found.error == pytest.approx(np.sqrt(0.02 * 0.98 / 999))
    assert found.df == pytest.approx(999)


def test_networks_that_agree_on_every_image_are_equal():
    x = np.repeat(np.arange(100)[None] < 40, 3, axis=0)
    found = difference({"a": x, "b": x}, "a", "b", spread({"a": x, "b": x}))
    assert found.interval() == pytest.approx((0, 0), abs=1e-12)
    assert (found.p_different, found.p_equal()) == (1, 0)


def test_one_seed_of_each_says_nothing():
    x = simulated(np.random.default_rng(0), {"a": 0.6, "b": 0.3}, studies=1, seeds=1, n=500)
    noise = spread(x)
    found = difference(x, "a", "b", noise)
    assert noise.df == 0 and np.isinf(found.error)
    assert verdicts(found.value, found.p_different, found.p_equal())[0] == ["undecided"]


def test_an_activation_of_one_seed_borrows_the_spread_of_the_others():
    rng = np.random.default_rng(0)
    x = simulated(rng, {"a": 0.4, "b": 0.38}, studies=1, n=500)
    x["a"] = x["a"][:, :1]
    noise = spread(x)
    assert noise.df == 2 and np.isfinite(difference(x, "a", "b", noise).error)


def test_verdicts_are_corrected_for_what_can_be_true_together():
    """k comparisons, 2 k hypotheses, of which k can be true: factors k, ..., k, k - 1, ..., 1."""
    said, different, equal = verdicts(
        [0.02, -0.02, 0.001, 0.005], [0.001, 0.012, 0.6, 0.2], [0.9, 0.9, 0.012, 0.3]
    )
    assert said.tolist() == ["more", "less", "equal", "undecided"]
    np.testing.assert_allclose(different[:2], [0.004, 0.048])
    assert equal[2] == pytest.approx(0.048)
    said, *_ = verdicts([0.02] * 4, [0.0126] * 4, [0.9] * 4)
    assert said.tolist() == ["undecided"] * 4


def test_a_small_difference_that_is_certain_is_a_difference():
    said, *_ = verdicts([0.004], [0.001], [0.001])
    assert said.tolist() == ["more"]


def test_activations_on_other_numbers_of_images_are_refused():
    with pytest.raises(InputError, match="5 of a, 4 of b"):
        spread({"a": np.ones((2, 5), bool), "b": np.ones((2, 4), bool)})


def test_spread_is_what_was_put_in(one_point):
    """Between seeds: 0.3 points, and a little from the images on which seeds differ by chance."""
    assert 0.003 < np.sqrt(np.mean(np.square(one_point.sd))) < 0.0036
    assert Spread(np.array(0.0004), np.array(0.0), 3).sd == pytest.approx(0.02)
