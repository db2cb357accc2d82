"""Draw images with a run's experts: `alter sample --run DIR --prompts FILE --out DIR`.

`accelerate launch -m alter sample ...` uses every GPU. Image i depends on the seed, on i and on its prompt alone (up to
rounding; DiTPipeline with a scheduler that adds noise draws that noise for a whole batch). Started again with the same
arguments, it draws what is missing.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.files import check_writable, read_text
from .options import announce_loading, check_least, read_prompts, user_path

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # torch's names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=user_path, required=True, help="run directory, or the pipeline folder itself")
    conditions = parser.add_mutually_exclusive_group(required=True)
    conditions.add_argument("--prompts", type=user_path, metavar="FILE", help="text file, a prompt a line")
    conditions.add_argument("--labels", type=int, nargs="+", metavar="CLASS")
    parser.add_argument("--num", type=int, help="images; prompts or labels repeat (default: one each)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 20, or those of --plan)")
    parser.add_argument("--scheduler", metavar="NAME", help="a diffusers scheduler (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the pipeline's)")
    add_size(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="images of one call on one process (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    dense = parser.add_mutually_exclusive_group()
    dense.add_argument("--dense", action="store_true", help="without experts: the fine-tuned weights run dense")
    dense.add_argument("--original", action="store_true",
                       help="with the dense model that the run started from, as its config.yaml names it, in place of "
                       "tuned weights and experts")
    dense.add_argument("--dense-pipeline", type=user_path, metavar="FOLDER",
                       help="--original, with the backbone of this pipeline")
    dense.add_argument("--plan", type=user_path, metavar="DIR",
                       help="with the steps and layers that `alter plan --out DIR` chose")
    parser.add_argument("--keep", type=float, metavar="RATIO", help="the rung of this keep ratio or the next lower one "
                        "(default: that of experts.json)")
    parser.add_argument("--latents", action="store_true",
                        help="keep what the VAE decodes beside each image (.npy), to compare by")
    parser.add_argument("--out", type=user_path, metavar="DIR", required=True)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Shared with `alter plan`."""
    parser.add_argument("--resolution", type=int, metavar="SIDE", help="in pixels (default: the run's, or else the "
                        "pipeline's)")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    conditions = arguments.labels or read_prompts(arguments.prompts)
    announce_loading()
    import numpy as np
    import torch
    from tqdm import tqdm

    from ..backbones.latents import decoded
    from ..backbones.stepping import keep_steps
    from ..common.process import this_process
    from ..experts.trajectory import following

    arguments.steps = _steps(arguments)
    asked, arguments.taken = _take_settings(arguments)
    if arguments.plan is None:
        take_size(arguments)
    state, out = this_process(), arguments.out
    images = [{"file": f"{i:06d}.png", "condition": conditions[i % len(conditions)],
               "seed": arguments.seed * 2**32 + i} for i in range(arguments.num or len(conditions))]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
                if name not in ("prompts", "num", "batch", "out")}
    digest = _experts_digest(arguments.plan or arguments.run)
    settings |= {"run": str(arguments.run.resolve()), "experts": digest}  # latest may move
    _check_manifest(out / "manifest.json", settings, images)
    pipe = load_asked(arguments).to(state.device)
    if arguments.taken is not None:
        keep_steps(pipe.scheduler, arguments.taken, asked)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
        if state.is_main_process:
            print("the pipeline's safety checker is left out: it would blacken images", file=sys.stderr)
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": settings, "images": images}, indent=1) + "\n"
        (out / "manifest.json").write_text(content, encoding="utf-8")
    state.wait_for_everyone()
    pipe.set_progress_bar_config(disable=True)
    condition = "prompt" if arguments.labels is None else "class_labels"
    missing = [image for image in images[state.process_index :: state.num_processes]
               if not (out / image["file"]).is_file()]
    with tqdm(total=len(missing), unit="image", disable=not state.is_main_process, dynamic_ncols=True) as bar:
        for first in range(0, len(missing), arguments.batch):
            batch = missing[first : first + arguments.batch]
            generators = [torch.Generator().manual_seed(image["seed"]) for image in batch]
            torch.manual_seed(batch[0]["seed"])
            with decoded(pipe.vae if arguments.latents else None) as latents, following(pipe.scheduler):
                named = {condition: [image["condition"] for image in batch]}
                drawn = pipe(**named, num_inference_steps=asked, generator=generators,
                             **drawing(arguments, pipe, len(batch))).images
            for image, row in zip(batch, latents, strict=True) if arguments.latents else ():
                np.save((out / image["file"]).with_suffix(".npy"), row.numpy())
            for image, picture in zip(batch, drawn, strict=True):
                partial = out / f".partial-{image['file']}"
                picture.save(partial)
                os.replace(partial, out / image["file"])
            bar.update(len(batch))
    state.wait_for_everyone()
    state.destroy_process_group()


def take_size(arguments: argparse.Namespace) -> None:
    """Let `resolution`, unless it is asked for, `max_tokens` and `frames` of a drawing by prompts be the run's."""
    from ..common.schema import read_yaml

    file = _config_file(arguments.run)
    data = read_yaml(file).get("data") if file is not None and arguments.labels is None else None
    trained = data if isinstance(data, dict) else {}
    arguments.resolution = arguments.resolution or trained.get("resolution")
    arguments.max_tokens, arguments.frames = trained.get("max_tokens"), trained.get("frames", 1)


def drawing(arguments: argparse.Namespace, pipe: Any, count: int) -> dict[str, Any]:
    """What a call for `count` images is given beside its conditions and steps."""
    from ..backbones.conditioning import AS_GIVEN
    from ..backbones.guidance import guided
    from ..experts.apply import backbone_of

    side, tokens = arguments.resolution, arguments.max_tokens
    wanted = {"height": side, "width": side, "max_sequence_length": tokens,
              "num_frames": arguments.frames if arguments.frames != 1 else None, **AS_GIVEN}
    if arguments.guidance is not None:
        wanted |= guided(pipe, backbone_of(pipe), arguments.guidance, count)
    accepted = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in wanted.items() if value is not None and name in accepted}


def load_asked(arguments: argparse.Namespace, videos: bool = False) -> Any:
    """The pipeline that the arguments name, with experts or without.

    Raises:
        InputError: if it draws no images, or not of such conditions.
    """
    import torch
    from diffusers import DiTPipeline

    from ..backbones.dit import null_class
    from ..backbones.pretrained import component_of, load_backbone, local_folder
    from ..backbones.schedules import is_flow, load_scheduler, make_sampler, scheduler_class, tokens_of
    from ..backbones.sizes import makes_videos
    from ..experts.artefact import TemporalExperts
    from ..experts.load import load_dense, load_pipeline
    from ..experts.pipeline import ClassConditionalPipeline

    folder = arguments.run / "final" if (arguments.run / "final").is_dir() else arguments.run
    parts = local_folder(str(folder), field="--run") if folder.is_dir() else folder  # of adapters: their base's
    if not (parts / "model_index.json").is_file():
        raise InputError(f"--run {arguments.run}: {folder} is no pipeline: it has no model_index.json: name a finished "
                         "run")
    if arguments.scheduler is not None:
        scheduler_class(arguments.scheduler, "--scheduler ", is_flow(load_scheduler(parts)))
    if not videos and makes_videos(parts):
        raise InputError(f"--run {arguments.run}: draws videos, not images: call its pipeline from Python "
                         "(docs/use.md)")
    if not any((parts / part).is_dir() for part in ("vae", "transformer")):
        raise InputError(f"--run {arguments.run}: {folder} has no VAE and draws no images: name a run on images")
    dtype = getattr(torch, DTYPES[arguments.dtype])
    if arguments.original or arguments.dense_pipeline:
        original, field = _original(arguments, parts)
        backbone = {component_of(parts)[1]: load_backbone(original, field, dtype).eval()}
        pipe: Any = load_dense(parts, dtype=dtype, **backbone)
    elif arguments.dense or arguments.plan:
        pipe = load_dense(folder, dtype=dtype)
        if arguments.plan:
            TemporalExperts.from_pretrained(arguments.plan).apply(pipe)
    else:
        pipe = load_pipeline(folder, keep_ratio=arguments.keep, dtype=dtype)
    by_class = isinstance(pipe, (DiTPipeline, ClassConditionalPipeline))
    if by_class != (arguments.labels is not None):
        wanted = "--labels" if by_class else "--prompts"
        raise InputError(f"--run {arguments.run}: a {type(pipe).__name__} takes {wanted}")
    if by_class and arguments.resolution is not None:
        raise InputError(f"--resolution {arguments.resolution}: a {type(pipe).__name__} has one size: leave it out")
    if by_class and max(arguments.labels) >= null_class(pipe.transformer):
        raise InputError(f"--labels {max(arguments.labels)}: the model has the classes 0 to "
                         f"{null_class(pipe.transformer) - 1}")
    if by_class and pipe.vae is None and pipe.transformer.config.in_channels not in (1, 3):
        raise InputError(f"--run {arguments.run}: {folder} has no VAE, and {pipe.transformer.config.in_channels} "
                         "channels are no picture: add the folder vae/ to it, and name it in model_index.json")
    if arguments.latents and getattr(pipe, "vae", None) is None:
        raise InputError(f"--latents: {folder} has no VAE: its images are all there is: leave it out")
    if arguments.scheduler is not None:
        pipe.scheduler = make_sampler(arguments.scheduler, "--scheduler ", pipe.scheduler, tokens_of(parts, None))
    most = pipe.scheduler.config.num_train_timesteps
    if arguments.steps > most:
        raise InputError(f"--steps {arguments.steps}: the model has {most} timesteps: choose at most that")
    return pipe


def _original(arguments: argparse.Namespace, parts: Path) -> tuple[Path, str]:
    """The folder of the dense model's pipeline, and what names it."""
    from ..backbones.pretrained import local_folder, meta_backbone
    from ..common.load import load_config
    from ..training.setup.teacher import dense_folder

    if arguments.dense_pipeline is not None:
        field = "--dense-pipeline"
        folder = local_folder(str(arguments.dense_pipeline), field=field)
        if (folder / "experts.json").is_file():
            raise InputError(f"{field} {folder}: its weights were tuned under experts: name the original pipeline")
    else:
        field, file = "--original", _config_file(arguments.run)
        if file is None:
            raise InputError(f"--original: {arguments.run} has no config.yaml that says what it started from: use "
                             "--dense-pipeline")
        folder = dense_folder(load_config(file))
    ours, theirs = ({name: value for name, value in meta_backbone(place, field).config.items() if name[0] != "_"}
                    for place in (parts, folder))
    if ours != theirs:
        raise InputError(f"{field}: {folder} is of another architecture than {parts}: name the pipeline that the run "
                         "started from")
    return folder, field


def _config_file(run: Path) -> Path | None:
    """The run's config.yaml, also of its final/."""
    places = run.resolve(), run.resolve().parent
    return next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)


def _steps(arguments: argparse.Namespace) -> int:
    """Those of a plan, or those asked for."""
    from ..experts.artefact import TemporalExperts

    planned = arguments.plan and TemporalExperts.from_pretrained(arguments.plan).rung.steps
    if planned and arguments.steps not in (None, planned):
        raise InputError(f"--steps {arguments.steps}: --plan {arguments.plan} is of {planned}: leave --steps out")
    return planned or arguments.steps or 20


def _take_settings(arguments: argparse.Namespace) -> tuple[int, list[int] | None]:
    """A plan holds for its scheduler, guidance and size, and may be one of the dense model: take what was written.

    Returns: how many steps to ask the pipeline for, and which of them are taken; None: all.

    Raises:
        InputError: if others are.
    """
    file = arguments.plan / "plan.json" if arguments.plan else None
    if file is None:
        return arguments.steps, None
    if not file.is_file():
        raise InputError(f"--plan {arguments.plan}: has no plan.json, which says at which timesteps: plan again")
    try:
        written = json.loads(read_text(file, "--plan"))
        settings, chosen = written["settings"], written["chosen"]
        planned = {"scheduler": settings["asked_scheduler"], "guidance": settings["guidance"],
                   "resolution": settings["resolution"]}
        arguments.max_tokens, arguments.frames = settings["max_tokens"], settings["frames"]
        asked, taken = chosen["asked"], chosen["taken"]
        if chosen["dense"]:
            pipeline = settings["dense_pipeline"]
            arguments.original, arguments.dense_pipeline = pipeline is None, pipeline and Path(pipeline)
    except (LookupError, TypeError, ValueError):
        raise InputError(f"--plan {file}: is not as `alter plan` wrote it: plan again") from None
    for name, value in planned.items():
        if getattr(arguments, name) not in (None, value):
            raise InputError(f"--{name} {getattr(arguments, name)}: --plan {arguments.plan} was made with "
                             f"{'the default' if value is None else value}: leave it out, or plan again")
        setattr(arguments, name, value)
    return asked, taken


def _experts_digest(run: Path) -> str | None:
    """Of the experts.json of a run or a pipeline folder; None without one."""
    file = next((file for file in (run / "final/experts.json", run / "experts.json") if file.is_file()), None)
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be drawn by any model, or be written."""
    check_least(arguments, 1, "num", "steps", "batch", "resolution")
    check_least(arguments, 0, "labels", "seed")
    if arguments.seed >= 2**32:  # the images' own seeds have 64 bits
        raise InputError(f"--seed {arguments.seed}: choose one below {2**32}")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise InputError(f"--guidance {arguments.guidance}: choose a finite number")
    if arguments.keep is not None and not 0 < arguments.keep <= 1:
        raise InputError(f"--keep {arguments.keep}: choose a share in (0, 1]")
    for name in ("dense", "original", "dense_pipeline", "plan"):
        if arguments.keep is not None and getattr(arguments, name):
            raise InputError(f"--keep {arguments.keep}: has no meaning with --{name.replace('_', '-')}: leave one out")
    check_writable(arguments.out, "--out", folder=True)


def _check_manifest(file: Path, settings: dict[str, Any], images: list[dict[str, Any]]) -> None:
    """Refuse to add to images that were drawn otherwise."""
    if not file.is_file():
        return
    try:
        before = json.loads(read_text(file, "--out"))
        settings_before, images_before = dict(before["settings"]), list(before["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--out {file.parent}: its manifest.json is none of `alter sample` ({error}): choose another "
                         "folder") from None
    for name, value in settings.items():
        if settings_before.get(name) != value:
            raise InputError(f"--out {file.parent}: was drawn with {name}={settings_before.get(name)!r}, not "
                             f"{value!r}: choose another folder")
    common = min(len(images_before), len(images))
    if images_before[:common] != images[:common]:
        raise InputError(f"--out {file.parent}: was drawn with other prompts: choose another folder")
