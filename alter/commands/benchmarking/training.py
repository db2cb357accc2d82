"""One iteration of the trainer against a dense simulation of the same update.

The simulation computes every layer, blends by the mask, and asks the teacher for each of the two updates. In forwards
of the dense model, an iteration of the search at keep ratio k is 3 + 3k against 7, one after it 1 + 3k against 4.
On a CPU the backbone is cut to a few blocks of the real width.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DDPMScheduler

from ...backbones.cost import CostTable
from ...backbones.dit import embedders
from ...backbones.gates import SoftRows
from ...backbones.inputs import example_inputs
from ...backbones.pretrained import component_of
from ...common.load import CONFIGS, load_config
from ...data.batches import collate
from ...training import trainer as trainer_module
from ...training.run import make_accelerator
from ...training.setup.parts import build
from ...training.trainer import Trainer, searching
from ...training.update import Update
from . import CASES
from .cases import T, draw_mask
from .timing import host_reads, interleave, peak_memory, synchronize

# Configuration of the run; on a CPU: what is cut of the backbone, and the latents' size.
CUT: dict[str, tuple[str, dict[str, Any], int]] = {
    "dit_xl2": ("configs/dit_xl2.yaml", {"num_layers": 4}, 32),
    "sd21": ("configs/sd21.yaml", {
        "block_out_channels": [320, 640], "attention_head_dim": [5, 10], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}, 32),
}


def iterations(name: str, arguments: Any, batch: int, kinds: list[str],
               device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each kind, keep ratio, and with and without the optimizer step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, Path(folder), batch, device)
        raw = collate([trainer.parts.source[i, 0] for i in range(batch)]) | {"skipped": []}
        for keep, kind in itertools.product(arguments.keep, kinds):
            for row in _compare(trainer, raw, keep, kind, arguments.runs, device):
                yield {"mask_seed": 0, "sites": len(trainer.parts.cost.sites), **row,
                       "dtype": "fp32" if device.type == "cpu" else "fp32, bf16 autocast"}


def _trainer(name: str, folder: Path, batch: int, device: torch.device) -> Trainer:
    config_file, cut, small = CUT[name]
    template, on_cpu = CONFIGS / "models" / CASES[name][0], device.type == "cpu"
    size = small if on_cpu else CASES[name][1]
    cls, component = component_of(template)
    values = {**cls.load_config(template / component), **(cut if on_cpu else {}), "sample_size": size}
    torch.manual_seed(0)
    with torch.device(device):
        backbone: Any = cls.from_config(values)
    for embedder in embedders(backbone):  # equal copies, as in every trained DiT
        embedder.load_state_dict(embedders(backbone)[0].state_dict())
    backbone.save_pretrained(folder / component)
    DDPMScheduler.from_pretrained(template / "scheduler").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    example = example_inputs(backbone, size)
    for i in range(2 * batch):
        _save(folder / "train_features" / f"{i}.npy", torch.randn(1, backbone.config.in_channels, size, size))
        if "class_labels" in example:
            _save(folder / "train_labels" / f"{i}.npy", torch.tensor([i % 1000]))
        else:
            _save(folder / "train_text" / f"{i}.npy", torch.randn(example["encoder_hidden_states"].shape[1:]))
    if "class_labels" not in example:
        _save(folder / "empty_text.npy", torch.zeros(example["encoder_hidden_states"].shape[1:]))
    config = load_config(config_file, [
        f"backbone.pretrained={folder}", "backbone.revision=null", "data.source=latents", f"data.path={folder}",
        f"data.resolution={size}", "data.holdout=0", "data.flip=false", f"train.batch_size={batch}",
        "train.gradient_accumulation=1", f"train.mixed_precision={'no' if on_cpu else 'bf16'}", "log.tracker=none",
        "validate.every=null", f"output_dir={folder / 'run'}", "teacher.precision=fp32",
    ])
    accelerator = make_accelerator(config)
    return Trainer(config, build(config, 1, device), accelerator, folder)


def _save(file: Path, value: torch.Tensor) -> None:
    file.parent.mkdir(exist_ok=True)
    np.save(file, value.cpu().numpy())


def _masks(cost: CostTable, keep: float, timesteps_B: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Random masks, one for each sample, and routes to them; and their mean share of the MACs, near `keep`."""
    rows: list[np.ndarray] = []
    kept = 0.0
    for i in range(len(timesteps_B)):
        rows.append(draw_mask(cost, keep * (i + 1) - kept, [0, i]))
        kept += 1 - float(cost.share_L[~rows[-1]].sum())
    assert len(set(timesteps_B.tolist())) == len(timesteps_B), "each sample needs a route of its own"
    expert_T = np.zeros(T, dtype=np.int64)
    expert_T[timesteps_B] = np.arange(len(timesteps_B))
    return (np.stack(rows), expert_T), kept / len(rows)


def _compare(trainer: Trainer, raw: dict[str, Any], keep: float, kind: str, runs: int,
             device: torch.device) -> Iterator[dict[str, Any]]:
    [batch] = trainer._prepare(iter([{**raw}]))
    masks, k = _masks(trainer.parts.cost, keep, batch.timesteps.numpy())
    floor = (3 + 3 * k) / 7 if kind == "train_search" else (1 + 3 * k) / 4
    times: dict[str, list[float]] = {"ours": [], "dense": []}

    def iterate(way: str) -> None:
        prepared = trainer._prepare({**raw} for _ in itertools.count())
        if kind == "train_search":
            searching(trainer).update(prepared)
            trainer.masks()
            if way == "dense":
                prepared = trainer._prepare({**raw} for _ in itertools.count())
        else:
            trainer.readout.read()
        if way == "ours":
            trainer.update_backbone(prepared, *masks)
        else:
            with patch.object(trainer_module, "HardRows", lambda mask_BL, device: SoftRows(mask_BL.to(device).float())):
                trainer.update_backbone(prepared, *masks)

    step = Update.step

    def timed(way: str) -> Callable:
        def run() -> None:
            spent = 0.0

            def timed_step(update: Update) -> None:
                nonlocal spent
                synchronize(device)
                started = time.perf_counter()
                step(update)
                synchronize(device)
                spent += time.perf_counter() - started

            with patch.object(Update, "step", timed_step):
                iterate(way)
            times[way].append(spent)
        return run

    rounds, _ = interleave({way: timed(way) for way in times}, runs, device)
    seconds = {way: float(np.median(taken)) for way, taken in rounds.items()}
    stepping = {way: float(np.median(spent[-runs:])) for way, spent in times.items()}
    with host_reads(device) as reads:
        iterate("ours")
    peak = peak_memory(lambda: iterate("ours"), device)
    for with_step in (False, True):
        ours, dense = (seconds[way] - (0 if with_step else stepping[way]) for way in ("ours", "dense"))
        yield {"kind": kind, "keep_ratio": keep, "macs_ratio": k, "optimizer_step": with_step, "floor": floor,
               "time_ratio": ours / dense, "efficiency": floor / (ours / dense), "overhead": ours / dense / floor,
               "seconds_dense": dense, "peak_memory_bytes": peak, "host_syncs_per_step": len(reads)}
