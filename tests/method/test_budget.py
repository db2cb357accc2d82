import itertools

import numpy as np
import pytest
import torch
from helpers import times_of
from scipy.optimize import Bounds, LinearConstraint, milp

from alter.backbones.noising import Flow
from alter.common.errors import InputError
from alter.method.budget import Budget, timestep_weights
from alter.method.hypernetwork import HyperNetwork, Logits
from alter.method.losses import log_ratio


def random_logits(experts, sites, spread=1.0, seed=0):
    source = torch.Generator().manual_seed(seed)
    return Logits(torch.randn(experts, sites, generator=source) * spread + 1,
                  torch.randn(1000, experts, generator=source))


def uneven_shares(sites, total=0.77):
    shares = np.random.default_rng(0).uniform(0.2, 2, sites)
    return shares / shares.sum() * total


def test_expected_ratio_equals_the_mean_of_samples():
    hyper = HyperNetwork(3, 6, times_of(Flow(1000)))
    logits = random_logits(3, 6)
    budget = Budget(uneven_shares(6), 0.6, "total")
    source = torch.Generator().manual_seed(0)
    share = torch.tensor(budget.share_L).float()
    sampled = []
    for _ in range(400):
        mask_EL, router_TE = hyper.sample(logits, source)
        sampled.append(budget.fixed + (router_TE @ mask_EL @ share).mean().item())
    assert budget.expected(logits).item() == pytest.approx(np.mean(sampled), abs=4 * np.std(sampled) / 20)


@pytest.mark.parametrize("over", ["total", "prunable"])
@pytest.mark.parametrize("experts, sites", [(4, 10), (10, 28), (10, 34)])
@pytest.mark.parametrize("keep", [0.4, 0.5, 0.65, 0.9])
def test_budgets_are_met(over, experts, sites, keep):
    budget = Budget(uneven_shares(sites), keep, over)
    mask_EL, expert_T = budget.masks(random_logits(experts, sites), keep)
    kept = mask_EL[expert_T] @ budget.share_L  # counted timestep by timestep
    total = (1 - budget.share_L.sum() + kept).mean()
    again = budget.masks(random_logits(experts, sites), keep)
    assert np.array_equal(mask_EL, again[0]) and np.array_equal(expert_T, again[1])
    measured = total if over == "total" else kept.mean() / budget.share_L.sum()
    assert abs(measured - keep) <= 0.005
    assert measured == pytest.approx(budget.measured(mask_EL, expert_T))


def test_masks_are_the_most_probable_within_the_budget_by_brute_force():
    budget = Budget(uneven_shares(5, 0.9), 0.6, "total")
    logits = random_logits(2, 5, spread=3.0)
    mask_EL, expert_T = budget.masks(logits, 0.6)
    values = logits.mask_EL.double().numpy()
    best = max(
        (values * np.reshape(bits, (2, 5))).sum()
        for bits in itertools.product([0, 1], repeat=10)
        if abs(budget.measured(np.reshape(bits, (2, 5)), expert_T) - 0.6) <= 0.004
        and np.reshape(bits, (2, 5)).any(axis=1).all()
    )
    found = (values * mask_EL).sum()
    assert found <= best + 1e-9 and found >= best - 0.011 * abs(best)


def by_integer_programme(logits, budget, keep_ratio, tolerance):
    """The most probable masks within the tolerance, with a site in every expert that has a timestep; None without
    any."""
    values = logits.mask_EL.double().numpy()
    experts, sites = values.shape
    expert_T = logits.router_TE.argmax(-1).numpy()
    weight_E = np.bincount(expert_T, timestep_weights(1000, budget.timesteps), minlength=experts)
    cost = (weight_E[:, None] * budget.share_L / budget.scale).ravel()
    serving = np.unique(expert_T)
    rows = np.kron(np.eye(experts), np.ones(sites))[serving]
    found = milp(-values.ravel(), integrality=np.ones(cost.size), bounds=Bounds(0, 1), constraints=[
        LinearConstraint(cost[None], keep_ratio - budget.fixed - tolerance, keep_ratio - budget.fixed + tolerance),
        LinearConstraint(rows, 1, np.inf)])
    return None if found.x is None else found.x.round().reshape(experts, sites).astype(bool)


@pytest.mark.parametrize("experts", range(1, 11))
def test_masks_are_nearly_those_of_an_integer_programme(experts):
    """On random shares, logits, routes, targets and counted timesteps; wherever the programme has a solution."""
    random = np.random.default_rng(experts)
    gaps = []
    for _ in range(25):
        sites = int(random.integers(4, 36))
        shares = random.dirichlet(np.full(sites, random.choice([1.0, 5.0, 50.0]))) * random.uniform(0.5, 1.0)
        over, keep = random.choice(["total", "prunable"]), random.uniform(0.35, 0.95)
        timesteps = None if random.random() < 0.5 else np.sort(random.choice(1000, 20, replace=False))
        mask_EL = random.normal(random.uniform(-1, 3), random.uniform(0.3, 3), (experts, sites))
        router_TE = random.normal(0, 2, experts) + random.normal(0, random.choice([0.1, 1.0]), (1000, experts))
        logits = Logits(torch.from_numpy(mask_EL), torch.from_numpy(router_TE))
        if over == "total" and keep < 1 - shares.sum() + shares.min():
            continue
        budget = Budget(shares, keep, str(over), timesteps)
        best = by_integer_programme(logits, budget, keep, 0.004)
        mask_EL, expert_T = budget.masks(logits, keep)
        again = budget.masks(logits, keep)
        assert np.array_equal(mask_EL, again[0]) and np.array_equal(expert_T, again[1])
        assert mask_EL[np.unique(expert_T)].any(axis=1).all()
        if best is None:
            continue
        assert abs(budget.measured(mask_EL, expert_T) - keep) <= 0.005
        values = logits.mask_EL.numpy()
        gaps.append(((values * best).sum() - (values * mask_EL).sum()) / np.abs(values).sum())
    assert len(gaps) >= 10 and np.median(gaps) <= 1e-3 and np.mean(gaps) <= 0.01, gaps


def test_coarse_sites_come_as_near_as_they_can():
    budget = Budget(np.full(3, 1 / 3), 0.5, "total")
    logits = Logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(10, 1))
    mask_EL, expert_T = budget.masks(logits, 0.5)
    assert budget.measured(mask_EL, expert_T) == pytest.approx(2 / 3)  # 1/3 is as near and less probable
    assert mask_EL.tolist() == [[False, True, True]]


def test_no_used_expert_is_all_off():
    budget = Budget(np.full(10, 0.1), 0.4, "total")
    mask = torch.full((3, 10), 4.0)
    mask[1] = -9.0
    routes = torch.zeros(30, 3)
    routes[torch.arange(30), torch.arange(30) % 2] = 5.0  # the third expert is never used
    mask_EL, expert_T = budget.masks(Logits(mask, routes), 0.4)
    assert set(expert_T) == {0, 1}
    assert mask_EL[:2].any(axis=1).all()


def test_target_below_the_unprunable_share_names_that_share():
    with pytest.raises(InputError, match=r"budget.keep_ratio=0.2 .*0\.28"):
        Budget(np.full(10, 0.08), 0.2, "total")


def test_the_expected_ratio_has_a_gradient_at_the_start():
    """At offset 4 the ratio of deterministic masks has none: the expectation must move the budget alone."""
    torch.manual_seed(0)
    hyper = HyperNetwork(4, 10, times_of(Flow(1000)))
    budget = Budget(np.full(10, 0.1), 0.65, "total")
    optimizer = torch.optim.AdamW(hyper.parameters(), 5e-3)
    start = budget.expected(hyper()).item()
    for _ in range(300):
        log_ratio(budget.expected(hyper()), 0.65).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert start > 0.97
    assert budget.expected(hyper()).item() == pytest.approx(0.65, abs=0.02)
