"""The best masks of a family for every budget, against trying every one; and what they gain."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from alter.method.allocation import Frontier, gain, interval, smoothed
from alter.method.planning import Front, between, choose_steps, covered, routes, step_losses


def tried(loss_MB, cost_MB, intervals, budget):
    """Every choice of a mask for every bin: the least loss within the budget, inf if there is none."""
    masks, bins = loss_MB.shape
    best = np.inf
    for choice in itertools.product(range(masks), repeat=bins):
        rows = np.array(choice), np.arange(bins)
        runs = 1 + np.count_nonzero(np.diff(choice))
        if (intervals is None or runs <= intervals) and cost_MB[rows].sum() <= budget:
            best = min(best, loss_MB[rows].sum())
    return best


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.sampled_from([1, 2, 3, None]), st.integers(0, 10**6))
def test_the_best_choice_is_that_of_trying_all(masks, bins, intervals, seed):
    """Costs are multiples of 1/40 here, so that no rounding can hide a choice."""
    source = np.random.default_rng(seed)
    loss_MB = source.uniform(size=(masks, bins))
    cost_MB = source.integers(1, 9, size=(masks, 1)) * source.integers(1, 6, size=bins) / 40
    frontier = Frontier(loss_MB, cost_MB, intervals)
    for budget in source.uniform(cost_MB.min(0).sum(), cost_MB.max(0).sum(), 4):
        expected = tried(loss_MB, cost_MB, intervals, budget)
        if np.isinf(expected):
            with pytest.raises(ValueError, match="the cheapest choice costs"):
                frontier.within(budget)
            continue
        found = frontier.within(budget)
        rows = found.mask_B, np.arange(bins)
        assert found.loss == pytest.approx(expected) and found.loss == pytest.approx(loss_MB[rows].sum())
        assert found.cost == pytest.approx(cost_MB[rows].sum()) and found.cost <= budget * (1 + 1e-9)
        assert intervals is None or 1 + np.count_nonzero(np.diff(found.mask_B)) <= intervals


def test_a_greater_budget_never_loses_more():
    source = np.random.default_rng(3)
    loss_MB = np.sort(source.uniform(size=(13, 20)), axis=0)
    cost_MB = np.linspace(1, 0.2, 13)[:, None] * np.full(20, 1 / 20)
    frontier = Frontier(loss_MB, cost_MB, 4)
    losses = [frontier.within(budget).loss for budget in np.linspace(0.21, 1, 30)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(loss_MB.min(axis=0).sum() if (loss_MB[0] == loss_MB.min(axis=0)).all() else
                                       losses[-1])


def test_of_one_interval_the_frontier_is_the_best_mask_that_fits():
    source = np.random.default_rng(4)
    loss_MB, cost_MB = source.uniform(size=(6, 5)), source.uniform(size=(6, 1)) * np.full(5, 0.2)
    for budget in (cost_MB.sum(1).min(), 0.5, cost_MB.sum(1).max()):
        expected = loss_MB.sum(axis=1)[cost_MB.sum(axis=1) <= budget * (1 + 1e-9)].min()
        assert Frontier(loss_MB, cost_MB, 1).within(budget).loss == pytest.approx(expected)


@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_the_gain_is_found_where_there_is_one_and_not_in_noise(effect):
    """Losses that fall with depth, everywhere alike or much faster in the later bins; noise of each sample on top."""
    source = np.random.default_rng(5)
    share_M = np.linspace(1, 0.25, 10)
    steep_B = np.exp(effect * np.linspace(-1, 1, 8))
    loss_MB = (1 - share_M)[:, None] ** 2 * steep_B
    loss_MBS = loss_MB[..., None] * source.lognormal(0, 0.5, size=(1, 8, 64)) * source.lognormal(0, 0.2, (10, 8, 64))
    found = gain(loss_MBS, share_M[:, None] * np.full(8, 1 / 8), 0.6, 4, np.arange(64))
    assert found.low <= found.mean <= found.high
    assert (found.low > 0.2) if effect else (found.low < 0.02)


def test_every_timestep_belongs_to_the_step_that_covers_it():
    visited = np.array([900, 500, 100])
    step_T = covered(visited, 1000)
    assert step_T[[0, 100, 101, 500, 501, 900, 901, 999]].tolist() == [2, 2, 1, 1, 0, 0, 0, 0]
    loss_MB = np.array([[2.0, 8.0]])
    losses = step_losses(loss_MB, (0, 500, 1000), visited)
    assert losses.sum() == pytest.approx(10)  # nothing is lost or counted twice
    assert losses[0].tolist() == pytest.approx([8 * 499 / 500, 2 * 399 / 500 + 8 / 500, 2 * 101 / 500])


def test_routes_give_each_visited_timestep_its_own_mask():
    visited, masks = np.array([999, 600, 200, 10]), np.array([3, 1, 2, 0])
    assert routes(masks, visited, 1000)[visited].tolist() == masks.tolist()


def test_the_front_is_never_behind_fewer_dense_steps():
    """The dense model at fewer steps is one of its options; and its prediction is the sum that it claims to be."""
    source = np.random.default_rng(6)
    cost_M = np.linspace(1, 0.3, 6)
    visited = {steps: np.linspace(999, 1000 // steps, steps).round().astype(int) for steps in range(2, 9)}
    loss_MB = (1 - cost_M)[:, None] ** 2 * source.uniform(size=10)
    losses = {steps: step_losses(loss_MB, tuple(range(0, 1001, 100)), at) for steps, at in visited.items()}
    front = Front(losses, cost_M, {steps: 1 / steps**2 for steps in losses}, full=0)
    for steps in losses:
        dense, planned = front.with_mask(steps, 0), front.within(float(steps))
        assert planned.error <= dense.error + 1e-12 and planned.cost <= steps + 1e-9
        lost = losses[planned.steps][planned.mask_N, np.arange(planned.steps)].sum()
        assert planned.error == pytest.approx(1 / planned.steps**2 + lost)
        as_good = front.cheapest(dense.error)
        assert as_good.error <= dense.error and as_good.cost <= steps + 1e-9
    tuned = {steps: loss + 0.02 for steps, loss in losses.items()}  # full depth is not the dense model's
    front = Front(tuned, cost_M, front.discretisation, full=0, dense=True)
    for steps in losses:
        options = [front.within(float(steps)), front.everything(steps), front.fewer_steps(steps + 0.5)]
        assert options[0].error <= options[1].error == options[2].error == 1 / steps**2
        assert options[0].dense or options[0].error < 1 / steps**2
    with pytest.raises(ValueError, match="cheapest"):
        front.within(0.5)
    with pytest.raises(ValueError, match="least that is predicted"):
        front.cheapest(1e-9)
    assert front.fewer_steps(1.5) is None


@pytest.mark.parametrize("period", [2, 3, 4])
def test_a_cached_option_takes_as_many_steps_as_it_can(period):
    """And of the masks that fit the one that loses least, against a loop over all of them."""
    source = np.random.default_rng(period)
    cost_M, losses = np.array([1.0, 0.7, 0.4, 0.4]), {steps: source.uniform(size=(4, steps)) for steps in range(2, 9)}
    front = Front(losses, cost_M, {steps: 1 / steps for steps in losses}, full=0)
    for budget in np.linspace(1.4, 8, 12):
        found = front.cached(budget, period)
        choices = []
        for steps, loss in losses.items():
            whole = [n for n in range(steps) if n % period == 0]
            others = [n for n in range(steps) if n % period != 0]
            choices += [(-steps, loss[mask, others].sum(), mask, loss[0, whole].sum()) for mask in (1, 2, 3)
                        if len(whole) + cost_M[mask] * len(others) <= budget * (1 + 1e-9)]
        negative, lost, mask, always = min(choices)
        assert found.steps == -negative and found.cached and found.cost <= budget * (1 + 1e-9)
        assert found.mask_N.tolist() == [0 if n % period == 0 else mask for n in range(found.steps)]
        assert found.error == pytest.approx(1 / found.steps + lost + always)
    assert front.cached(1.39, period) is None


def test_the_steps_chosen_are_the_best_of_all():
    """Against every choice of steps, each rest by least squares on the vectors themselves."""
    source = np.random.default_rng(3)
    outputs = source.standard_normal((7, 3)).cumsum(axis=0)
    weight_N = source.uniform(0.1, 1, 7)

    def loss(taken):
        total = 0.0
        for n in range(7):
            if n in taken:
                continue
            known = outputs[[step for step in taken if step < n][-2:]]
            fit = np.linalg.lstsq(known.T, outputs[n], rcond=None)[0]
            total += weight_N[n] * np.square(outputs[n] - fit @ known).sum()
        return total

    chosen = choose_steps(outputs @ outputs.T, weight_N)
    assert sorted(chosen) == [1, 2, 3, 4, 5, 6, 7] and chosen[7].tolist() == [*range(7)]
    for steps, taken in chosen.items():
        least = min(loss((0, *others)) for others in itertools.combinations(range(1, 7), steps - 1))
        assert len(taken) == steps and loss(taken.tolist()) == pytest.approx(least, rel=1e-4, abs=1e-4)


def test_discretisation_between_measured_numbers_of_steps():
    assert between({2: 1 / 4, 8: 1 / 64}, 4) == pytest.approx(1 / 16)


def test_the_gain_over_nothing_lost_is_nothing():
    found = gain(np.zeros((3, 4, 6)), np.array([[1.0], [0.7], [0.4]]) * np.full(4, 0.25), 1.0, 2, np.arange(6))
    assert (found.mean, found.low, found.high) == (0, 0, 0)



def test_what_noise_explains_is_smoothed_away():
    """Losses on a straight line in logarithms, with noise of the samples, come nearer to it but at both ends."""
    source = np.random.default_rng(7)
    line_MB = np.log([[1.0], [3.0]]) - np.linspace(0, 5, 20)
    before, after = [], []
    for _ in range(50):
        loss_MBS = np.exp(line_MB)[..., None] * source.gamma(2, 0.5, (2, 20, 64))
        measured_MB, smooth_MB = np.log(loss_MBS.mean(2)), np.log(smoothed(loss_MBS))
        assert np.array_equal(smooth_MB[:, [0, -1]], measured_MB[:, [0, -1]])
        before.append(((measured_MB - line_MB)[:, 1:-1] ** 2).mean())
        after.append(((smooth_MB - line_MB)[:, 1:-1] ** 2).mean())
    assert np.mean(after) < 0.6 * np.mean(before)  # of independent noise, equal weights of three bins would leave 1/3


def test_the_smoothed_loss_is_the_best_linear_estimate():
    """Of independent noise in three bins it is known: x - d·v / (v + v/2 + s), here with all of d² beyond the noise in
    s, where the noise is found by taking every sample apart."""
    source = np.random.default_rng(8)
    loss_MBS = np.array([1.0, 1.3, 1.1])[:, None] * source.lognormal(0, 0.3, (1, 3, 10_000))
    x_B = np.log(loss_MBS.mean(2))[0]
    v = (np.exp(0.3**2) - 1) / 10_000  # of the logarithm of a mean
    d = x_B[1] - (x_B[0] + x_B[2]) / 2
    assert np.log(smoothed(loss_MBS))[0, 1] == pytest.approx(x_B[1] - d * v / d**2, abs=1e-4)


def test_what_all_bins_share_and_what_has_no_noise_stays():
    source = np.random.default_rng(9)
    curve_MB = source.uniform(1, 2, (3, 8))
    shared = curve_MB[..., None] * source.lognormal(0, 1, 16)  # no bend is of noise
    assert smoothed(shared) == pytest.approx(shared.mean(2))
    assert smoothed(curve_MB[..., None]) == pytest.approx(curve_MB)
    shared[0] = 0
    assert (smoothed(shared)[0] == 0).all()


def test_the_interval_of_a_mean():
    """Of a Gaussian, 1.645 standard errors to both sides; images that serve twice tell nothing new."""
    loss_S = np.random.default_rng(10).normal(5, 1, 400)
    expected = scipy.stats.norm.interval(0.9, loss_S.mean(), loss_S.std() / 20)
    assert interval(loss_S, np.arange(400), rounds=20_000) == pytest.approx(expected, abs=0.005)
    twice = interval(np.tile(loss_S, 2), np.tile(np.arange(400) + 7, 2), rounds=20_000)
    assert twice == pytest.approx(expected, abs=0.005)
    low, high = interval(loss_S, np.zeros(400, int))
    assert low < loss_S.mean() < high


def test_no_image_chooses_and_judges():
    """Each image has a mask of its own that is best of all: whoever chose by it would gain."""
    source = np.random.default_rng(11)
    loss_MBI = 1 + source.uniform(size=(6, 4, 4))
    loss_MBS = np.concatenate([loss_MBI, loss_MBI + 1e-6 * source.uniform(size=(6, 4, 4))], axis=2)
    cost_MB = np.full((6, 4), 0.25)
    seen, apart = (gain(loss_MBS, cost_MB, 1.0, 4, images) for images in (np.arange(8), np.tile(np.arange(4), 2)))
    assert apart.mean < seen.mean - 0.02
