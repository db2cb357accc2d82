"""Example inputs of every backbone in the zoo: they run it, or it is refused in one line."""

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO, of_the_newest

from alter import InputError
from alter.backbones.cost import count_cost
from alter.backbones.inputs import example_inputs, latent_shape, run_example

REFUSED = {  # they need images, sounds, cameras or positions that only their pipelines know
    "AceStepTransformer1DModel", "AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel",
    "BriaFibo2Transformer2DModel", "CogVideoX15", "HunyuanDiT2DModel", "HunyuanVideoFramepackTransformer3DModel",
    "Ideogram4Transformer2DModel", "JoyImageEditPlusTransformer3DModel", "Kandinsky5Transformer3DModel",
    "Kandinsky6SRTransformer3DModel", "Kandinsky6Transformer3DModel", "LTX23", "LTX2VideoTransformer3DModel",
    "LongCatAudioDiTTransformer", "LuminaNextDiT2DModel", "MiniMaxH3Transformer3DModel",
    "MiniMaxMusic3Transformer1DModel", "OmniGenTransformer2DModel", "PriorTransformer", "QwenImage21Transformer2DModel",
    "SanaWMLTX2RefinerTransformer3DModel", "SanaWMTransformer3DModel", "StableAudio3DiTModel", "StableAudioDiTModel",
    "WanAnimateTransformer3DModel",
}
REFUSED_ON_META = {  # what they compute depends on values
    "ErnieImageTransformer2DModel", "HeliosTransformer3DModel", "HunyuanVideo15Transformer3DModel",
    "Lumina2Transformer2DModel", "MochiTransformer3DModel", "NucleusMoEImageTransformer2DModel",
}
CHANGED = {"HeliosTransformer3DModel", "HiDreamImageTransformer2DModel"}  # of which older diffusers take something else


def params(names):
    return [pytest.param(name, marks=of_the_newest if name in CHANGED else ()) for name in names]


def specimen(name, device):
    with torch.device(device):
        return getattr(diffusers, ZOO[name].cls or name)(**ZOO[name].config).eval()


@pytest.mark.parametrize("name", params(ZOO))
def test_they_run_or_are_refused(name):
    model = specimen(name, "cpu")

    def run(size, frames):
        run_example(model, example_inputs(model, size, text_tokens=5, batch=2, frames=frames))

    if name in REFUSED:
        with pytest.raises(InputError, match=r"^backbone\.pretrained: .*: use another backbone$"):
            run(4, 2)
    else:
        run(4, 2)


@pytest.mark.parametrize("name", params(
    name for name in ZOO if name not in {*REFUSED, "HiDreamImageTransformer2DModel"}))
def test_equal_layers_are_counted_once(name):
    """Against a forward in which all are counted."""
    model = specimen(name, "meta")
    if name in REFUSED_ON_META:
        with pytest.raises(InputError, match="use another backbone"):
            count_cost(model, 4, frames=2)
        return
    with FlopCounterMode(display=False) as counter:
        run_example(model, example_inputs(model, 4, frames=2))
    cost = count_cost(model, 4, frames=2)
    assert cost.macs_total == counter.get_total_flops() // 2 >= sum(cost.macs) and min(cost.macs) > 0


@pytest.mark.parametrize("name", ["GlmImageTransformer2DModel", "HiDreamImageTransformer2DModel",
                                  "Krea2Transformer2DModel", "FluxTransformer2DModel"])
def test_they_cost_what_a_forward_with_values_does(name):
    """Whose mixtures of experts choose by value, among others."""
    model = specimen(name, "cpu")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_example(model, example_inputs(model, 4))
    assert count_cost(model, 4).macs_total == counter.get_total_flops() // 2


@pytest.mark.parametrize("name, shape", [
    ("FluxTransformer2DModel", (12, 4)), ("BriaFiboTransformer2DModel", (48, 4)),
    ("SanaTransformer2DModel", (4, 4, 12)), ("UNetSDXL", (4, 4, 12)),
    ("WanTransformer3DModel", (4, 2, 4, 12)), ("ZImageTransformer2DModel", (4, 4, 12)),
    ("LTXVideoTransformer3DModel", (96, 4)), ("CogVideoXTransformer3DModel", (2, 4, 4, 12)),
])
def test_rectangles(name, shape):
    model = specimen(name, "meta")
    assert latent_shape(model, (4, 12), frames=2) == shape
    if name != "CogVideoXTransformer3DModel":  # its table of positions has one size
        assert count_cost(model, (4, 12), 2).macs_total == count_cost(model, (12, 4), 2).macs_total
