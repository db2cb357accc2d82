"""Which expert serves which timestep: contiguous routes, equal shares at first."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import times_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import logistic

from alter.backbones.noising import Betas, Flow
from alter.method.budget import rows_of, timestep_weights
from alter.method.routers import SLOW, OrderedRouter, Times, make_router, slow_features

NOISINGS = {
    "linear": Betas(DDPMScheduler().alphas_cumprod), "cosine": Betas(DDPMScheduler(
        beta_schedule="squaredcos_cap_v2").alphas_cumprod),
    "zero snr": Betas(DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod), "flow": Flow(1000)}
noisings = pytest.mark.parametrize("noising", NOISINGS.values(), ids=NOISINGS)


def routes(router):
    return router().argmax(1).numpy()


@given(st.sampled_from(sorted(NOISINGS)), st.integers(2, 12), st.floats(0.0, 20.0), st.integers(0, 2**31))
@settings(deadline=None)
def test_ordered_routes_are_contiguous_whatever_is_learned(name, experts, spread, seed):
    router = make_router("ordered", experts, times_of(NOISINGS[name]))
    with torch.no_grad():
        router.moved_K += spread * torch.randn(experts - 1, generator=torch.Generator().manual_seed(seed))
    assert (np.diff(routes(router)) >= 0).all()
    router().square().mean().backward()
    assert router().isfinite().all() and router.moved_K.grad.isfinite().all()


@noisings
@pytest.mark.parametrize("experts", [2, 4, 10])
def test_ordered_probabilities_are_differences_of_logistic_distribution_functions(noising, experts):
    times = times_of(noising)
    router = make_router("ordered", experts, times).double()
    with torch.no_grad():
        router.moved_K += torch.linspace(-1, 1, experts - 1)
    raw_K = (router.start_K + router.moved_K).detach().numpy()
    cuts = np.concatenate([[-np.inf], np.cumsum([raw_K[0], *(np.log1p(np.exp(raw_K[1:])) + 1e-3)]), [np.inf]])
    x_T = -times.log_snr_T.double().numpy() / float(router.unit)
    expected = -np.diff(logistic.cdf((x_T[:, None] - cuts) / float(router.scale)), axis=1)
    assert np.allclose(router().exp().detach().numpy(), expected, atol=1e-9)
    assert torch.allclose(router().exp().sum(1), torch.ones(1000, dtype=torch.float64))


@noisings
@pytest.mark.parametrize("experts", [2, 4, 10])
@pytest.mark.parametrize("visited", [None, np.linspace(30, 970, 20).astype(int), np.array([5, 5, 5, 5, 400, 800, 900])],
                         ids=["all", "even", "uneven"])
def test_ordered_experts_begin_with_equal_shares_of_the_budgets_weights(noising, experts, visited):
    times = times_of(noising, visited)
    router = make_router("ordered", experts, times)
    for probability_TE in (np.eye(experts)[routes(router)], router().softmax(1).detach().numpy()):
        assert np.abs(times.weight_T @ probability_TE * experts - 1).max() < 0.2


@pytest.mark.parametrize("experts", [2, 4, 6])
def test_of_few_visited_timesteps_each_has_its_own_expert(experts):
    visited = np.array([250, 500, 750, 999])
    times = times_of(Flow(1000), visited, only=True)
    expert_V = routes(make_router("ordered", experts, times))[visited]
    assert len(set(expert_V)) == min(experts, 4) and (np.diff(expert_V) >= 0).all()


@noisings
def test_cut_points_go_where_they_are_put(noising):
    router = make_router("ordered", 4, times_of(noising))
    router.place([100, 450, 800])
    # Two neighbours' probabilities cross at their cut point, up to what a third one takes (more beside a narrow one).
    assert np.abs(np.flatnonzero(np.diff(routes(router))) + 1 - [100, 450, 800]).max() <= 40
    visited = times_of(noising, np.array([100, 300, 500, 700, 900]), only=True)
    router = make_router("ordered", 3, visited)
    router.place([290, 690])  # the nearest places between two visited timesteps: 201 and 601
    assert [routes(router)[t] for t in (100, 300, 500, 700, 900)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("low, high", [(875, 1001), (0, 875)])
@pytest.mark.parametrize("experts", [2, 3])
def test_one_of_two_backbones_has_cut_points_at_its_own_timesteps(low, high, experts):
    """The other's timesteps are served as the nearest of those that its sampler visits."""
    noising = Flow(1000, within=(low, high))
    visited = np.arange(5, 1000, 10)[(np.arange(5, 1000, 10) >= low) & (np.arange(5, 1000, 10) < high)]
    own = noising.trained.numpy()
    times = times_of(noising, visited)
    served = torch.from_numpy(own[rows_of(own, visited, 1000)])
    times = Times(times.features_TD, times.log_snr_T[served], times.weight_T, times.place_T)
    expert_T = routes(make_router("ordered", experts, times))
    assert (np.diff(expert_T[own]) >= 0).all()
    assert np.abs(np.bincount(expert_T, times.weight_T, experts) * experts - 1).max() < 0.25


def test_one_expert_or_one_timestep_needs_no_cut_points():
    assert not list(make_router("ordered", 1, times_of(Flow(1000))).parameters())
    router = make_router("ordered", 3, times_of(Flow(1000), np.array([999]), only=True))
    assert isinstance(router, OrderedRouter) and len(set(routes(router))) == 1


def test_the_smooth_router_sees_only_slow_sinusoids_and_starves_nobody():
    features_TD = slow_features(1000)
    slope = features_TD.double().diff(dim=0).abs().amax(0)
    assert (slope <= 2 * np.pi / SLOW).all()
    crossings = (features_TD[1:] * features_TD[:-1] < 0).sum(0)
    assert crossings.max() <= 2 * 1000 / SLOW
    for weight_T in (timestep_weights(1000, None), timestep_weights(1000, np.array([900, 950, 990]))):
        torch.manual_seed(0)
        times = times_of(NOISINGS["linear"], features_TD=features_TD)
        times = Times(times.features_TD, times.log_snr_T, weight_T, times.place_T)
        router = make_router("smooth", 4, times)
        assert np.allclose(weight_T @ router().detach().double().numpy(), 0, atol=1e-6)
        switches = (np.diff(routes(router)) != 0).sum()
        assert 0 < switches < 30 and len(set(routes(router))) == 4
