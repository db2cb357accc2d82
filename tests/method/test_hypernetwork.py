import torch

from alter.method.hypernetwork import HyperNetwork


def test_it_starts_nearly_all_active():
    torch.manual_seed(0)
    logits = HyperNetwork(10, 34, torch.zeros(1000, 320))()
    assert logits.mask_EL.shape == (10, 34) and logits.router_TE.shape == (1000, 10)
    assert abs(logits.mask_EL.sigmoid().mean().item() - 0.982) < 0.01


def test_codes_are_orthogonal_and_frozen():
    hyper = HyperNetwork(2, 8, torch.zeros(10, 4))
    codes = hyper.expert_generator.Z_ELK.view(16, 64)
    assert torch.allclose(codes @ codes.T, torch.eye(16), atol=1e-5)
    assert "expert_generator.Z_ELK" in hyper.state_dict()
    assert all("Z_ELK" not in name for name, _ in hyper.named_parameters())


def test_the_uniform_router_has_equal_intervals_and_nothing_to_train():
    hyper = HyperNetwork(4, 3, torch.zeros(1000, 8), router="uniform")
    _, router_TE = hyper.sample(hyper(), torch.Generator().manual_seed(0))
    assert torch.equal(router_TE.argmax(1), torch.arange(1000) // 250)
    assert not list(hyper.temporal_router.parameters())


def test_sampling_reaches_every_parameter_and_the_logits_are_deterministic():
    hyper = HyperNetwork(3, 5, torch.randn(50, 8))
    assert torch.equal(hyper().mask_EL, hyper().mask_EL)
    mask_EL, router_TE = hyper.sample(hyper(), torch.Generator().manual_seed(0))
    (router_TE @ mask_EL).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hyper.parameters())


def test_its_state_is_all_that_another_one_needs():
    """Codes, sinusoids and offsets are part of it."""
    hyper, other = (HyperNetwork(3, 5, torch.randn(50, 8)) for _ in range(2))
    hyper.offset_L.copy_(torch.arange(5.0))
    other.load_state_dict(hyper.state_dict())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(hyper(), other(), strict=True))
