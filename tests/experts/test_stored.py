"""experts.json: format 2 there and back, format 1 as it was written, and every bad field refused in a line."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import make_dit
from helpers import TARGETS, chain, uneven_latency
from test_ladder import measured

from alter import InputError, TemporalExperts
from alter.experts.ladder import Rung
from alter.experts.stored import from_runs, runs

FORMAT_1 = """{
  "format": 1,
  "backbone": "DiTTransformer2DModel",
  "sites": [
    {"name": "transformer_blocks.0", "macs": 30},
    {"name": "transformer_blocks.1", "macs": 50}
  ],
  "macs_total": 100,
  "budget": {"cost": "macs", "keep_ratio_target": 0.7, "over": "total", "timesteps": [7, 3, 0], "keep_ratio_of_total": 0.75},
  "masks": [
    [1, 0],
    [0, 1],
    [1, 1]
  ],
  "expert_of_timestep": [0, 0, 0, 2, 2, 0, 2, 2]
}
"""  # noqa: E501


def full(**changes):
    """Four rungs, latencies and errors."""
    experts = chain(make_dit(), latency=uneven_latency(), timesteps=np.array([999, 500, 20]), measured=measured(4))
    planned = Rung(0.9, np.arange(1000) % 2, False, None, 12)
    return dataclasses.replace(experts, ladder=(*experts.ladder, planned), **changes)


def load(tmp_path, text):
    (tmp_path / "experts.json").write_text(text)
    return TemporalExperts.from_pretrained(tmp_path)


@pytest.mark.parametrize("experts", [full(), chain(make_dit()), full().only(0.35), full(chosen=3, component="unet")],
                         ids=["full", "without measurements", "one rung", "another default"])
def test_there_and_back(tmp_path, experts):
    experts.save_pretrained(tmp_path)
    (file,) = tmp_path.rglob("experts.json")
    text = file.read_text()
    loaded = TemporalExperts.from_pretrained(tmp_path, component=experts.component)
    assert loaded.same(experts) and loaded.chosen == experts.chosen and loaded.time_ratio == experts.time_ratio
    for field in ("sites", "macs", "macs_total", "budget_over", "timesteps", "latency", "backbone", "component"):
        assert getattr(loaded, field) == getattr(experts, field)
    if experts.measured is None:
        assert loaded.measured is None
    else:
        assert json.dumps(loaded.measured.to_plain()) == json.dumps(experts.measured.to_plain())
    loaded.save_pretrained(tmp_path / "again")
    assert next((tmp_path / "again").rglob("experts.json")).read_text() == text
    content = json.loads(text)
    assert content["format"] == 2 and content["default"] == experts.keep_ratio_target
    for plain, rung in zip(content["ladder"], experts.ladder, strict=True):
        assert plain["keep_ratio_of_total"] == experts.choose(rung).keep_ratio
    assert max(map(len, text.split('"measured"')[0].splitlines())) < 8000  # routes are runs, and a line each


def test_a_file_of_format_1_is_a_ladder_of_one_rung(tmp_path):
    experts = load(tmp_path, FORMAT_1)
    assert experts.ladder == (Rung(0.7, np.array([0, 0, 0, 2, 2, 0, 2, 2])),) and experts.rung is experts.ladder[0]
    assert experts.mask_EL.tolist() == [[True, False], [False, True], [True, True]]
    assert experts.sites == ("transformer_blocks.0", "transformer_blocks.1") and experts.macs == (30, 50)
    assert experts.timesteps == (7, 3, 0) and experts.backbone == "DiTTransformer2DModel"
    assert experts.measured is experts.latency is experts.component is None and experts.used == [0, 2]
    assert experts.keep_ratio == 0.75  # as the file says
    experts.save_pretrained(tmp_path)
    text = (tmp_path / "experts.json").read_text()
    assert json.loads(text)["format"] == 2 and load(tmp_path, text).same(experts)


def rung(**changes):
    content = {"keep_ratio_target": 0.5, "tuned": True, "error": None, "steps": None, "routes": [[0, 1]], **changes}
    return {"default": 0.5, "ladder": [{name: value for name, value in content.items() if value != "absent"}]}


@pytest.mark.parametrize("changes, message", [
    ({"format": 99}, "format: found 99, this version of alter reads 1 and 2"), ({"format": True}, "format: found True"),
    ({"sites": [{"name": "x"}]}, "sites: 'macs' is missing"), ({"sites": 3}, "sites: "),
    ({"sites": [{"name": 1, "macs": 2}]}, "sites: expected a text"),
    ({"sites": [{"name": "x", "macs": -2}]}, "sites: expected a whole number"),
    ({"macs_total": None}, "macs_total: expected a whole number"), ({"macs_total": 5}, "macs_total: less than the"),
    ({"masks": [[1, 0]]}, "masks: every expert needs 4 values"), ({"masks": []}, "masks: every expert"),
    ({"masks": [[1, 0, 2, 1]] * 4}, "masks: values must be 0 or 1"), ({"masks": 5}, "masks: "),
    ({"budget": {}}, "budget: 'over' is missing"), ({"budget": None}, "budget: "),
    ({"budget": {"over": "all"}}, "budget: over: expected total or prunable"),
    ({"budget": {"over": "total", "cost": "joules"}}, "budget: cost: expected macs or latency"),
    ({"budget": {"over": "total", "timesteps": [1000]}}, "budget.timesteps: expected null or a list of timesteps 0 to"),
    ({"budget": {"over": "total", "timesteps": []}}, "budget.timesteps: "),
    ({"budget": {"over": "total", "timesteps": [0.5]}}, "budget.timesteps: "),
    ({"latency": None}, "latency: "), ({"latency": {}}, "latency: 'sites' is missing"),
    ({"training_timesteps": "absent"}, "training_timesteps: is missing"),
    ({"training_timesteps": 0}, "training_timesteps: expected a whole number of at least 1"),
    ({"default": 0.6}, "default: 0.6 is the keep_ratio_target of no rung"),
    ({"default": "absent"}, "default: is missing"),
    ({"ladder": []}, "default: "), ({"ladder": {"a": 1}}, r"ladder\[0\]: "),
    ({"ladder": "absent"}, "ladder: is missing"), ({"ladder": None}, "ladder: "),
    (rung(tuned=1), r"ladder\[0\]: tuned: expected true or false"),
    (rung(tuned="absent"), r"ladder\[0\]: 'tuned' is missing"),
    (rung(keep_ratio_target="0.5"), r"ladder\[0\]: expected a number, found '0.5'"),
    (rung(error="small"), r"ladder\[0\]: expected a number"), (rung(error=-1), "ladder: keep ratio 0.5: error=-1.0"),
    (rung(error=float("nan")), "ladder: keep ratio 0.5: error=nan"),
    (rung(steps=0), "ladder: keep ratio 0.5: steps=0"),
    (rung(steps=2.5), r"ladder\[0\]: expected a whole number"), (rung(routes=[]), r"ladder\[0\]: "),
    (rung(routes=[[1, 0]]), r"ladder\[0\]: expected \[first timestep, expert\] from timestep 0"),
    (rung(routes=[[0, 0], [5, 1], [5, 2]]), r"ladder\[0\]: expected \[first"),
    (rung(routes=[[0, 0], [1000, 1]]), r"ladder\[0\]: expected \[first"), (rung(routes=[[0]]), r"ladder\[0\]: "),
    (rung(routes=[[0, 4]]), "ladder: keep ratio 0.5: every timestep needs one of the experts 0 to 3"),
    ({**rung(keep_ratio_target=2.0), "default": 2.0}, "ladder: keep ratio 2: keep_ratio_target=2.0: expected a share"),
    ({"default": 0.5, "ladder": 2 * rung()["ladder"]}, "ladder: expected rungs of ascending keep ratio, found 0.5, 0"),
    ({"measured": {}}, "measured: 'edges' is missing"), ({"measured": [1]}, "measured: "),
    ({"measured": measured(3).to_plain()}, "measured.error: has 3 rows, and there are 4 masks"),
    ({"measured": measured(4, (0, 300, 500)).to_plain()}, "measured.edges: expected to ascend from 0 to 1000"),
    ({"backbone": 3}, "backbone: expected the name of a class"), ({"component": "vae"}, "component: expected one of"),
])
def test_a_damaged_file_is_refused_with_its_field(tmp_path, changes, message):
    full().save_pretrained(tmp_path)
    content = {**json.loads((tmp_path / "experts.json").read_text()), **changes}
    text = json.dumps({name: value for name, value in content.items() if value != "absent"})
    with pytest.raises(InputError, match=rf"experts\.json: {message}") as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, message", [
    ({"expert_of_timestep": [0, 7]}, "expert_of_timestep: every timestep needs one of the experts 0 to 2"),
    ({"expert_of_timestep": []}, "expert_of_timestep: every"), ({"expert_of_timestep": None}, "expert_of_timestep: "),
    ({"expert_of_timestep": [0, 1.5]}, "expert_of_timestep: expected a whole number"),
    ({"budget": {"over": "total"}}, "budget: 'keep_ratio_target' is missing"),
    ({"masks": [[1]]}, "masks: every expert"),
    ({"budget": {"over": "total", "keep_ratio_target": 0}}, "keep_ratio_target=0.0: expected a share"),
])
def test_a_damaged_file_of_format_1(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, json.dumps({**json.loads(FORMAT_1), **changes}))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/experts.json: ")


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '{"format": [2]}'])
def test_other_files(tmp_path, text):
    with pytest.raises(InputError, match=r"experts\.json: (not valid JSON|format: found)"):
        load(tmp_path, text)


def test_routes_as_runs():
    random = np.random.default_rng(0)
    for count in (1, 2, 1000):
        expert_T = np.repeat(random.integers(4, size=count), random.integers(1, 9, size=count))
        assert np.array_equal(from_runs(runs(expert_T), len(expert_T)), expert_T)
    assert runs(np.array([3, 3, 0, 3])) == [[0, 3], [2, 0], [3, 3]]
    assert [one.keep_ratio_target for one in full().ladder] == [*TARGETS, 0.9]
