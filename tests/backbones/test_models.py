"""The table of `alter models`: its marks are what the tests run on, its costs are counted, its page is up to date."""

import json
import sys

import pytest
from helpers import ROOT
from zoo import of_the_newest

from alter.backbones.models import FILE, MARKS, blocks_are_verified, known_models, table
from alter.commands import main


@pytest.fixture(scope="module")
def writer():
    sys.path.insert(0, str(ROOT / "scripts"))
    import write_models

    return write_models


@of_the_newest
def test_its_marks_are_those_of_the_tests(writer):
    found = writer.verified()
    assert {row.cls for row in known_models()} == found.keys()
    assert all(row.verified == found[row.cls] for row in known_models()), "run scripts/write_models.py"
    assert found["QwenImageTransformer2DModel"] == {**dict.fromkeys(MARKS, "yes"), "batches": "not QwenImageEdit2511"}
    assert found["ErnieImageTransformer2DModel"]["batches"] == "no"
    assert found["CosmosTransformer3DModel"]["blocks"] == "some"


@of_the_newest
def test_its_rows_are_the_models_that_are_known(writer):
    assert [(row.cls, row.model) for row in known_models()] == [(row["cls"], row["model"]) for row in writer.models()]


@pytest.mark.parametrize("index", [pytest.param(index, marks=() if known_models()[index].model in (
    "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.1-T2V-14B-Diffusers") else pytest.mark.slow)
    for index in range(len(known_models()))])
def test_its_costs_are_counted(writer, index):
    row = json.loads(FILE.read_text())[index]
    costs = writer.costs(row)
    assert costs == {key: row[key] for key in costs}


def test_the_page_is_up_to_date(tmp_path, capsys):
    assert main(["models", "--markdown", str(tmp_path / "models.md")]) == 0
    assert (tmp_path / "models.md").read_text() == (ROOT / "docs/models.md").read_text(), \
        "run alter models --markdown docs/models.md"
    assert main(["models"]) == 0
    assert table() in capsys.readouterr().out


def test_classes_whose_blocks_were_removed():
    assert blocks_are_verified("FluxTransformer2DModel") and blocks_are_verified("CosmosTransformer3DModel")
    assert not blocks_are_verified("UVit2DModel")
