"""The committed notebook shows something, and runs from top to bottom on another run."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from alter import TemporalExperts, train

NOTEBOOK = Path(__file__).parents[2] / "notebooks/inspect_experts.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_committed_notebook():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 1.5e6
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # from top to bottom, once
    assert all(not cell.metadata for cell in notebook.cells)  # no timings
    kinds = [output.output_type for output in outputs(notebook)]
    assert "error" not in kinds and not any(output.get("name") == "stderr" for output in outputs(notebook))
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 12
    assert "The ranking of the layers is" in "".join(output.get("text", "") for output in outputs(notebook))
    without_images = json.dumps([[cell.source, [
        {**output, "data": {**output.get("data", {}), "image/png": ""}} for output in cell.get("outputs", [])]]
        for cell in notebook.cells])
    assert not re.search(r"/(home|root|work|tmp|usr|Users|mnt|opt)/|site-packages|0x[0-9a-f]{6}", without_images)


@pytest.mark.parametrize("kind", ["dit", pytest.param("sd", marks=pytest.mark.slow)])
def test_it_runs_on_another_run(small_config, kind):
    pytest.importorskip("ipykernel")
    from nbclient import NotebookClient

    run = train(small_config(kind)).run_dir
    experts = TemporalExperts.from_pretrained(run / "final")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = notebook.cells[1]
    for default, small in (('"outputs/demo_dit/latest"', repr(str(run))), ('Scheduler", 20', 'Scheduler", 3')):
        assert parameters.source.count(default) == 1
        parameters.source = parameters.source.replace(default, small)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()  # raises at the first error
    text = "".join(output.get("text", "") for output in outputs(notebook))
    assert "history.jsonl" not in text and "metrics.jsonl" not in text  # nothing that the run has is missing
    assert experts.summary() in text
    table = [line.split() for line in text.partition("from experts\n")[2].splitlines()]
    assert [line[:-3] for line in table] == [["dense"], ["experts"], *(["expert", str(e)] for e in experts.used)]
    assert table[0][-3:-1] == ["100.0%", "0.000"] and table[1][-1] == "0.000" and float(table[1][-2]) > 0
