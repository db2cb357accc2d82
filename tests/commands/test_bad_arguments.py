"""Bad input of every command and key: exit code 2, lines that begin with `error:`, no traceback, nothing written."""

import json
import math
import typing
from pathlib import Path

import pytest
from helpers import png

from alter.commands import COMMANDS, main
from alter.common import schema
from alter.common.config import Config

# A line a case. {0}: a folder with the files that `place` makes. The commands run in an empty folder.
FOR_COMMANDS = Path(__file__).with_name("bad_arguments.txt").read_text(encoding="utf-8")
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


