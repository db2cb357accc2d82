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
    assert measured.space == ("latents" if case == "wan22 transformer" else "residuals")
    depth_M = experts.mask_EL.sum(1)
    assert experts.mask_EL[0].all() and len(np.unique(experts.mask_EL, axis=0)) == len(depth_M)
    assert set(depth_M) == set(range(depth_M.min(), depth_M.max() + 1))
    for rung in experts.ladder:  # the nearest below, of masks of which each has a layer more in its chain
        one = experts.choose(rung)
        assert one.keep_ratio <= rung.keep_ratio_target + 0.005
        assert 0.6 <= low <= rung.keep_ratio_target or not rung.tuned
    assert experts.keep_ratio >= low - max(experts.macs) / experts.macs_total
    if "few" in case:  # each visited timestep is in a bin of its own
        assert len(measured.edges) - 1 == min(3, len(experts.timesteps)) and measured.steps == 4
        assert measured.guidance == 3.5
    pipe = load_pipeline(run / "final")
    assert np.isfinite(draw(pipe, **unguided(name))).all()
