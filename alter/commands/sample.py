"""Draw images with a run's experts: `alter sample --run DIR --prompts FILE --out DIR`.

`accelerate launch -m alter sample ...` uses every GPU. Image i depends on the seed, on i and on its prompt alone (up to
rounding; DiTPipeline with a scheduler that adds noise draws that noise for a whole batch). Started again with the same
arguments, it draws what is missing.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .options import announce_loading

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # torch's names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="run directory, or the pipeline folder itself")
    conditions = parser.add_mutually_exclusive_group(required=True)
    conditions.add_argument("--prompts", metavar="FILE", help="text file, a prompt a line")
    conditions.add_argument("--labels", type=int, nargs="+", metavar="CLASS")
    parser.add_argument("--num", type=int, help="images; prompts or labels repeat in turn (default: one of each)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--scheduler", metavar="NAME", help="a diffusers scheduler (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="images of one call on one process (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dense", action="store_true", help="without experts: the fine-tuned weights run dense")
    parser.add_argument("--out", metavar="DIR", required=True)


def run(arguments: argparse.Namespace) -> None:
    announce_loading()
    import torch
    from tqdm import tqdm

    from ..common.process import this_process

    state, out = this_process(), Path(arguments.out)
    conditions = arguments.labels or _read_prompts(Path(arguments.prompts))
    images = [{"file": f"{i:06d}.png", "condition": conditions[i % len(conditions)],
               "seed": arguments.seed * 2**32 + i} for i in range(arguments.num or len(conditions))]
    settings = {name: value for name, value in vars(arguments).items()
                if name not in ("prompts", "num", "batch", "out")}
    pipe = _load(arguments).to(state.device)
    _check_manifest(out / "manifest.json", settings, images)
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": settings, "images": images}, indent=1) + "\n"
        (out / "manifest.json").write_text(content, encoding="utf-8")
    state.wait_for_everyone()
    pipe.set_progress_bar_config(disable=True)
    missing = [image for image in images[state.process_index :: state.num_processes]
               if not (out / image["file"]).is_file()]
    extra = {} if arguments.guidance is None else {"guidance_scale": arguments.guidance}
    with tqdm(total=len(missing), unit="image", disable=not state.is_main_process, dynamic_ncols=True) as bar:
        for first in range(0, len(missing), arguments.batch):
            batch = missing[first : first + arguments.batch]
            generators = [torch.Generator().manual_seed(image["seed"]) for image in batch]
            torch.manual_seed(batch[0]["seed"])
            drawn = pipe([image["condition"] for image in batch], num_inference_steps=arguments.steps,
                         generator=generators, **extra).images
            for image, picture in zip(batch, drawn, strict=True):
                partial = out / f".partial-{image['file']}"
                picture.save(partial)
                os.replace(partial, out / image["file"])
            bar.update(len(batch))
    state.wait_for_everyone()
    state.destroy_process_group()


def _load(arguments: argparse.Namespace) -> Any:
    import torch
    from diffusers import DiffusionPipeline, DiTPipeline

    from ..backbones.sampling import scheduler_class
    from ..experts.load import load_pipeline

    folder = Path(arguments.run)
    folder = folder / "final" if (folder / "final").is_dir() else folder
    if not (folder / "vae").is_dir():
        raise InputError(f"--run {arguments.run}: {folder} is no pipeline with a vae: name a finished run on images")
    load = DiffusionPipeline.from_pretrained if arguments.dense else load_pipeline
    pipe: Any = load(folder, torch_dtype=getattr(torch, DTYPES[arguments.dtype]))
    if isinstance(pipe, DiTPipeline) != (arguments.labels is not None):
        wanted = "--labels" if isinstance(pipe, DiTPipeline) else "--prompts"
        raise InputError(f"--run {arguments.run}: a {type(pipe).__name__} takes {wanted}")
    if arguments.scheduler is not None:
        pipe.scheduler = scheduler_class(arguments.scheduler, "--scheduler ").from_config(pipe.scheduler.config)
    return pipe


def _read_prompts(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"--prompts {file}: no such file")
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {file}: holds no prompt")
    return prompts


def _check_manifest(file: Path, settings: dict[str, Any], images: list[dict[str, Any]]) -> None:
    """Refuse to add to images that were drawn otherwise."""
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before["settings"].get(name) != value:
            raise InputError(f"--out {file.parent}: was drawn with {name}={before['settings'].get(name)!r}, not "
                             f"{value!r}: choose another folder")
    common = min(len(before["images"]), len(images))
    if before["images"][:common] != images[:common]:
        raise InputError(f"--out {file.parent}: was drawn with other prompts: choose another folder")
