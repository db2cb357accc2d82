"""Records of a run's masks: history.jsonl, with a line every `log.masks_every` steps, and sensitivity.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputError
from ...common.files import write_text
from ...experts.stored import from_runs, runs
from ...method.sensitivity import Sensitivity

HISTORY, SENSITIVITY = "history.jsonl", "sensitivity.json"


def describe_masks(mask_EL: np.ndarray, expert_T: np.ndarray) -> dict[str, Any]:
    """Masks bool [E, L] as strings of 0 and 1, and routes int [T] as [first timestep, expert] wherever they change."""
    return {"masks": ["".join(map(str, mask_L.astype(int))) for mask_L in mask_EL], "routes": runs(expert_T)}


def read_history(file: Path, timesteps: int) -> list[dict[str, Any]]:
    """Its records: "step", "keep_ratio", "mask_EL" bool [E, L] and "expert_T" int64 [T]."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records.append({"step": record["step"], "keep_ratio": record["keep_ratio"],
                        "mask_EL": np.array([[bit == "1" for bit in mask] for mask in record["masks"]]),
                        "expert_T": from_runs(record["routes"], timesteps)})
    return records


def write_sensitivity(table: Sensitivity, file: Path) -> None:
    """Write the table as JSON."""
    write_text(file, json.dumps(table.to_plain()) + "\n")


def read_sensitivity(file: Path) -> Sensitivity:
    """What `write_sensitivity` wrote.

    Raises:
        InputError: naming the file, if it is anything else.
    """
    try:
        return Sensitivity.from_plain(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{file}: no sensitivity table ({type(error).__name__}: {error}): measure it with "
                         "`alter measure`") from None
