"""Folders of the hub: one in its cache, and one that it is asked for, without a network."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_dit
from diffusers import DDIMScheduler
from diffusers.pipelines import pipeline_utils
from helpers import experts_for

from alter import ClassConditionalPipeline, InputError, TemporalExperts, load_pipeline
from alter.backbones.pretrained import load_backbone, local_folder
from alter.experts.artefact import NoExperts


def save(folder):
    transformer = make_dit()
    ClassConditionalPipeline(transformer, DDIMScheduler()).save_pretrained(folder)
    experts_for(transformer, 8).save_pretrained(folder)
    return TemporalExperts.from_pretrained(folder)


def test_the_hubs_arguments_hold_for_experts_and_pipeline(tmp_path):
    model, commit = tmp_path / "models--me--mine", "0" * 40
    expected = save(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs/mine").write_text(commit)
    arguments = {"cache_dir": tmp_path, "local_files_only": True, "revision": "mine"}
    assert np.array_equal(TemporalExperts.from_pretrained("me/mine", **arguments).mask_EL, expected.mask_EL)
    pipe = load_pipeline("me/mine", **arguments)
    assert isinstance(pipe, ClassConditionalPipeline) and hasattr(pipe.transformer, "_alter_applied")
    with pytest.raises(InputError, match="me/mine: no such folder, and the hub gave no experts.json"):
        load_pipeline("me/mine", cache_dir=tmp_path / "empty", local_files_only=True)


@pytest.mark.parametrize("asked_before", [False, True])
def test_missing_experts_are_known_to_be_missing(tmp_path, asked_before):
    """Without a network, the hub may have what the cache has not."""
    model, commit = tmp_path / "models--me--mine", "0" * 40
    save(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    if asked_before:  # as huggingface_hub keeps the answer
        (model / ".no_exist" / commit / "transformer_2").mkdir(parents=True)
        (model / ".no_exist" / commit / "transformer_2/experts.json").touch()
    with pytest.raises(InputError) as caught:
        TemporalExperts.from_pretrained("me/mine", component="transformer_2", cache_dir=tmp_path, local_files_only=True)
    assert isinstance(caught.value, NoExperts) == asked_before


def test_the_token_reaches_every_download(monkeypatch):
    asked = []

    def refuse(*arguments, **options):
        asked.append(options.get("token"))
        raise OSError("no network")

    monkeypatch.setattr("alter.experts.artefact.hf_hub_download", refuse)
    with pytest.raises(InputError, match="no network"):
        load_pipeline("me/mine", token="secret")
    assert asked == ["secret"] * 2  # of the first backbone and of the second


def test_a_pipeline_of_our_class_is_a_backbone_by_its_hub_id(tmp_path, monkeypatch):
    save(tmp_path)
    files = [SimpleNamespace(rfilename=str(file.relative_to(tmp_path))) for file in tmp_path.rglob("*.*")]
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: SimpleNamespace(siblings=files, sha="0" * 40))
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, **__: "main", raising=False)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda _, name, **__: str(tmp_path / name))
    folder = local_folder("me/mine")
    assert folder == tmp_path and len(load_backbone(folder).transformer_blocks) == 4
