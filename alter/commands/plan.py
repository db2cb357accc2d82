"""Steps and depth planned together: `alter plan --run DIR --prompts FILE --out OUT`.

Draws images to measure the sampler, prints and draws the front (dense at fewer steps, one mask, the experts' rungs,
plans) and writes OUT/plan.json, OUT/plan.png and the chosen plan as OUT/experts.json: `alter sample --plan OUT`.
"""

import argparse
import json
import math

from ..common.errors import InputError
from ..common.files import check_writable, write_text
from .options import announce_loading, check_least, read_prompts, user_path
from .sample import DTYPES, add_size, drawing, load_asked, take_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=user_path, required=True, help="run directory, or the pipeline folder itself")
    parser.add_argument("--experts", type=user_path, metavar="FOLDER", help="of experts.json (default: --run's)")
    conditions = parser.add_mutually_exclusive_group(required=True)
    conditions.add_argument("--prompts", type=user_path, metavar="FILE", help="text file, a prompt a line")
    conditions.add_argument("--labels", type=int, nargs="+", metavar="CLASS")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--share", type=float, help="of the MACs of the most dense steps (default 0.5)")
    budget.add_argument("--macs", type=float, help="of the backbone for one image, one forward a step")
    budget.add_argument("--seconds", type=float, help="of the backbone for one image, or as experts.json has measured")
    budget.add_argument("--quality", type=int, metavar="STEPS", help="the cheapest plan that is predicted to be as "
                        "good as so many steps at full depth")
    dense = parser.add_mutually_exclusive_group()
    dense.add_argument("--original", action="store_true", help="with the run's dense model, as its config.yaml names "
                       "it, as a choice (default: these weights at full depth)")
    dense.add_argument("--dense-pipeline", type=user_path, metavar="DIR",
                       help="--original, with the backbone of this pipeline")
    parser.add_argument("--most", type=int, help="steps at most (default: as experts.json was measured)")
    parser.add_argument("--cached", action="store_true", help="let skipped layers add what they added when last run")
    parser.add_argument("--own-steps", action="store_true", help="visit the scheduler's own timesteps, not chosen ones")
    parser.add_argument("--images", type=int, default=24, help="drawn each time; prompts or labels repeat (default 24)")
    parser.add_argument("--scheduler", metavar="NAME", help="a diffusers scheduler (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the pipeline's)")
    add_size(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="images of one call (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=user_path, metavar="DIR", required=True)


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "batch", "resolution")
    check_least(arguments, 2, "images", "most", "quality")
    check_least(arguments, 0, "labels", "seed")
    for name in ("share", "macs", "seconds"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} {value}: choose a number above 0")
    if arguments.cached and (arguments.seconds or arguments.quality):
        raise InputError("--cached: is planned for MACs alone: give --share or --macs")
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise InputError(f"--guidance {arguments.guidance}: choose a finite number")
    check_writable(arguments.out, "--out", folder=True)
    conditions = arguments.labels or read_prompts(arguments.prompts)
    announce_loading()
    import torch

    from ..evaluation.report.plans import front_rows, front_table, plan_row, plot_plans
    from ..experts.artefact import TemporalExperts
    from ..experts.plan import Planner

    final = arguments.run / "final"
    experts = TemporalExperts.from_pretrained(arguments.experts or (final if final.is_dir() else arguments.run))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = {**vars(arguments), "keep": None, "plan": None, "latents": False, "steps": 2}
    take_size(arguments)
    pipe = load_asked(argparse.Namespace(**{**asked, "dense": True, "original": False, "dense_pipeline": None}), True)
    dense = load_asked(argparse.Namespace(**asked, dense=False), True) if (
        arguments.original or arguments.dense_pipeline) else None
    for each in (pipe, dense):
        if each is not None:
            each.to(device)
            each.set_progress_bar_config(disable=True)
    name = "prompt" if arguments.labels is None else "class_labels"
    call = {name: [conditions[i % len(conditions)] for i in range(arguments.images)]}
    call |= drawing(arguments, pipe, arguments.images)
    planner = Planner(experts, pipe, call, arguments.most, arguments.seed, arguments.batch, dense,
                      arguments.own_steps)
    if dense is None and planner.fixed(2, 1).error > planner.fixed(2, 1).discretisation:
        print("at full depth these weights are not the dense model that errors were measured against: predictions hold "
              "that distance too; --original makes the dense model a choice")
    macs = arguments.macs
    if all(value is None for value in (macs, arguments.seconds, arguments.quality)):
        macs = (0.5 if arguments.share is None else arguments.share) * planner.most * experts.macs_total
    plan = planner.cached(macs) if arguments.cached else planner.plan(macs, arguments.seconds, arguments.quality)
    rows = front_rows(planner, arguments.cached)
    masks = plan.rung.expert_T[planner.visited[plan.steps]]
    chosen = {**plan_row(planner, plan), "seconds": plan.seconds, "discretisation": plan.discretisation,
              "dense": plan.dense, "cached": plan.rung.cached, "asked": plan.asked, "taken": plan.chosen,
              "timesteps": planner.visited[plan.steps].tolist(), "masks": masks.tolist(),
              "layers": experts.mask_EL[masks].sum(axis=1).tolist()}
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    experts.only(plan.rung).save_pretrained(out)
    plot_plans(rows, out / "plan.png")
    settings = {"run": str(arguments.run.resolve()), "scheduler": type(pipe.scheduler).__name__,
                "asked_scheduler": arguments.scheduler, "most": planner.most,
                "guidance": arguments.guidance, "resolution": arguments.resolution,
                "max_tokens": arguments.max_tokens, "frames": arguments.frames, "images": arguments.images,
                "seed": arguments.seed,
                "reference": "full depth" if dense is None else "original",
                "dense_pipeline": arguments.dense_pipeline and str(arguments.dense_pipeline.resolve())}
    write_text(out / "plan.json", json.dumps({"settings": settings, "chosen": chosen, "front": rows}, indent=1) + "\n")
    print(front_table(rows))
    layers = f"of {' '.join(map(str, chosen['layers']))} of {len(experts.sites)} layers"
    print(f"chosen: {plan.steps} steps {'of the dense model' if plan.dense else layers}, "
          f"{chosen['share']:.1%} of the MACs of {planner.most} steps at full depth; displacement {plan.error:.3g} "
          f"predicted, {chosen['measured']:.3g} measured; as drift of latents {chosen['predicted_drift']:.3g} and "
          f"{chosen['drift']:.3g}")
    print(f"written to {out}: plan.json, plan.png, and experts.json for `alter sample --plan {out}`")
