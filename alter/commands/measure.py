"""What is each layer worth at each timestep, and have experts anything to gain?

`--config CONFIG --out DIR [key.path=value ...]` skips each layer alone, at timesteps of every bin, and writes
sensitivity.json and sensitivity.png; a few are also skipped while sampling, to see how far an error moves samples.
`--apply --pipeline FOLDER --prompts FILE --out DIR` writes an experts.json for every budget without training and
without data: the pipeline's own images are measured. It prints what they lose, beside the dense model with fewer steps.
"""

import argparse
import dataclasses
import sys
from typing import Any

from ..common.config import Config
from ..common.errors import InputError
from ..common.files import check_writable
from ..common.load import load_config
from .options import add_config, announce_loading, check_keep, check_least, read_prompts, user_path

_KEEP = (0.7, 0.85, 0.55)
_BINS, _IMAGES = 10, 32
_APPLIED = ("pipeline", "prompts", "labels", "images", "resolution", "seed", "dtype", "keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=False)
    parser.add_argument("--out", type=user_path, metavar="DIR", required=True)
    parser.add_argument("--bins", type=int, help=f"intervals of timesteps (default {_BINS})")
    parser.add_argument("--samples", type=int, help="samples of each bin (default 32)")
    parser.add_argument("--trials", type=int, help="layers skipped while sampling (default 4)")
    parser.add_argument("--batch", type=int, default=16, help="samples of one forward (default 16)")
    parser.add_argument("--apply", action="store_true", help="write experts.json; --images in place of --samples")
    parser.add_argument("--pipeline", metavar="FOLDER", help="or hub id")
    parser.add_argument("--prompts", type=user_path, metavar="FILE", help="a prompt a line")
    parser.add_argument("--labels", type=_labels, metavar="CLASSES", help="such as 3,5 or 0-9")
    parser.add_argument("--images", type=int, help="drawn; prompts repeat (default 32)")
    parser.add_argument("--resolution", type=int, help="in pixels (default: the backbone's)")
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights")
    parser.add_argument("--keep", type=float, nargs="+", metavar="RATIO",
                        help="budgets to draw at (default 0.7 0.85 0.55)")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "bins", "samples", "trials", "batch")
    _check(arguments)
    check_writable(arguments.out, "--out", folder=True)
    if arguments.apply:
        _apply(arguments)
        return
    config = load_config(arguments.config, arguments.overrides)
    announce_loading()
    from ..backbones.pretrained import DTYPES
    from ..evaluation.report.figures import plot_sensitivity
    from ..evaluation.report.records import SENSITIVITY, write_sensitivity
    from ..evaluation.report.words import as_text, verdict
    from ..training.measure import measure_sensitivity
    from ..training.setup.parts import build

    loss = dataclasses.replace(config.loss, output_kd=0.0, feature_kd=0.0, denoise=1.0)  # no teacher is needed
    config = dataclasses.replace(config, loss=loss)
    parts = build(config, device=_device(), frozen=DTYPES[config.backbone.precision])
    table = measure_sensitivity(config, parts, arguments.bins or _BINS, arguments.samples or _IMAGES, arguments.batch,
                                arguments.trials or 4)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_sensitivity(table, out / SENSITIVITY)
    plot_sensitivity(table, out / "sensitivity.png")
    print(as_text(table))
    print(verdict(table, parts.budget, config.experts.count))
    print(f"written to {out / SENSITIVITY} and {out / 'sensitivity.png'}")


def _apply(arguments: argparse.Namespace) -> None:
    given, count = None, arguments.images or _IMAGES
    if arguments.prompts or arguments.labels:
        named = arguments.labels or read_prompts(arguments.prompts)
        given = [named[i % len(named)] for i in range(count)]
    announce_loading()
    from ..backbones.pretrained import DTYPES
    from ..data.drawn import Drawn
    from ..training.setup.parts import build
    from ..training.setup.teacher import dense_folder
    from ..training.untrained import as_text, check, conditions_of, find_untrained, forwards, verdict

    if arguments.pipeline is None:
        config, source = load_config(arguments.config, arguments.overrides), None
    else:
        assert given is not None
        config, source = _config_of(arguments, given), Drawn(given)
    dense_folder(config)
    parts = build(config, device=_device(), source=source, frozen=DTYPES[arguments.dtype or config.backbone.precision])
    keeps = check(config, parts, list(dict.fromkeys(arguments.keep or _KEEP)))
    conditions = given or conditions_of(parts, count)
    cost = forwards(config, parts, len(conditions), keeps)
    print(f"about {sum(cost.values()):,} forwards of one sample ({parts.cost.macs_total / 1e9:.4g} GMACs each): "
          + ", ".join(f"{count:,} to {what}" for what, count in cost.items()), file=sys.stderr, flush=True)
    experts, lost = find_untrained(config, parts, conditions, keeps, arguments.batch)
    experts.save_pretrained(arguments.out)
    print(experts.table())
    print(f"\n{len(conditions)} images of {config.evaluate.sampling_steps} steps, guidance "
          f"{config.evaluate.guidance_scale:g}, against the dense model's of the same seeds (0: the same images; 1: as "
          "far as another seed's; in brackets 95%):")
    print(as_text(lost))
    print(verdict(lost))
    print(f'written to {arguments.out}: TemporalExperts.from_pretrained("{arguments.out}").apply(pipe, '
          f"keep_ratio={experts.keep_ratio_target:g})")


def _config_of(arguments: argparse.Namespace, conditions: list[Any]) -> Config:
    """What a run on the images of a pipeline would be configured as.

    Raises:
        InputError: if the pipeline takes other conditions, or its size is not known.
    """
    from ..backbones.dit import null_class
    from ..backbones.pretrained import condition_of, local_folder, meta_backbone
    from ..backbones.sizes import usual_resolution
    from ..experts.load import usual_guidance

    folder = local_folder(arguments.pipeline, field="--pipeline")
    by_class = condition_of(folder) == "class"
    if by_class != (arguments.labels is not None):
        raise InputError(f"--pipeline {arguments.pipeline}: its backbone is conditioned on "
                         f"{'classes: name --labels' if by_class else 'text: name --prompts'}")
    if by_class and max(conditions) >= null_class(meta_backbone(folder)):
        raise InputError(f"--labels {max(conditions)}: the model has the classes 0 to "
                         f"{null_class(meta_backbone(folder)) - 1}")
    resolution = arguments.resolution or usual_resolution(folder)
    if resolution is None:
        raise InputError(f"--pipeline {arguments.pipeline}: does not say for which size it was made: name "
                         "--resolution")
    precision = "no" if arguments.dtype in (None, "fp32") else arguments.dtype
    values: dict[str, Any] = {
        "backbone": {"pretrained": arguments.pipeline}, "seed": arguments.seed or 0,
        "data": {"path": "images that the pipeline draws", "resolution": resolution, "holdout": 0},
        "search": {"method": "elastic", "samples": len(conditions), "bins": arguments.bins or _BINS},
        "budget": {"keep_ratio": 1.0}, "evaluate": {"guidance_scale": usual_guidance(folder)},
        "train": {"mixed_precision": precision}}
    # Measured in as many steps as are drawn, of a flow too.
    values["budget"]["sampling_steps"] = load_config(values, arguments.overrides).evaluate.sampling_steps
    return load_config(values, arguments.overrides)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, or have no meaning for any model."""
    check_least(arguments, 2, "images")
    check_least(arguments, 1, "resolution")
    check_least(arguments, 0, "seed")
    if arguments.keep is not None:
        check_keep(arguments)
        if max(arguments.keep) == 1:
            raise InputError("--keep 1: is the dense model: choose less")
    if (arguments.config is None) == (arguments.pipeline is None):
        raise InputError("measure: name --config or, with --apply, --pipeline: one of them")
    if arguments.apply and arguments.pipeline and not (arguments.prompts or arguments.labels):
        raise InputError("--apply: name --prompts or --labels, of which the pipeline draws images")
    if arguments.prompts and arguments.labels:
        raise InputError("--prompts and --labels: name one of them")
    faults: list[tuple[tuple[str, ...], str]] = [(_APPLIED, "without --apply: add it, or leave them out")]
    if arguments.apply:
        faults = [(("samples", "trials"), "with --apply: name --images")]
    if arguments.config:
        own = ("resolution", "seed", *(("bins",) if arguments.apply else ()))
        faults.insert(0, (own, "on a configuration: set its own keys"))
    for unused, why in faults:
        if given := [f"--{name}" for name in unused if getattr(arguments, name) is not None]:
            raise InputError(f"{' '.join(given)}: no effect {why}")


def _labels(text: str) -> list[int]:
    """The type of `--labels`: classes, and ranges of them from the first to the last."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first + last).isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r}: name classes such as 3,5 or 0-9")
        found += range(int(first), int(last or first) + 1)
    return found


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
