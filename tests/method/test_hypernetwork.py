import pytest
import torch
from helpers import times_of

from alter.backbones.draws import draw
from alter.backbones.noising import Flow
from alter.method.hypernetwork import HyperNetwork, Logits

ROUTERS = ("learned", "smooth", "ordered", "uniform")


def hypernetwork(experts, sites, **options):
    return HyperNetwork(experts, sites, times_of(Flow(1000), features_TD=torch.randn(1000, 8)), **options)


def test_it_starts_nearly_all_active():
    torch.manual_seed(0)
    logits = hypernetwork(10, 34)()
    assert logits.mask_EL.shape == (10, 34) and logits.router_TE.shape == (1000, 10)
    assert abs(logits.mask_EL.sigmoid().mean().item() - 0.982) < 0.01


def test_codes_are_orthogonal_and_frozen():
    hyper = hypernetwork(2, 8)
    codes = hyper.expert_generator.Z_ELK.view(16, 64)
    assert torch.allclose(codes @ codes.T, torch.eye(16), atol=1e-5)
    assert "expert_generator.Z_ELK" in hyper.state_dict()
    assert all("Z_ELK" not in name for name, _ in hyper.named_parameters())


def test_the_uniform_router_has_equal_intervals_and_nothing_to_train():
    hyper = hypernetwork(4, 3, router="uniform")
    _, router_TE = hyper.sample(hyper(), torch.Generator().manual_seed(0))
    assert torch.equal(router_TE.argmax(1), torch.arange(1000) // 250)
    assert not list(hyper.temporal_router.parameters())


def test_sampling_reaches_every_parameter_and_the_logits_are_deterministic():
    hyper = hypernetwork(3, 5)
    assert torch.equal(hyper().mask_EL, hyper().mask_EL)
    mask_EL, router_TE = hyper.sample(hyper(), torch.Generator().manual_seed(0))
    (router_TE @ mask_EL).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hyper.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_its_state_is_all_that_another_one_needs(router):
    """Codes, sinusoids, offsets and the places where routers begin are part of it."""
    hyper, other = (hypernetwork(3, 5, router=router) for _ in range(2))
    hyper.offset_EL.copy_(torch.arange(15.0).view(3, 5))
    if router == "ordered":
        hyper.temporal_router.place([100, 500])
    other.load_state_dict(hyper.state_dict())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hyper(), other(), strict=True))


def noise(count, experts, sites, step=0):
    """Uniform numbers of a global batch of `count` samples."""
    return draw(Flow(1000), count, 0.0, 0, step).uniform((experts, sites + 1), stream=1)


@pytest.mark.parametrize("router", ROUTERS)
def test_means_of_draws_per_sample_are_the_probabilities(router):
    """Of a sample at timestep t, site l is kept with probability Σ_e softmax(router)_te·σ(mask_el): the expected
    share of the budget is the same as with one draw for all."""
    torch.manual_seed(0)
    hyper = hypernetwork(3, 5, router=router, offset=0.5)
    with torch.no_grad():
        logits = hyper()
        logits.mask_EL.copy_(torch.linspace(-2, 2, 15).view(3, 5))
        rows = torch.tensor([40, 500, 930]).repeat(6000)
        mask_BL = hyper.sample_each(logits, rows, noise(len(rows), 3, 5))
    assert set(mask_BL.unique().tolist()) == {0.0, 1.0}
    expected = logits.router_TE.softmax(1)[[40, 500, 930]] @ logits.mask_EL.sigmoid()
    error = mask_BL.view(6000, 3, 5).mean(0) - expected
    assert (error.abs() < 4.5 * (expected * (1 - expected) / 6000).sqrt()).all()


def test_a_samples_draw_depends_on_its_place_alone():
    whole = draw(Flow(1000), 12, 0.0, seed=3, step=7)
    ours = whole.uniform((2, 4), stream=1)
    assert torch.equal(torch.cat([whole[5:7].uniform((2, 4), 1), whole[slice(7, 12)].uniform((2, 4), 1)]), ours[5:])
    assert torch.equal(draw(Flow(1000), 6, 0.3, seed=3, step=7).uniform((2, 4), 1), ours[:6])
    others = (whole.uniform((2, 4), 1, use=1), whole.uniform((2, 4), 2), draw(Flow(1000), 12, 0.0, 4, 7).uniform(
        (2, 4), 1), draw(Flow(1000), 12, 0.0, 3, 8).uniform((2, 4), 1), ours.roll(1, 0))
    assert not any((other == ours).any() for other in others)


def test_gradients_of_draws_per_sample_are_those_of_brute_force():
    """Sample by sample, and with the straight-through rule written out: d mask = route·d soft mask + mask·d soft route.
    """
    torch.manual_seed(1)
    hyper, rows = hypernetwork(3, 4, tau=0.7), torch.tensor([3, 800, 800, 41, 3])
    uniform, weight_BL = noise(5, 3, 4), torch.randn(5, 4).double()
    logits = Logits(torch.randn(3, 4).double().requires_grad_(), torch.randn(1000, 3).double().requires_grad_())
    (hyper.sample_each(logits, rows, uniform) * weight_BL).sum().backward()

    mask_grad, router_grad = torch.zeros(3, 4).double(), torch.zeros(1000, 3).double()
    for b, t in enumerate(rows.tolist()):
        u = uniform[b].double()
        soft_EL = ((logits.mask_EL.detach() + (u[:, :4] / (1 - u[:, :4])).log()) / 0.7).sigmoid()
        soft_E = ((logits.router_TE[t].detach() - (-u[:, 4].log()).log()) / 0.7).softmax(0)
        chosen = int(soft_E.argmax())
        mask_grad[chosen] += weight_BL[b] * soft_EL[chosen] * (1 - soft_EL[chosen]) / 0.7
        of_route_E = (soft_EL > 0.5).double() @ weight_BL[b]
        router_grad[t] += soft_E * (of_route_E - soft_E @ of_route_E) / 0.7
    assert torch.allclose(logits.mask_EL.grad, mask_grad) and torch.allclose(logits.router_TE.grad, router_grad)
