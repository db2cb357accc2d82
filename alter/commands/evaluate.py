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
from ..common.files import check_writable, read_lines, read_text, write_text
from ..common.process import this_process
from ..evaluation.against import PAIRS, compare
from ..evaluation.image_sets import ImageSet, read_manifest
from ..evaluation.networks import (
    ALEXNET_FILE,
    HUB,
    INCEPTION_FILE,
    ClipVision,
    Dino,
    Inception,
    Lpips,
    Network,
    OpenClip,
)
from ..evaluation.pictures import AGAINST, save_pairs
from ..evaluation.preferences import PREFERENCES, preference_scores
from ..evaluation.suite import METRICS, Features, Reference, evaluate, table
from .options import check_least, user_path

_COMPARED = ("protocol", "images_protocol", "network", "reference", "images")  # what columns must have in common
USUAL = ["fid", "kid", "is", "prc"]
CACHE = Path.home() / ".cache" / "alter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    protocols = {name: metric.protocol for name, metric in METRICS.items()} | PREFERENCES
    known, paired = ("\n".join(f"  {name:13} {protocol}" for name, protocol in those.items())
                     for those in (protocols, PAIRS))
    parser.epilog = f"metrics:\n{known}\nmetrics with --against:\n{paired}"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=user_path, metavar="DIR", help="folder, or .npz with arr_0")
    source.add_argument("--run", type=user_path, metavar="DIR",
                        help="a demo's run, whose images are drawn first")
    source.add_argument("--compare", type=user_path, nargs="+", metavar="FILE",
                        help="show these metrics.json side by side")
    parser.add_argument("--keep", type=float, metavar="RATIO", help="with --run: of the experts' ladder, the rung of "
                        "this keep ratio or the next lower one (default: the one that experts.json names)")
    parser.add_argument("--reference", type=user_path, metavar="PATH",
                        help="folder, ADM reference batch (.npz) or saved statistics")
    parser.add_argument("--against", type=user_path, metavar="DIR",
                        help="compare pairs of one seed and prompt with these images of the dense model, that `alter "
                        "sample --original` drew; with --run: dense, which draws them")
    parser.add_argument("--metrics", nargs="+", choices=[*protocols, *PAIRS], metavar="NAME",
                        help="see below (default fid kid is prc; with --against psnr ssim drift, and drift_latents "
                        "where both have latents)")
    parser.add_argument("--prompts", type=user_path, metavar="FILE",
                        help="a line an image, in the order of the images' names (default: manifest.json of "
                        "`alter sample`, if it is there)")
    parser.add_argument("--out", type=user_path, metavar="FILE",
                        help="JSON to write (default: <name of the images>-metrics.json beside them, or -against.json)")
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
    parser.add_argument("--lpips-weights", type=user_path, default=HUB / ALEXNET_FILE, metavar="FILE")
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
    if arguments.keep is not None and not (arguments.run and 0 < arguments.keep <= 1):
        raise InputError(f"--keep {arguments.keep}: " + ("choose a share in (0, 1]" if arguments.run else
                         "chooses among the experts of a run: use --run, or `alter sample --keep` and --images"))
    others = [name for name in arguments.metrics or [] if (name in PAIRS) != (arguments.against is not None)]
    if others:
        raise InputError(f"--metrics {others[0]}: " + ("--against measures pairs: choose among " + ", ".join(PAIRS)
                         if arguments.against else "needs --against, the dense model's images"))
    if arguments.against and (arguments.reference or arguments.save_stats or arguments.prompts):
        raise InputError("--against: measures pairs alone: leave --reference, --save-stats and --prompts out")
    if arguments.save_stats is not None:
        check_writable(arguments.save_stats, "--save-stats")
        if arguments.save_stats.suffix != ".npz":
            raise InputError(f"--save-stats {arguments.save_stats}: name an .npz file")


def _evaluate(arguments: argparse.Namespace, state: PartialState) -> None:
    source, reference_source, out = arguments.images, arguments.reference, arguments.out
    prompts_file, against = arguments.prompts, arguments.against
    if arguments.run:
        from ..training.demo_images import draw_run

        if against is not None and str(against) != "dense":
            raise InputError(f"--against {against}: with --run, dense is all that can be drawn: use dense, or --images")
        run = arguments.run if (arguments.run / "config.yaml").is_file() else arguments.run / "latest"
        if not (run / "config.yaml").is_file():
            raise InputError(f"--run {arguments.run}: no run: it has no config.yaml")
        rung = "" if arguments.keep is None else f"-keep-{arguments.keep:g}"
        check_writable(run / f"evaluation{rung}", "--run", folder=True)
        drawn = draw_run(run, run / f"evaluation{rung}", state, against is not None, arguments.keep)
        source, reference_source = drawn / "images", reference_source or drawn / "real"
        against = against and drawn / "dense"
        prompts_file = prompts_file or drawn / "prompts.txt"
        out = out or run / f"{AGAINST if against else 'metrics'}{rung}.json"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images = ImageSet(source, arguments.resize)
    ending = f"{AGAINST if against else 'metrics'}.json"
    file = out or images.source.absolute().with_name(f"{images.source.absolute().name}-{ending}")
    check_writable(file, "--out")
    if arguments.num is not None and len(images) != arguments.num:
        raise InputError(f"--images {source}: holds {len(images)} images, not --num {arguments.num}")
    features = Features(lambda key: _network(key, arguments, state), arguments.cache, arguments.batch,
                        arguments.workers, state)
    reference = Reference(reference_source, features, arguments.resize) if reference_source and not against else None
    if against:
        check_writable(file.with_suffix(".png"), "--out")
        results, worst = compare(images, ImageSet(against, arguments.resize), arguments.metrics, features,
                                 lambda: Lpips(arguments.lpips_weights))
    else:
        results = evaluate(
            images, arguments.metrics or USUAL, features, reference, _prompts(prompts_file, images),
            arguments.bootstrap,
            lambda name, prompts: preference_scores(name, images, prompts, state.device, arguments.pickscore_path))
    if not state.is_main_process:
        return
    for line in dict.fromkeys(features.warnings):
        print(f"warning: {line}", file=sys.stderr)
    write_text(file, json.dumps(results, indent=2) + "\n")
    print(table({images.source.name: results}))
    print(f"written to {file}")
    if against:
        save_pairs(worst, file.with_suffix(".png"))
        print(f"the pairs that differ most, dense above: {file.with_suffix('.png')}")
    if arguments.save_stats and reference is not None:
        reference.save(arguments.save_stats, [METRICS[name] for name in arguments.metrics or USUAL if name in METRICS])


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
    found = read_manifest(images.source, "give --prompts")
    if found is None or not set(images.names) <= found[1].keys():
        return None
    return [str(found[1][name]["condition"]) for name in images.names]


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
        isinstance(number, (int, float)) or number == "inf" for number in (*numbers, *interval))
