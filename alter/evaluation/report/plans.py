"""The front of a planner: displacement of samples against the MACs of all steps, as rows, a table and a figure."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ...experts.plan import Plan, Planner
from ..pairs import drifts
from .drawing import BLUE, INK, ORANGE, WIDTH, name_ends, styled

_SHARES = (0.25, 0.35, 0.5, 0.65, 0.8, 1.0)  # of the MACs of the most steps, dense
_SERIES = {"dense": ("dense, fewer steps", INK), "chosen": ("dense, chosen steps", "#7F7F7F"),
           "one mask": ("one mask", "#009E73"), "experts": ("experts, all steps", BLUE), "planned": ("planned", ORANGE),
           "cached": ("cached", "#CC79A7")}


def front_rows(planner: Planner, cached: bool = False) -> list[dict[str, Any]]:
    """Points of the dense model at fewer steps, as the sampler spaces them and at chosen timesteps; of the best single
    mask, of rungs of the ladder at the most steps, and of plans, `cached` ones too if they are asked for. Each has its
    steps, the MACs of an image, their share, and the displacement as predicted and as measured.
    """
    total = planner.experts.macs_total
    whole, least = planner.most * total, 2 * float(planner.macs_M.min())
    budgets = [share * whole for share in _SHARES if share * whole >= least]
    plans = [("one mask", planner.one_mask(budget)) for budget in budgets]
    rungs = [min(planner.experts.ladder, key=lambda rung: abs(rung.keep_ratio_target - share)) for share in _SHARES]
    plans += [("experts", planner.fixed(planner.most, rung)) for rung in dict.fromkeys(rungs)]
    plans += [("planned", planner.plan(macs=budget)) for budget in budgets]
    if cached:
        fewest = planner.macs_M[planner.full] + planner.macs_M.min()
        plans += [("cached", planner.cached(budget)) for budget in budgets if budget >= fewest]
    rows: list[dict[str, Any]] = [
        {"series": series, "steps": steps, "macs": steps * total, "share": steps / planner.most, "predicted": moved,
         "measured": moved}
        for series, drift in (("dense", planner.drift), ("chosen", planner.chosen_drift))
        for steps, moved in drift.items()]
    for series, plan in tqdm(plans, unit="plan", desc="predictions checked", dynamic_ncols=True):
        rows.append({"series": series, **plan_row(planner, plan)})
    return rows


def plan_row(planner: Planner, plan: Plan) -> dict[str, Any]:
    """Numbers of a plan, with how far it moves samples as predicted and as measured: mean squared, and as a `drift`
    (evaluation/pairs.py) from the many dense steps that the planner compares with."""
    measured, reference = planner.check(plan), planner.reference
    spread = float(drifts(reference, reference)[1].mean()) / reference[0].numel()
    return {"steps": plan.steps, "macs": plan.macs, "share": plan.macs / planner.most / planner.experts.macs_total,
            "predicted": plan.error, "measured": measured, "predicted_drift": plan.error / spread,
            "drift": measured / spread}


def front_table(rows: list[dict[str, Any]]) -> str:
    """For the terminal, a line per row."""
    lines = [("", "steps", "GMACs an image", "share", "predicted", "measured")]
    lines += [(_SERIES[row["series"]][0], str(row["steps"]), f"{row['macs'] / 1e9:.4g}", f"{row['share']:.3f}",
               f"{row['predicted']:.3g}", f"{row['measured']:.3g}") for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


@styled
def plan_figure(rows: list[dict[str, Any]]) -> Figure:
    """Displacement over the share of the MACs of the most steps, dense: measured as lines, which are named at their
    ends, predicted dotted; the dense model with fewer steps is the line to beat."""
    figure = Figure((1.4 * WIDTH, 3.2), layout="constrained")
    axis, ends = figure.subplots(), list[tuple[float, float, str, str]]()
    for series, (title, color) in _SERIES.items():
        points = sorted((row["share"], row["measured"], row["predicted"]) for row in rows if row["series"] == series)
        if not points:
            continue
        share, measured, predicted = np.array(points).T
        axis.plot(share, measured, color=color, linewidth=2 if series == "dense" else 1.2, marker=".", markersize=5)
        if series not in ("dense", "chosen", "cached"):  # of which nothing is predicted
            axis.plot(share, predicted, color=color, linewidth=0.8, linestyle=":")
        ends.append((share[-1], measured[-1], title, color))
    axis.set(xlabel="MACs of all steps (most steps, dense: 1)", ylabel="mean squared displacement of latents",
             yscale="log", xlim=(0, 1.45))
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.grid()
    name_ends(axis, ends)
    return figure


def plot_plans(rows: list[dict[str, Any]], path: Path) -> None:
    """`plan_figure` as a picture."""
    plan_figure(rows).savefig(path, facecolor="white", dpi=160)
