"""Whether encoded data were made by the models, and in the way, that a run would encode them by."""

from pathlib import Path
from typing import Any

from ...backbones.pretrained import read_config
from ...common.config import Config
from ...common.errors import InputError
from ...data.base import Encoding, Source
from ...data.latents import text_hashes, weights_hash

_OLD_VAE = {"scaling_factor": 0.18215, "shift_factor": None}  # keys that old configurations lack


def check_encoding(config: Config, folder: Path, source: Source) -> None:
    """Refuse latents and conditioning that were made otherwise than this run would make them, as far as is known.

    Raises:
        InputError: naming what differs.
    """
    data, encoding = config.data, source.encoding
    if encoding is None:
        return
    for name, found, wanted in _pairs(config, folder, encoding):
        if None not in (found, wanted) and found != wanted:
            raise InputError(f"data.path={data.path!r}: encoded by {encoding.maker} with {name.replace('_', ' ')} "
                             f"{found}, but backbone.pretrained={config.backbone.pretrained!r} at data.resolution="
                             f"{data.resolution} has {wanted}: encode again with `alter encode`")
    told = {"max_tokens": ("data.max_tokens", data.max_tokens),
            "bucket_step": ("data.bucket_step", data.bucket_step),
            "frames": ("data.frames", data.frames),
            "guidance_scale": ("evaluate.guidance_scale", config.evaluate.guidance_scale)}
    for name, found in encoding.told.items():
        key, wanted = told[name]
        if found != wanted:
            raise InputError(f"{key}={wanted}: data.path={data.path!r} was encoded with {found}: set that, or encode "
                             "again with `alter encode`")


def _pairs(config: Config, folder: Path, encoding: Encoding) -> list[tuple[str, Any, Any]]:
    """Name, what was found in the data and what this run has; None where one of them is not known."""
    pairs: list[tuple[str, Any, Any]] = [("resolution", encoding.resolution, config.data.resolution)]
    if (folder / "vae" / "config.json").is_file():
        vae = {**_OLD_VAE, **read_config(folder / "vae" / "config.json")}
        vae["shift_factor"] = vae["shift_factor"] or 0.0
        pairs += [(name, value, vae.get(name)) for name, value in encoding.vae_settings.items()]
        pairs.append(("VAE", encoding.vae, encoding.vae and weights_hash(folder / "vae")))
    if encoding.text_encoders:
        hashes = text_hashes(folder)
        pairs += [(name, value, hashes.get(name)) for name, value in encoding.text_encoders.items()]
    if encoding.pipeline is not None:
        index = read_config(folder / "model_index.json")
        pairs.append(("pipeline", encoding.pipeline, index.get("_class_name")))
    return pairs
