"""Wan 2.2: two transformers, each with experts of its own, together with one pipeline."""

import dataclasses
import json

import numpy as np
import pytest
from by_hand import counting, make_experts, serve_by_hand
from helpers import TARGETS, chain
from pipelines import draw, make_pipeline

from alter import InputError, TemporalExperts, load_pipeline
from alter.backbones.cost import CostTable
from alter.backbones.sites import find_sites
from alter.experts.ladder import Rung


def both(pipe):
    """Experts of both, which differ."""
    first, second = make_experts(pipe.transformer), make_experts(pipe.transformer_2, "transformer_2")
    return first, dataclasses.replace(second, mask_EL=second.mask_EL[::-1].copy())


def test_each_is_served_by_its_own():
    pipe, other = make_pipeline("wan22"), make_pipeline("wan22")
    dense = draw(pipe, num_inference_steps=6)
    experts = both(pipe)
    counts = {}
    for one, component in zip(experts, ("transformer", "transformer_2"), strict=True):
        one.apply(pipe)
        counts[component] = serve_by_hand(other, component, one)
    with (counting(pipe.transformer, ["", *experts[0].sites]) as first,
          counting(pipe.transformer_2, ["", *experts[1].sites]) as second):
        drawn = draw(pipe, num_inference_steps=6)
    assert np.array_equal(drawn, draw(other, num_inference_steps=6))
    assert counts == {"transformer": first, "transformer_2": second} and min(first[""], second[""]) > 1
    experts[1].remove(pipe)
    alone = draw(pipe, num_inference_steps=6)
    experts[0].remove(pipe)
    assert not np.array_equal(alone, drawn) and np.array_equal(draw(pipe, num_inference_steps=6), dense)
    with pytest.raises(InputError, match="a StableDiffusionPipeline has no transformer_2 to apply them to"):
        experts[1].apply(make_pipeline("sd"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the experts of both, and what the pipeline draws with them."""
    folder = tmp_path_factory.mktemp("wan22")
    pipe = make_pipeline("wan22", folder)
    for experts in both(pipe):
        experts.save_pretrained(folder)
        experts.apply(pipe)
    return folder, draw(pipe)


def load(source, **options):
    pipe = load_pipeline(source, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_folder_is_loaded_with_the_experts_of_both(saved, tmp_path):
    folder, expected = saved
    assert json.loads((folder / "transformer_2/experts.json").read_text())["component"] == "transformer_2"
    assert "component" not in json.loads((folder / "experts.json").read_text())
    assert np.array_equal(draw(load(folder)), expected)


def test_the_hub(saved, tmp_path):
    folder, expected = saved
    model, commit = tmp_path / "models--me--mine", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    (model / "snapshots").mkdir()
    (model / "snapshots" / commit).symlink_to(folder)
    arguments = {"cache_dir": tmp_path, "local_files_only": True}
    assert np.array_equal(draw(load("me/mine", **arguments)), expected)


def test_a_folder_with_the_experts_of_one(tmp_path):
    pipe = make_pipeline("wan22", tmp_path)
    first, second = both(pipe)
    second.save_pretrained(tmp_path)
    found = TemporalExperts.from_pretrained(tmp_path)
    assert found.component == "transformer_2" and np.array_equal(found.mask_EL, second.mask_EL)
    pipe = load(tmp_path)
    assert not hasattr(pipe.transformer, "_alter_applied") and hasattr(pipe.transformer_2, "_alter_applied")
    (tmp_path / "transformer_2/experts.json").unlink()
    with pytest.raises(InputError, match="holds no experts.json"):
        load(tmp_path)
    first.save_pretrained(tmp_path)
    pipe = load(tmp_path)
    assert hasattr(pipe.transformer, "_alter_applied") and not hasattr(pipe.transformer_2, "_alter_applied")
    first.save_pretrained(tmp_path / "transformer_2")
    with pytest.raises(InputError, match="component: found None, and the folder is that of transformer_2"):
        load(tmp_path)


def test_push_to_hub_uploads_to_the_folder_of_the_component(monkeypatch):
    calls = []
    monkeypatch.setattr("alter.experts.artefact.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("alter.experts.artefact.HfApi.upload_file", lambda self, **options: calls.append(options))
    both(make_pipeline("wan22"))[1].push_to_hub("me/mine")
    assert calls[0]["path_in_repo"] == "transformer_2/experts.json"


def test_one_dial_serves_both():
    pipe = make_pipeline("wan22")
    sites = tuple(site.name for site in find_sites(pipe.transformer))
    cost = CostTable(sites, (1,) * len(sites), (1,) * len(sites), 2 * len(sites), len(sites), "WanTransformer3DModel")
    ladder = tuple(Rung(target, np.full(1000, skipped)) for skipped, target in zip((2, 1, 0), TARGETS, strict=True))
    first, second = (dataclasses.replace(chain(None, component=component, cost=cost, seed=seed), ladder=ladder)
                     for seed, component in enumerate((None, "transformer_2")))
    expected = {}
    for one, other in ((0.35, 0.35), (0.5, 0.5), (0.65, 0.65), (0.35, 0.5)):
        with first.only(one).apply(pipe), second.only(other).apply(pipe):
            expected[one, other] = draw(pipe, num_inference_steps=6)
    assert len({drawn.tobytes() for drawn in expected.values()}) == 4
    first.apply(pipe)
    second.apply(pipe)
    assert np.array_equal(draw(pipe, num_inference_steps=6), expected[0.5, 0.5])
    for dial in (first, second):
        for target in (0.35, 0.65):
            with dial.at(target):
                assert np.array_equal(draw(pipe, num_inference_steps=6), expected[target, target])
    with first.at(first.ladder[0]):  # a Rung is of one artefact
        assert np.array_equal(draw(pipe, num_inference_steps=6), expected[0.35, 0.5])
        with second.at(second.ladder[0]):
            assert np.array_equal(draw(pipe, num_inference_steps=6), expected[0.35, 0.35])
