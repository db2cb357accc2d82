"""A trainer's state, to a checkpoint and back: all that a resumed run needs to be the run that was not interrupted."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from ..backbones.family import COMPONENTS
from ..backbones.pretrained import trained_parameters
from ..common.errors import InputError
from ..data.latents import text_hashes, weights_hash
from ..experts.artefact import TemporalExperts
from .checkpoint import UNWRITTEN, checkpoints, load_checkpoint, load_parameters, load_state, save_checkpoint
from .setup.parts import Parts

_INPUTS = {"data": ("another number of samples, or other shards, in data.path", "bring the data back"),
           "weights": ("other weights in backbone.pretrained", "name the model that the run began with")}


def fingerprint(parts: Parts) -> dict[str, Any]:
    """Of what a checkpoint does not hold, and a resumed run must find as it was: the samples' places, and the weights
    of VAE and text encoder, of what is frozen, and of the teacher unless `teacher.pretrained` names another."""
    stored = parts.source.shards or [len(parts.source)]
    return {"data": hashlib.sha256(json.dumps(stored).encode()).hexdigest(),
            "weights": [weights_hash(parts.folder / part) for part in
                        (*COMPONENTS, "vae")] + [*text_hashes(parts.folder).values()]}


def save_state(trainer: Any, needed: bool) -> Path:
    """Write a checkpoint of the `Trainer` at its present step, of which all processes learn the outcome.

    Raises:
        InputError: if it could not be written and is `needed`; otherwise a line says so, and the run goes on.
    """
    folder = trainer.run_dir / "checkpoints"
    path = folder / f"step-{trainer.step:06d}"
    failure = None
    if trainer.accelerator.is_main_process:
        tensors: dict[str, dict[str, Tensor]] = {"backbone": dict(trained_parameters(trainer.backbone))}
        if trainer.search:
            tensors["search"] = trainer.search.tensors()
        if trainer.ema:
            tensors["ema"] = dict(zip(tensors["backbone"], trainer.ema.shadow_params, strict=True))
        optimizers = {name: update.state_dict() for name, (update, _) in trainer.updates.items()}
        state = {"frozen": trainer.experts is not None, "counts": trainer.readout.counts, **trainer.inputs,
                 "ema_step": trainer.ema.optimization_step if trainer.ema else 0}
        try:
            saved = save_checkpoint(folder, trainer.step, trainer.config, tensors, optimizers, state, trainer.experts)
            assert saved == path
        except UNWRITTEN as error:
            failure = f"{path} could not be written ({' '.join(str(error).split())[:200]})"
            written = checkpoints(folder)
            if needed:
                failure += ": make room, and " + (f"go on from {written[-1].name} with resume=latest" if written
                                                  else "start anew: there is no earlier checkpoint")
            else:
                tqdm.write(f"warning: {failure}: the run goes on to the next checkpoint", file=sys.stderr)
    failure = broadcast_object_list([failure])[0]
    if failure and needed:
        raise InputError(failure)
    return path


def check_inputs(parts: Parts, folder: Path) -> None:
    """Is the checkpoint one of this data and these pretrained weights? To be asked before the run is touched.

    Raises:
        InputError: if not, or if it cannot be read.
    """
    state, inputs = load_state(folder), fingerprint(parts)
    for name, (what, remedy) in _INPUTS.items():
        if state[name] != inputs[name]:
            raise InputError(f"resume: {folder} was made with {what}: {remedy}, or start a new run")


def restore_state(trainer: Any, folder: Path) -> None:
    """Let a fresh `Trainer` go on from a checkpoint.

    Raises:
        InputError: if it cannot be read.
    """
    tensors, optimizers, state = load_checkpoint(folder)
    load_parameters(trainer.backbone, tensors["backbone"])
    if trainer.search:
        trainer.search.load_tensors(tensors["search"])
    optim = trainer.config.optim
    for name, (update, lr) in trainer.updates.items():
        update.load_state_dict(optimizers[name], lr, optim.betas, optim.weight_decay)
    if trainer.ema:
        names = trained_parameters(trainer.backbone)
        for name, shadow in zip(names, trainer.ema.shadow_params, strict=True):
            shadow.copy_(tensors["ema"][name])
        trainer.ema.optimization_step = state["ema_step"]
    if state["frozen"]:
        trainer.experts = TemporalExperts.from_pretrained(folder)
    trainer.step = state["step"]
    trainer.readout.restore(state["counts"])
