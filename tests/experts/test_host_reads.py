"""What experts make the host wait for: one read of the timestep a forward, whatever the number of sites."""

import pytest
import torch
from conftest import make_dit, make_inputs, make_unet
from helpers import experts_for
from torch.overrides import TorchFunctionMode


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a value on the device."""

    WAITING = {"cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.WAITING
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("timesteps", [[700, 700], [700, 20]], ids=["one expert", "two experts"])
@pytest.mark.parametrize("kind", ["small dit", "large dit", "unet"])
def test_a_step_reads_the_timestep_once_whatever_the_number_of_sites(kind, timesteps):
    model = make_unet() if kind == "unet" else make_dit(layers=2 if kind == "small dit" else 9)
    (sample, _), conditioning = make_inputs("unet" if kind == "unet" else "dit", batch=2)

    def reads():
        with torch.no_grad(), Reads() as mode:
            model(sample, timestep=torch.tensor(timesteps), **conditioning)
        return mode.count

    model.eval()
    dense = reads()
    experts_for(model, 16 if kind == "unet" else 8).apply(model)
    assert reads() - dense == (1 if timesteps[0] == timesteps[1] else 2)


def test_a_profiler_trace_shows_no_reads_that_grow_with_the_sites():
    """What compares tensors on the host, such as `if mask[layer]`, appears as aten::item or aten::is_nonzero."""
    counts = []
    for layers in (2, 9):
        model = make_dit(layers=layers).eval()
        (sample, _), conditioning = make_inputs("dit", batch=2)
        experts_for(model, 8).apply(model)
        with torch.no_grad(), torch.profiler.profile() as trace:
            model(sample, timestep=torch.tensor([700, 700]), **conditioning)
            sample[0, 0, 0, 0].item()  # the trace would show one
        counts.append(sum(event.count for event in trace.key_averages() if event.key in
                          ("aten::item", "aten::is_nonzero", "aten::equal", "cudaStreamSynchronize")))
    assert counts == [1, 1]
