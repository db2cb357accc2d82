#!/usr/bin/env python3
"""Write alter/backbones/models.json, the table of `alter models`: costs are counted, marks are read from what the tests
are parametrised over. Afterwards: alter models --markdown docs/models.md
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), *(str(ROOT / "tests" / room) for room in ("backbones", "experts",
                                                                                        "training"))]

import diffusers  # noqa: E402
import test_any_transformer as blocks  # noqa: E402
import test_families as pipelines  # noqa: E402
import test_trained_families as training  # noqa: E402
import torch  # noqa: E402
from pipelines import PIPELINES, backbones  # noqa: E402
from zoo import ZOO  # noqa: E402

from alter import InputError  # noqa: E402
from alter.backbones.cost import count_cost  # noqa: E402
from alter.backbones.inputs import is_video  # noqa: E402
from alter.backbones.models import FILE, MARKS  # noqa: E402
from alter.backbones.pretrained import meta_backbone  # noqa: E402
from alter.backbones.sites import find_sites  # noqa: E402
from alter.backbones.sizes import vae_factor  # noqa: E402
from alter.common.load import CONFIGS  # noqa: E402

SIZES = {  # height, width, frames; of others 1024 x 1024 or, for videos, 480 x 832 with 81 frames
    "stable-diffusion-2-1": (768, 768, 1), "stable-diffusion-v1-5": (512, 512, 1), "DiT-XL-2-256": (256, 256, 1),
    "LTX-Video": (512, 704, 161),
}
ARGUMENTS = {  # of a class whose defaults make no model
    "HiDreamImageTransformer2DModel": {  # of HiDream-I1
        "patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": (64, 32, 32),
        "llama_layers": [*range(32), *[31] * 16]},
}


def main() -> None:
    found = verified()
    rows = [{**row, **costs(row), "verified": found[row["cls"]]} for row in models()]
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def models() -> list[dict[str, Any]]:
    """Released models that have a configuration, then classes that have none, by name."""
    released = []
    for folder in sorted(CONFIGS.glob("models/*/*"), key=lambda folder: folder.name.lower()):
        if folder.parent.name != "demo":
            name = f"{folder.parent.name}/{folder.name}"
            released.append({"cls": type(meta_backbone(folder)).__name__, "model": name})
    classes = {ZOO[name].cls or name for name in ZOO} - {row["cls"] for row in released}
    return [*released, *({"cls": cls, "model": None} for cls in sorted(classes))]


def costs(row: dict[str, Any]) -> dict[str, Any]:
    """Size, sites, TMACs and prunable share; None for what cannot be counted."""
    folder = CONFIGS / "models" / (row["model"] or "none")
    if row["model"]:
        backbone = meta_backbone(folder)
    else:
        try:
            with torch.device("meta"):
                backbone = getattr(diffusers, row["cls"])(**ARGUMENTS.get(row["cls"], {}))
        except (RuntimeError, TypeError, ValueError):
            return {"size": None, "sites": None, "tmacs": None, "prunable": None}
    usual = (480, 832, 81) if is_video(backbone) else (1024, 1024, 1)
    height, width, frames = SIZES.get(folder.name, usual)
    side, ahead = vae_factor(folder) if row["model"] else 8, 8 if folder.name == "LTX-Video" else 4
    try:
        cost = count_cost(backbone, (height // side, width // side), (frames - 1) // ahead + 1)
    except InputError:
        return {"size": None, "sites": len(find_sites(backbone)), "tmacs": None, "prunable": None}
    pictures = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")
    latents = f"latents {width // side}x{height // side}" + (f"x{(frames - 1) // ahead + 1}" if frames > 1 else "")
    return {"size": pictures if row["model"] else latents, "sites": len(cost.sites),
            "tmacs": round(cost.macs_total / 1e12, 4), "prunable": round(cost.prunable_share, 4)}


def verified() -> dict[str, dict[str, str]]:
    """Of every class, what each mark holds for."""
    specimens = {name: ZOO[name].cls or name for name in ZOO}
    drawn = {name: {type(one).__name__ for one in backbones(make()).values()} for name, make in PIPELINES.items()}
    removed = cases(blocks.test_a_skipped_block_is_one_without_weights)
    tested = {
        "dense": marks(specimens, removed),
        "blocks": marks(specimens, removed, but=blocks.OTHERS, note="some"),
        "batches": marks(specimens, cases(blocks.test_samples_run_their_own_layers)),
        "pipeline": by_pipeline(drawn, cases(pipelines.test_text_to_image_or_video)),
        "training": by_pipeline(drawn, cases(training.test_a_resumed_run_is_the_uninterrupted_one)),
    }
    # In tests/experts/test_class_conditional_pipeline.py and tests/training/test_run.py, which have no other class.
    for mark in ("pipeline", "training"):
        tested[mark]["DiTTransformer2DModel"] = "yes"
    return {cls: {mark: tested[mark].get(cls, "no") for mark in MARKS} for cls in sorted(set(specimens.values()))}


def marks(specimens: dict[str, str], tested: set[str], but: Iterable[str] = (), note: str = "") -> dict[str, str]:
    """Class to "yes", or `note` where a specimen of it is in `but`, or "not X" for a variant X that is not tested."""
    found = {}
    for cls in set(specimens.values()):
        own = [name for name in specimens if specimens[name] == cls]
        missing = [name for name in own if name not in tested]
        if len(missing) < len(own):
            found[cls] = note if set(own) & set(but) else f"not {', '.join(missing)}" if missing else "yes"
    return found


def by_pipeline(drawn: dict[str, set[str]], tested: set[str]) -> dict[str, str]:
    return {cls: "yes" for name in tested for cls in drawn[name]}


def cases(test: Callable) -> set[str]:
    """The first argument of every case of a parametrised test."""
    found: Any = next(mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize")
    return {getattr(case, "values", (case,))[0] for case in found.args[1]}


if __name__ == "__main__":
    main()
