"""Measure images: `alter evaluate --images DIR --reference DIR --metrics fid kid --out metrics.json`.

With `accelerate launch -m alter evaluate ...` features are extracted on every GPU. They are kept in --cache, so that a
second call with the same images, or an interrupted one, does not compute them again. Nothing is downloaded.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..common.errors import InputError
from ..common.files import check_writable, read_lines, read_text
from ..common.process import this_process
from ..evaluation.image_sets import ImageSet
from ..evaluation.networks import HUB, INCEPTION_FILE, ClipVision, Dino, Inception, Network, OpenClip
from ..evaluation.preferences import PREFERENCES, preference_scores
from ..evaluation.suite import METRICS, Features, Reference, evaluate, table
from .options import check_least, user_path

_COMPARED = ("protocol", "images_protocol", "network", "reference", "images")  # what columns must have in common
CACHE = Path.home() / ".cache" / "alter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    protocols = {name: metric.protocol for name, metric in METRICS.items()} | PREFERENCES
    known = "\n".join(f"  {name:12} {protocol}" for name, protocol in protocols.items())
    parser.epilog = f"metrics:\n{known}"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=user_path, metavar="DIR", help="folder, or .npz with arr_0")
    source.add_argument("--run", type=user_path, metavar="DIR",
                        help="a demo's run, whose images are drawn first")
    source.add_argument("--compare", type=user_path, nargs="+", metavar="FILE",
                        help="show these metrics.json side by side")
    parser.add_argument("--reference", type=user_path, metavar="PATH",
                        help="folder, ADM reference batch (.npz) or saved statistics")
    parser.add_argument("--metrics", nargs="+", choices=protocols, default=["fid", "kid", "is", "prc"],
                        metavar="NAME", help="see below (default fid kid is prc)")
    parser.add_argument("--prompts", type=user_path, metavar="FILE",
                        help="a line an image, in the order of the images' names (default: manifest.json of "
                        "`alter sample`, if it is there)")
    parser.add_argument("--out", type=user_path, metavar="FILE",
                        help="JSON to write (default: <name of the images>-metrics.json beside them)")
    parser.add_argument("--save-stats", type=user_path, metavar="FILE",
                        help="write the reference's statistics to this .npz")
    parser.add_argument("--num", type=int, help="refuse another number of images")
    parser.add_argument("--resize", type=int, metavar="SIDE", help="first make all images squares of this side "
                        "(bicubic, antialiased), as papers do that generate at 768 and measure at 256")
    parser.add_argument("--bootstrap", type=int, default=20, metavar="N", help="resamples for the intervals; 0: none")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=user_path, default=CACHE, metavar="DIR", help=f"default {CACHE}")
    parser.add_argument("--feature-network", choices=("standard", "demo"), default="standard",
                        help="demo: a classifier of digits, trained here, in Inception's place; for dry runs")
    parser.add_argument("--inception-weights", type=user_path, default=HUB / INCEPTION_FILE, metavar="FILE")
    parser.add_argument("--dinov2-weights", type=user_path, metavar="FILE",
                        default=HUB / "vit_large_patch14_dinov2.lvd142m.safetensors")
    parser.add_argument("--dinov2-model", default="vit_large_patch14_dinov2", metavar="NAME", help="timm's name")
    parser.add_argument("--clip-model", default="ViT-g-14", metavar="NAME",
                        help="open_clip's name: ViT-g-14 (laion2b, as APTP and ALTER) or ViT-L-14-quickgelu (openai)")
    parser.add_argument("--clip-model-path", type=user_path, metavar="FILE",
                        default=HUB / "open_clip_model.safetensors")
    parser.add_argument("--cmmd-model-path", type=user_path, default=HUB / "clip-vit-large-patch14-336", metavar="DIR")
    parser.add_argument("--pickscore-path", type=user_path, default=HUB / "PickScore_v1", metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    state = this_process()
    try:
        if arguments.compare:
            results = {str(file): _read_results(file) for file in arguments.compare}
            print(table(results))
            for line in _differences(results):
                print(f"warning: {line}", file=sys.stderr)
        else:
            _check(arguments)
            _evaluate(arguments, state)
    except InputError:
        if state.is_main_process:
            raise
        return 2
    finally:
        state.destroy_process_group()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what does not depend on the images."""
    check_least(arguments, 1, "num", "resize", "batch")
    check_least(arguments, 0, "bootstrap", "workers")
    check_writable(arguments.cache, "--cache", folder=True)
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    if arguments.save_stats is not None:
        check_writable(arguments.save_stats, "--save-stats")
        if arguments.save_stats.suffix != ".npz":
            raise InputError(f"--save-stats {arguments.save_stats}: name an .npz file")


def _evaluate(arguments: argparse.Namespace, state: PartialState) -> None:
    source, reference_source, out = arguments.images, arguments.reference, arguments.out
    prompts_file = arguments.prompts
    if arguments.run:
        from ..training.demo_images import draw_run

        run = arguments.run if (arguments.run / "config.yaml").is_file() else arguments.run / "latest"
        if not (run / "config.yaml").is_file():
            raise InputError(f"--run {arguments.run}: no run: it has no config.yaml")
        check_writable(run / "evaluation", "--run", folder=True)
        drawn = draw_run(run, run / "evaluation", state)
        source, reference_source = drawn / "images", reference_source or drawn / "real"
        prompts_file = prompts_file or drawn / "prompts.txt"
        out = out or run / "metrics.json"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images = ImageSet(source, arguments.resize)
    file = out or images.source.absolute().with_name(f"{images.source.absolute().name}-metrics.json")
    check_writable(file, "--out")
    if arguments.num is not None and len(images) != arguments.num:
        raise InputError(f"--images {source}: holds {len(images)} images, not --num {arguments.num}")
    features = Features(lambda key: _network(key, arguments, state), arguments.cache, arguments.batch,
                        arguments.workers, state)
    reference = Reference(reference_source, features, arguments.resize) if reference_source else None
    results = evaluate(
        images, arguments.metrics, features, reference, _prompts(prompts_file, images), arguments.bootstrap,
        lambda name, prompts: preference_scores(name, images, prompts, state.device, arguments.pickscore_path))
    if not state.is_main_process:
        return
    for line in dict.fromkeys(features.warnings):
        print(f"warning: {line}", file=sys.stderr)
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    print(table({images.source.name: results}))
    print(f"written to {file}")
    if arguments.save_stats and reference is not None:
        reference.save(arguments.save_stats, [METRICS[name] for name in arguments.metrics if name in METRICS])


def _network(key: str, arguments: argparse.Namespace, state: PartialState) -> Network:
    if arguments.feature_network == "demo":
        if key not in ("clean", "legacy"):
            raise InputError("--feature-network demo: stands in for Inception alone: choose among fid, fid_legacy, "
                             "kid, is, prc")
        from ..training.demo_images import demo_network

        return demo_network(arguments.cache, state)
    if key in ("clean", "legacy"):
        return Inception(arguments.inception_weights, key)
    if key == "dinov2":
        return Dino(arguments.dinov2_weights, arguments.dinov2_model)
    if key == "clip":
        return OpenClip(arguments.clip_model, arguments.clip_model_path)
    return ClipVision(arguments.cmmd_model_path)


def _prompts(file: Path | None, images: ImageSet) -> list[str] | None:
    if file is not None:
        return read_lines(file, "--prompts")
    manifest = images.source / "manifest.json"
    if not manifest.is_file():
        return None
    try:
        content = json.loads(read_text(manifest, "--images"))
        conditions = {image["file"]: image["condition"] for image in content["images"]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{manifest}: not as `alter sample` writes it ({error}): give --prompts") from None
    return [str(conditions[name]) for name in images.names] if set(images.names) <= conditions.keys() else None


def _differences(results: dict[str, dict]) -> list[str]:
    """Metrics whose columns were measured in different ways."""
    lines = []
    for name in dict.fromkeys(name for result in results.values() for name in result):
        found = [result[name] for result in results.values() if name in result]
        for key in _COMPARED:
            if any(result[key] != found[0][key] for result in found):
                lines.append(f"{name}: the columns differ in {key}: "
                             + ", ".join(dict.fromkeys(str(result[key]) for result in found)))
    return lines


def _read_results(file: Path) -> dict:
    file = file / "metrics.json" if file.is_dir() else file
    try:
        results = json.loads(read_text(file, "--compare"))
    except json.JSONDecodeError as error:
        raise InputError(f"--compare {file}: no JSON ({error}): name what `alter evaluate` wrote") from None
    if not isinstance(results, dict) or not all(_is_result(name, result) for name, result in results.items()):
        raise InputError(f"--compare {file}: holds no metrics: name what `alter evaluate` wrote")
    return results


def _is_result(name: str, result: Any) -> bool:
    """Whether `table` and `_differences` find in it what they need."""
    if not isinstance(result, dict) or not result.keys() >= {*_COMPARED, "value"}:
        return False
    numbers = [result["value"], *(result.get(key) for key in ("precision", "recall") if name == "prc")]
    interval = result.get("ci95", [0, 0])
    return isinstance(interval, list) and len(interval) == 2 and all(
        isinstance(number, (int, float)) for number in (*numbers, *interval))
