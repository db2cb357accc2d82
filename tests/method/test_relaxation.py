import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter.method.relaxation import gumbel_sigmoid, gumbel_softmax, straight_through


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    x = torch.tensor([0.2, 0.9], requires_grad=True)
    out = straight_through(x * 3, torch.tensor([0.0, 1.0]))
    out.sum().backward()
    assert out.tolist() == [0.0, 1.0] and x.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5, 4.0])
def test_gumbel_sigmoid_keeps_with_probability_sigmoid(logit):
    sample = gumbel_sigmoid(torch.tensor(logit), 0.4, uniform(200_000))
    expected = torch.tensor(logit).sigmoid().item()
    assert set(sample.unique().tolist()) <= {0.0, 1.0}
    assert abs(sample.mean().item() - expected) < 4 * (expected * (1 - expected) / 200_000) ** 0.5


def test_gumbel_softmax_draws_with_probability_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0])
    sample = gumbel_softmax(logits, 0.4, uniform(200_000, 3))
    assert torch.equal(sample.sum(1), torch.ones(200_000))
    assert torch.allclose(sample.mean(0), logits.softmax(0), atol=5e-3)


def test_an_expert_with_logit_minus_infinity_is_never_drawn():
    logits = torch.tensor([0.0, -torch.inf])
    assert gumbel_softmax(logits, 0.4, uniform(1000, 2))[:, 1].sum() == 0


@given(st.integers(0, 2**31), st.floats(0.1, 5.0))
def test_samples_are_binary_with_gradient_and_repeat_with_the_seed(seed, tau):
    logits = torch.linspace(-3, 3, 50).requires_grad_()
    first = gumbel_sigmoid(logits, tau, uniform(50, seed=seed))
    first.sum().backward()
    assert ((first == 0) | (first == 1)).all()
    assert logits.grad.abs().sum() > 0
    assert torch.equal(first, gumbel_sigmoid(logits, tau, uniform(50, seed=seed)))
