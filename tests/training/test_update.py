"""What one optimizer's steps need beside the losses."""

import torch
from torch import nn

from alter.training.update import keep_gradient


def test_an_output_that_used_nothing_trained_still_has_a_gradient_of_zero():
    model, parameter = nn.Identity(), nn.Parameter(torch.ones(3))
    handle, given = keep_gradient(model, parameter), torch.randn(2, 3)
    output = model(given)
    assert torch.equal(output, given)
    output.square().sum().backward()
    assert torch.equal(parameter.grad, torch.zeros(3))
    with torch.no_grad():
        assert model(given) is given
    handle.remove()
    assert not model(given).requires_grad
