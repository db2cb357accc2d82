"""facebookresearch/DiT's checkpoints as diffusers folders, and back.

alter convert to-diffusers DiT-XL-2-256x256.pt --out DIR [--vae DIR]   of a training checkpoint (DiT, fast-DiT,
                                                                       TinyFusion) its "ema"
alter convert to-facebook DIR --out FILE.pt   a state dict that the original's load_state_dict takes

Sizes are read from the weights. A folder with a VAE is a complete DiTPipeline. Nothing is downloaded, and no code in
a checkpoint runs.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import InputError
from ..common.files import check_writable
from .options import check_least, user_path

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=("to-diffusers", "to-facebook"))
    parser.add_argument("source", type=user_path, help="the .pt file; to-facebook: a pipeline folder with transformer/")
    parser.add_argument("--out", type=user_path, required=True, help="folder to make; to-facebook: .pt file to write")
    parser.add_argument("--heads", type=int,
                        help="attention heads (default: those of DiT-S, -B, -L or -XL, by width); to-diffusers only")
    parser.add_argument("--vae", type=user_path, metavar="DIR",
                        help="folder of its AutoencoderKL, such as sd-vae-ft-mse; to-diffusers only")


def run(arguments: argparse.Namespace) -> None:
    if arguments.direction == "to-facebook" and (arguments.heads, arguments.vae) != (None, None):
        raise InputError("--heads and --vae: are of to-diffusers: leave them out")
    check_least(arguments, 1, "heads")
    out: Path = arguments.out
    if out.exists() and not (arguments.direction == "to-diffusers" and out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: exists: choose another name")
    check_writable(out, "--out", folder=True)
    import torch
    from diffusers.utils import logging

    from ..backbones.facebook_dit import read_checkpoint, to_diffusers, to_facebook

    logging.set_verbosity(logging.CRITICAL)  # what diffusers complains of is refused, in one line
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if arguments.direction == "to-diffusers":
            model = to_diffusers(read_checkpoint(arguments.source), arguments.heads, str(arguments.source))
            _write_folder(model, arguments.vae, partial)
            os.replace(partial, out)
        else:
            model = _load(arguments.source)
            torch.save(to_facebook(model, str(arguments.source)), partial / out.name)
            os.replace(partial / out.name, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    config = model.config
    print(f"{config.num_layers} blocks of {config.num_attention_heads} heads of {config.attention_head_dim}, "
          f"{config.num_embeds_ada_norm} classes, latents {model.config.in_channels} x {config.sample_size} x "
          f"{config.sample_size}: written to {out}")


def _write_folder(model: "DiTTransformer2DModel", vae_folder: Path | None, out: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    if vae_folder is None:
        model.save_pretrained(out / "transformer")
        scheduler.save_pretrained(out / "scheduler")
        return
    if not (vae_folder / "config.json").is_file():
        raise InputError(f"--vae {vae_folder}: no config.json: name the folder of a diffusers AutoencoderKL")
    try:
        vae = AutoencoderKL.from_pretrained(vae_folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--vae {vae_folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    if vae.config.latent_channels != model.config.in_channels:
        raise InputError(f"--vae {vae_folder}: latents of {vae.config.latent_channels} channels, but the model takes "
                         f"{model.config.in_channels}: name the VAE it was trained with")
    DiTPipeline(model, vae, scheduler).save_pretrained(out)


def _load(folder: Path) -> "DiTTransformer2DModel":
    from diffusers import DiTTransformer2DModel

    from ..experts.artefact import FILE_NAME as EXPERTS

    if (folder / EXPERTS).is_file():
        raise InputError(f"{folder}: has {EXPERTS}: the original has no experts, and the weights tuned under them are "
                         "no model without: give a folder without them")
    if not (folder / "transformer" / "config.json").is_file():
        raise InputError(f"{folder}: no transformer/config.json: give the folder of a DiT pipeline")
    try:
        model, info = DiTTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder}/transformer: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if odd:
        raise InputError(f"{folder}/transformer: {odd[0]}: in only one of the weights and the configuration: write "
                         "the folder again")
    return model
