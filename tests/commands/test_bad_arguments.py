"""Bad input of every command and key: exit code 2, lines that begin with `error:`, no traceback, nothing written."""

import json
import math
import typing

import pytest
from helpers import png

from alter.commands import COMMANDS, main
from alter.common import schema
from alter.common.config import Config

# {0}: a folder with the files that `place` makes. The commands run in an empty folder.
FOR_COMMANDS = """
sample --run {0}/run
sample --run {0}/run --prompts {0}/text.txt
sample --run {0}/run --prompts {0}/text.txt --labels 1 --out o
sample --run {0}/run --labels x --out o
sample --run {0}/run --labels -1 --out o
sample --run {0}/run --labels 3 -2 --out o
sample --run {0}/run --prompts nowhere --out o
sample --run {0}/run --prompts {0} --out o
sample --run {0}/run --prompts {0}/cp1252.txt --out o
sample --run {0}/run --prompts {0}/nul.txt --out o
sample --run {0}/run --prompts {0}/blank.txt --out o
sample --run {0}/run --prompts '' --out o
sample --run {0}/run --prompts {0}/text.txt --out ''
sample --run {0}/run --prompts {0}/text.txt --out {0}/text.txt
sample --run {0}/run --prompts {0}/text.txt --out {0}/text.txt/o
sample --run {0}/run --prompts {0}/text.txt --out /proc/none/o
sample --run {0}/run --prompts {0}/text.txt --out {long}
sample --run {0}/run --prompts {0}/text.txt --out {0}/drawn
sample --run {0}/run --prompts {0}/text.txt --out {0}/drawn-otherwise
sample --run {0}/run --prompts {0}/text.txt --out o --steps 0
sample --run {0}/run --prompts {0}/text.txt --out o --steps -1
sample --run {0}/run --prompts {0}/text.txt --out o --steps 2.5
sample --run {0}/run --prompts {0}/text.txt --out o --num 0
sample --run {0}/run --prompts {0}/text.txt --out o --num -3
sample --run {0}/run --prompts {0}/text.txt --out o --batch 0
sample --run {0}/run --prompts {0}/text.txt --out o --seed -1
sample --run {0}/run --prompts {0}/text.txt --out o --seed 99999999999999
sample --run {0}/run --prompts {0}/text.txt --out o --guidance nan
sample --run {0}/run --prompts {0}/text.txt --out o --guidance inf
sample --run {0}/run --prompts {0}/text.txt --out o --dtype fp8
sample --run {0}/run --prompts {0}/text.txt --out o --scheduler NoSuchScheduler
sample --run {0}/run --prompts {0}/text.txt --out o --scheduler FlowMatchEulerDiscreteScheduler
sample --run {0}/run --prompts {0}/text.txt --out o --scheduler EDMEulerScheduler
sample --run {0}/run --prompts {0}/text.txt --out o --scheduler UNet2DConditionModel
sample --run nowhere --prompts {0}/text.txt --out o
sample --run {0}/text.txt --prompts {0}/text.txt --out o
sample --run {0}/empty --prompts {0}/text.txt --out o
sample --run {0}/run --prompts {0}/text.txt --out o
sample --run {0}/run --prompts {0}/text.txt --out o --dense
sample --run {0}/run --prompts {0}/text.txt --out o --dense --original
sample --run {0}/run --prompts {0}/text.txt --out o --original
sample --run {0}/run --prompts {0}/text.txt --out o --dense-pipeline nowhere
sample --run {0}/run --prompts {0}/text.txt --out o --plan nowhere
sample --run {0}/run --prompts {0}/text.txt --out o --plan {0}/other-json
sample --run {0}/run --prompts {0}/text.txt --out o --plan {0}/run --keep 0.5
plan --run {0}/run --out o
plan --run {0}/run --prompts {0}/blank.txt --out o
plan --run {0}/run --prompts {0}/text.txt --out {0}/text.txt
plan --run {0}/run --prompts {0}/text.txt --out o
plan --run nowhere --prompts {0}/text.txt --out o
plan --run {0}/run --labels -1 --out o
plan --run {0}/run --prompts {0}/text.txt --out o --share 0
plan --run {0}/run --prompts {0}/text.txt --out o --share 0.5 --macs 1e9
plan --run {0}/run --prompts {0}/text.txt --out o --macs nan
plan --run {0}/run --prompts {0}/text.txt --out o --seconds inf
plan --run {0}/run --prompts {0}/text.txt --out o --quality 1
plan --run {0}/run --prompts {0}/text.txt --out o --most 1
plan --run {0}/run --prompts {0}/text.txt --out o --images 0
plan --run {0}/run --prompts {0}/text.txt --out o --guidance nan
evaluate
evaluate --images {0}/images --run {0}/run
evaluate --images nowhere --cache c
evaluate --images {0}/empty --cache c
evaluate --images {0}/text.txt --cache c
evaluate --images {0}/bad.npz --cache c
evaluate --images {0}/images --cache c
evaluate --images {0}/images --metrics fidd --cache c
evaluate --images {0}/images --metrics clip --cache c
evaluate --images {0}/images --metrics clip --prompts nowhere --cache c
evaluate --images {0}/images --metrics clip --prompts {0}/text.txt --cache c
evaluate --images {0}/images --metrics clip --prompts {0}/cp1252.txt --cache c
evaluate --images {0}/images --metrics clip --prompts {0}/images --cache c
evaluate --images {0}/drawn --cache c
evaluate --images {0}/images --metrics is --cache c --inception-weights nowhere
evaluate --images {0}/images --metrics is --cache c --inception-weights {0}/text.txt
evaluate --images {0}/images --metrics is --cache c --inception-weights {0}/images
evaluate --images {0}/images --metrics cmmd --reference {0}/images --cache c --cmmd-model-path nowhere
evaluate --images {0}/images --metrics fd_dinov2 --reference {0}/images --cache c --dinov2-weights nowhere
evaluate --images {0}/images --metrics cmmd --reference {0}/images --cache c --feature-network demo
evaluate --images {0}/images --reference nowhere --cache c
evaluate --images {0}/images --reference {0}/empty --cache c
evaluate --images {0}/images --reference {0}/bad.npz --cache c
evaluate --images {0}/images --reference {0}/text.txt --cache c
evaluate --images {0}/few --reference {0}/images --cache c
evaluate --images {0}/images --reference {0}/few --cache c
evaluate --images {0}/images --reference {0}/images --cache c --num 6
evaluate --images {0}/images --reference {0}/images --cache c --num 0
evaluate --images {0}/images --reference {0}/images --cache c --num -1
evaluate --images {0}/images --reference {0}/images --cache c --resize 0
evaluate --images {0}/images --reference {0}/images --cache c --resize big
evaluate --images {0}/images --reference {0}/images --cache c --bootstrap -1
evaluate --images {0}/images --reference {0}/images --cache c --batch 0
evaluate --images {0}/images --reference {0}/images --cache c --workers -1
evaluate --images {0}/images --reference {0}/images --cache {0}/text.txt
evaluate --images {0}/images --reference {0}/images --cache /proc/none/c
evaluate --images {0}/images --reference {0}/images --cache c --out {0}
evaluate --images {0}/images --reference {0}/images --cache c --out nowhere/m.json
evaluate --images {0}/images --reference {0}/images --cache c --out /dev/null
evaluate --images {0}/images --reference {0}/images --cache c --save-stats s.json
evaluate --images {0}/images --reference {0}/images --cache c --save-stats nowhere/s.npz
evaluate --images {0}/images --reference {0}/images --cache c --feature-network none
evaluate --images {0}/images --against nowhere --cache c
evaluate --images {0}/images --against {0}/images --cache c
evaluate --images {0}/images --against dense --cache c
evaluate --images {0}/images --against {0}/images --cache c --metrics fid
evaluate --images {0}/images --against {0}/images --cache c --reference {0}/images
evaluate --images {0}/images --metrics psnr --cache c
evaluate --run {0}/run --against {0}/images --cache c
evaluate --run nowhere --cache c
evaluate --run {0}/text.txt --cache c
evaluate --run {0}/run --cache c
evaluate --compare nowhere
evaluate --compare {0}/empty
evaluate --compare {0}/broken.json
evaluate --compare {0}/list.json
evaluate --compare {0}/object.json
evaluate --compare {0}/half.json
evaluate --compare {0}/words.json
evaluate --compare {0}/cp1252.txt
report
report --run nowhere
report --run {0}/empty
report --run {0}/text.txt
report --run {0}/run
report --run {0}/other-json
report --run {0}/run --out nowhere/page.html
report --run {0}/run --out {0}/images
report --run {0}/run --out /proc/page.html
measure --config demo_dit
measure --config nowhere --out o
measure --config demo_dit --out {0}/text.txt
measure --config demo_dit --out /proc/none/o
measure --config demo_dit --out o --bins 0
measure --config demo_dit --out o --samples 0
measure --config demo_dit --out o --trials 0
measure --config demo_dit --out o --batch -1
measure --config demo_dit --out o train.stepz=3
measure --out o
measure --config demo_dit --pipeline {0}/run --out o
measure --pipeline {0}/run --out o
measure --config demo_dit --keep 0.5 --out o
measure --apply --pipeline {0}/run --out o
measure --apply --pipeline {0}/run --labels 0-9 --prompts {0}/text.txt --out o
measure --apply --pipeline {0}/empty --labels 0-9 --out o
measure --apply --pipeline nowhere --labels 0-9 --out o
measure --apply --pipeline {0}/run --labels 0 --images 1 --out o
measure --apply --pipeline {0}/run --labels 0 --keep 1 --out o
measure --apply --pipeline {0}/run --prompts nowhere --out o
latency --config demo_dit
latency --config nowhere --out o
latency --config demo_dit --out {0}
latency --config demo_dit --out nowhere/l.json
latency --config demo_dit --out /proc/l.json
latency --config demo_dit --out o budget.keep_ratio=2
encode --config demo_dit
encode --config nowhere --out o
encode --config demo_dit --out o --batch 0
encode --config demo_dit --out o --batch many
encode --config demo_dit --out o --shard-size 0
encode --config demo_dit --out {0}/text.txt
encode --config demo_dit --out /proc/none/o
encode --config demo_dit --out o backbone.pretrained=nowhere/at/all
models --markdown {0}
models --sideways
prepare
prepare coco2015 --out o
prepare coco2014 --out o
prepare coco2014 --captions {0}/object.json --out o
prepare coco2014 --captions nowhere --images {0}/images --out o
prepare coco2014 --captions {0}/images --images {0}/images --out o
prepare coco2014 --captions {0}/object.json --images {0}/images --out o
prepare coco2014 --captions {0}/list.json --images {0}/images --out o
prepare coco2014 --captions {0}/broken.json --images {0}/images --out o
prepare coco2014 --captions {0}/cp1252.txt --images {0}/images --out o
prepare coco2014 --captions {0}/object.json --images nowhere --out o
prepare coco2014 --captions {0}/object.json --images {0}/text.txt --out o
prepare coco2017 --captions {0}/coco.json --images {0}/images --out o
prepare coco2017 --captions {0}/coco.json --images {0}/empty --out o --count 1
prepare coco2017 --captions {0}/coco.json --images {0}/images --out o --count 0
prepare coco2017 --captions {0}/coco.json --images {0}/images --out o --count x
prepare coco2017 --captions {0}/coco.json --images {0}/images --out o --count 1 --size 0
prepare coco2017 --captions {0}/coco.json --images {0}/images --out {0}/images --count 1
prepare coco2017 --captions {0}/coco.json --images {0}/images --out /proc/none/o --count 1
prepare cc3m --captions nowhere --images {0}/images --out o
prepare cc3m --captions {0}/cp1252.txt --images {0}/images --out o
prepare cc3m --captions {0}/text.txt --images {0}/images --out o
prepare cc3m --captions {0}/table.tsv --images {0}/images --out o
prepare imagenet --out {0}/text.txt/o
prepare imagenet --out {0}/text.txt
convert
convert to-diffusers
convert to-paper {0}/text.txt --out o
convert to-diffusers nowhere.pt --out o
convert to-diffusers {0}/images --out o
convert to-diffusers {0}/text.txt --out o
convert to-diffusers {0}/text.txt --out {0}/images
convert to-diffusers {0}/text.txt --out {0}/text.txt/o
convert to-diffusers {0}/text.txt --out o --heads 0
convert to-diffusers {0}/text.txt --out o --heads x
convert to-facebook {0}/images --out o.pt
convert to-facebook {0}/run/final --out o.pt
convert to-facebook nowhere --out o.pt
convert to-facebook {0}/images --out {0}/text.txt
convert to-facebook {0}/images --out o.pt --heads 4
convert to-facebook {0}/images --out o.pt --vae {0}
ablate --config nowhere --out o.json
ablate --config demo_dit --out {0}
ablate --config demo_dit --out nowhere/o.json
ablate --config demo_dit --out {0}/broken.json
ablate --config demo_dit --out {0}/list.json
ablate --config demo_dit --out {0}/object.json
ablate --config demo_dit --out o.json --keep 0
ablate --config demo_dit --out o.json --keep 0.5 1.5
ablate --config demo_dit --out o.json --keep nan
ablate --config demo_dit --out o.json --seeds -1
ablate --config demo_dit --out o.json --seeds a
ablate --config demo_dit --out o.json --variants alte
ablate --config demo_dit --out o.json --runs {0}/text.txt
ablate --config demo_dit --out o.json data.holdout=0
ablate --config demo_dit --out o.json --train.steps=4
benchmark
benchmark --json o.json --cases dit
benchmark --json o.json --kinds steps
benchmark --json o.json --keep 0
benchmark --json o.json --keep 1.01
benchmark --json o.json --masks 0
benchmark --json o.json --batch 1 0
benchmark --json o.json --runs 0
benchmark --json o.json --run nowhere
benchmark --json o.json --run {0}/run
benchmark --json o.json --cases demo_dit --kinds train_search
benchmark --json {0}
benchmark --json nowhere/o.json
benchmark-options --config nowhere --out o.json
benchmark-options --config demo_dit --out nowhere/o.json
benchmark-options --config demo_dit --out {0}
benchmark-options --config demo_dit --out o.json --steps 0
benchmark-options --config demo_dit --out o.json --warmup -1
benchmark-options --config demo_dit --out o.json --steps 100000
benchmark-options --config demo_dit --out o.json --option optim.fuse=true
train
train --config nowhere
train --config {0}
train --config {0}/broken.yaml
train --config {0}/list.yaml
train --config {0}/twice.yaml
train --config {0}/cp1252.txt
train --config demo_dit --stepz 3
train --config demo_dit --train.steps=3
train --config demo_dit steps
train --config demo_dit name=../x
train --config demo_dit output_dir={0}/images
train --config demo_dit output_dir={0}/text.txt
train --config demo_dit output_dir={0}/text.txt/o
train --config demo_dit output_dir=/proc/none/o
train --config demo_dit output_dir={long}
train --config demo_dit resume=latest
train --config demo_dit resume={0}/images
train --config demo_dit train.search_steps=9 train.steps=5
train --config demo_dit train.batch_size=7 train.gradient_accumulation=2
trian
--config demo_dit
"""
CASES = [line for line in FOR_COMMANDS.splitlines() if line]


def outside(within):
    """A number that an interval does not hold."""
    low, high = (float(bound) for bound in within[1:-1].split(","))
    return low - 1 if not math.isinf(low) else high + 1


def wrong_values():
    for path, entry, annotation in schema.keys(Config):
        if str not in (typing.get_args(annotation) or (annotation,)):
            yield f"{path}={{a: b}}"
        if entry.metadata["choices"]:
            yield f"{path}=neither"
        if entry.metadata["within"]:
            number = outside(entry.metadata["within"])
            yield f"{path}=[{number}, {number}]" if isinstance(entry.default, tuple) else f"{path}={number}"
        yield f"{path}x=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    files = {
        "text.txt": b"a\nb\n", "cp1252.txt": "caf\xe9\n".encode("cp1252") * 5, "nul.txt": b"a\0b\n",
        "blank.txt": b"\n \n",
        "broken.json": b"{", "list.json": b"[1]", "object.json": b'{"a": 1}', "half.json": b'{"fid": {"value": 3}}',
        "words.json": json.dumps({"fid": dict.fromkeys(
            ("value", "protocol", "images_protocol", "network", "reference", "images"), "word")}).encode(),
        "coco.json": json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}],
                                 "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}).encode(),
        "table.tsv": b"a caption\tan address\n", "bad.npz": b"no archive", "broken.yaml": b"a: [",
        "list.yaml": b"- a\n",
        "twice.yaml": b"seed: 1\nseed: 2\n", "run/final/experts.json": b"{}", "run/final/model_index.json": b"{}",
        "other-json/experts.json": b"[]", "drawn/manifest.json": b"[1]",
        "drawn-otherwise/manifest.json": b'{"settings": {"steps": 3}, "images": []}',
        **{f"{name}/{i}.png": png(i) for name, count in (("images", 5), ("few", 2), ("drawn", 5))
           for i in range(count)},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def refused(place, tmp_path, monkeypatch, capfd):
    """Runs a command that must be refused; returns what it says on stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def listed():
        return {path: path.stat().st_mtime_ns for folder in (place, tmp_path) for path in folder.rglob("*")}

    def call(*words):
        before = listed()
        monkeypatch.chdir(tmp_path)
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith(("error: ", "alter: error: "))
                 or line.startswith("alter ") and ": error: " in line]
        assert code == 2 and lines and "Traceback" not in said, said
        assert listed() == before
        return said

    return call


@pytest.mark.parametrize("case", CASES)
def test_a_command_refuses(refused, place, case):
    refused(*("" if word == "''" else word.format(place, long="n" * 300) for word in case.split()))


@pytest.mark.parametrize("override", wrong_values())
def test_a_key_refuses(refused, override):
    path = override.partition("=")[0]
    said = refused("train", "--config", "demo_dit", override)
    assert path in said


def test_the_table_is_long_and_names_every_command():
    assert len(CASES) >= 150
    assert {case.split()[0] for case in CASES} >= COMMANDS.keys()


def test_the_set_that_is_too_small_is_named(refused, place):
    said = refused("evaluate", "--images", f"{place}/images", "--reference", f"{place}/few", "--cache", "c")
    assert f"error: {place}/few: a set of 2 images is too small" in said


def test_faults_of_one_configuration_are_told_together(refused):
    said = refused("train", "--config", "demo_dit", "train.steps=0", "budget.keep_ratio=2", "seed=x")
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 3


def test_tilde_is_the_home_directory(refused, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    said = refused("sample", "--run=~/run", "--prompts=~/blank.txt", "--out=~/o")
    assert f"{place}/blank.txt: holds no prompt" in said
    assert not (tmp_path / "~").exists()


