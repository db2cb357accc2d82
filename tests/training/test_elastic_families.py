"""The elastic search on tiny models of several families: it finishes, meets the budget, loads and serves."""

import numpy as np
import pytest
from conftest import merge
from pipelines import draw, unguided
from test_trained_families import family_config as family_config

from alter import TemporalExperts, load_pipeline, train

ELASTIC = {"search": {"method": "elastic", "samples": 2, "bins": 3}, "budget": {"keep_ratio": [0.6, 0.8]},
           "train": {"steps": 4, "search_steps": 2}, "experts": {"count": 3}}
_FEW = {"train": {"timesteps": "sampled"}, "budget": {"keep_ratio": 0.7, "sampling_steps": 4}}
CASES = {
    "flux few steps": ("flux", {**_FEW, "lora": {"rank": 2}, "evaluate": {"guidance_scale": 3.5}}),
    "sd": ("sd", {"evaluate": {"guidance_scale": 2.0}}), "sd3": ("sd3", {}), "z_image lora": ("z_image", {
        "lora": {"rank": 2}}),
    "wan": ("wan", {}), "wan22 transformer": ("wan22", {"backbone": {"component": "transformer"}}),
    "wan22 transformer_2": ("wan22", {"backbone": {"component": "transformer_2"}}),
}
QUICK = ("flux few steps",)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow)
                                  for case in CASES])
def test_a_family(family_config, case):
    name, changes = CASES[case]
    run = train(family_config(name, **merge(ELASTIC, changes))).run_dir
    experts = TemporalExperts.from_pretrained(run / "final")
    measured, low = experts.measured, experts.keep_ratio_target
    assert np.isfinite(measured.loss_MB).all() and measured.loss_MB.max() > 0 and "latents" in measured.response
    assert experts.mask_EL[0].all() and (np.diff(experts.mask_EL.sum(1)) == -1).all()
    share_M = 1 - ~experts.mask_EL @ (np.array(experts.macs) / experts.macs_total)
    for rung in experts.ladder:  # the nearest below, of masks of which each costs a layer more
        one = experts.choose(rung)
        assert one.keep_ratio <= rung.keep_ratio_target + 0.005
        assert 0.6 <= low <= rung.keep_ratio_target or not rung.tuned
    assert experts.keep_ratio >= low - (share_M[:-1] - share_M[1:]).max()
    if "few" in case:  # each visited timestep is in a bin of its own
        assert len(measured.edges) - 1 == min(3, len(experts.timesteps)) and measured.steps == 4
        assert measured.guidance == 3.5
    pipe = load_pipeline(run / "final")
    assert np.isfinite(draw(pipe, **unguided(name))).all()
