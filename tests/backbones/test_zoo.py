"""The zoo itself: its models run, their batches are samples side by side, and their blocks count."""

import pytest
import torch
from torch import nn
from zoo import ZOO, alone, answer, blocks, inputs, make, removed

LISTS = ("blocks", "layers", "refiner")  # how the names of a transformer's lists of blocks end
# Lists so named that hold no residual blocks.
OTHERS = {"WanVACETransformer3DModel": ["vace_blocks"]}


def apart(left, right):
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if ZOO[name].slow else ()) for name in ZOO])
@torch.no_grad()
def test_a_specimen(name):
    model, batch = make(name), 3
    own = [key for key, child in model.named_children() if isinstance(child, nn.ModuleList) and key.endswith(LISTS)]
    if ZOO[name].lists:  # else a UNet, whose blocks are nested
        assert sorted([*ZOO[name].lists, *OTHERS.get(name, [])]) == sorted(own)
    assert all(len(model.get_submodule(listed)) >= 3 for listed in ZOO[name].lists)

    given = inputs(name, model, batch)
    output = answer(model, given)
    assert output.isfinite().all() and len(output) == batch
    assert torch.equal(output, answer(model, inputs(name, model, batch))), "inputs or forward are not repeatable"
    assert all(apart(output[i], output[j]) > 0.1 for i, j in ((0, 1), (1, 2))), "samples are alike"
    each = torch.cat([answer(model, alone(given, index, batch)) for index in range(batch)])
    assert (apart(each, output) < 1e-4) == ZOO[name].whole

    for path in [*blocks(name, model)][::2]:
        without = removed(model, path, given)
        assert without.isfinite().all() and apart(without, output) > 1e-3, path
    assert torch.equal(output, answer(model, given))  # `removed` leaves nothing behind
