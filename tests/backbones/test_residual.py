"""The check of unknown backbones, on known ones: it finds the blocks that the zoo's own proof leaves out."""

import pytest
import torch
from test_any_transformer import OTHERS
from zoo import ZOO, answer, blocks, inputs, make

from alter.backbones.residual import not_residual


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if ZOO[name].slow else ())
                                  for name in ZOO if ZOO[name].lists])
@torch.no_grad()
def test_blocks_that_are_not_residual(name):
    model = make(name)
    given = inputs(name, model)
    before = answer(model, given)
    expected = [path for path in blocks(name, model) if path.startswith(OTHERS.get(name, "none"))]
    assert [path.removesuffix(".block") for path in not_residual(model, lambda: model(**given))] == expected
    assert before.equal(answer(model, given)) and not any("forward" in vars(module) for module in model.modules())
