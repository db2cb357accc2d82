"""Numbers as text with their units, what a run achieved as a table of a few groups, and what a table of layers says."""

from collections.abc import Callable
from itertools import pairwise
from math import floor, isfinite, log10
from typing import Any

from matplotlib.ticker import EngFormatter

from ...experts.artefact import TemporalExperts
from ...method.budget import Budget
from ...method.sensitivity import Sensitivity

Groups = dict[str, dict[str, str]]  # rows by their name, by the title of their group
_SI = EngFormatter(sep=" ")
_QUALITY = {"dense_50": "dense, 50 steps", "dense": "dense, {} steps", "experts": "experts, {} steps"}
_NAMED = 8  # unused experts; more are counted
_COUNTS = ("skipped_samples", "truncated_prompts", "skipped_updates")  # shown where they are not 0
_KNOWN = {"keep_ratio_target", "budget_over", "keep_ratio", "prunable_share", "macs_dense", "macs_experts",
          "time_ratio", "time_measured_on", "experts_count", "experts_used", "output_error", "denoise_error",
          "sampling_steps", "guidance_scale", "free_guidance", "samples", "seconds_total", *_COUNTS,
          *(f"{kind}_{model}" for kind in ("fd", "accuracy") for model in _QUALITY)}


def number(value: Any) -> str:
    """Three significant digits of a float; all digits of an integer; anything else as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float) or not isfinite(value):
        return str(value)
    if value and abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - floor(log10(abs(value))))}f}" if value else "0"


def percent(value: Any) -> str:
    """A share, in percent with one decimal."""
    return f"{value:.1%}".replace(".0%", "%") if isinstance(value, (int, float)) else str(value)


def macs(value: Any) -> str:
    """Multiply-accumulate operations with three significant digits: 402 GMACs, 12.5 MMACs."""
    if not isinstance(value, (int, float)):
        return str(value)
    digits, _, prefix = _SI.format_eng(float(f"{value:.3g}")).partition(" ")
    return f"{number(float(digits)) if value else 0} {prefix}MACs"


def duration(seconds: Any) -> str:
    """Seconds below two minutes, else minutes or hours and minutes."""
    if not isinstance(seconds, (int, float)):
        return str(seconds)
    if seconds < 120:
        return f"{number(float(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def quality(summary: dict[str, Any], model: str) -> str:
    """Fréchet distance and accuracy of "dense", "dense_50" or "experts"; empty where none was measured."""
    parts = [f"{name} {form(summary[f'{key}_{model}'])}"
             for key, name, form in (("fd", "Fréchet distance", number), ("accuracy", "accuracy", percent))
             if summary.get(f"{key}_{model}") is not None]
    return ", ".join(parts)


def row_label(model: str, steps: int, total_macs: float, summary: dict[str, Any]) -> str:
    """The name of a row of samples, with its MACs per image and its quality: a line each."""
    return "\n".join([f"{model.removesuffix('_50')}, {steps} steps", f"{macs(total_macs)} per image",
                      *filter(None, quality(summary, model).split(", "))])


def achieved(experts: TemporalExperts) -> dict[str, Any]:
    """What summary.json says of the experts themselves."""
    found: dict[str, Any] = {
        "keep_ratio_target": experts.keep_ratio_target, "budget_over": experts.budget_over,
        "keep_ratio": experts.keep_ratio, "macs_dense": experts.macs_total, "macs_experts": round(experts.macs_mean),
        "experts_count": len(experts.mask_EL), "experts_used": len(experts.used),
        "experts_unused": _unused_experts(experts),
    }
    if experts.latency is not None:
        found |= {"time_ratio": experts.time_ratio, "time_measured_on": experts.latency.place}
    return found


def summary_groups(summary: dict[str, Any]) -> Groups:
    """The summary's numbers in groups, without what was not measured and without lists, which are in summary.json."""
    found = {key: value for key, value in summary.items() if value is not None}

    def rows(*entries: tuple[str, str, Callable[[Any], str]]) -> dict[str, str]:
        """Of key, name and form: those whose key was found."""
        return {name: form(found[key]) for key, name, form in entries if key in found}

    steps, dense = number(found.get("sampling_steps")), macs(found.get("macs_dense"))
    budget = ("time" if "time_ratio" in found else "MACs") + (
        " of the prunable layers" if found.get("budget_over") == "prunable" else "")
    unused = found.get("experts_unused", [])
    others = found.get("experts_count", 0) - found.get("experts_used", 0) - len(unused)
    groups = {
        "Budget": rows(
            ("keep_ratio_target", "target", lambda share: f"{percent(share)} of the dense model's {budget}"),
            ("keep_ratio", "MACs kept", lambda share: f"{percent(share)} of the dense model's"),
            ("time_ratio", "time kept", lambda share: f"{percent(share)} of the dense model's, measured on "
                                                      f"{found.get('time_measured_on')}"),
            ("macs_experts", "MACs per step", lambda value: f"{macs(value)}; dense: {dense}"),
            ("prunable_share", "MACs of the prunable layers", lambda share: f"{percent(share)} of the dense model's")),
        "Experts": rows(("experts_count", "number", lambda count: (
            f"{found['experts_used'] if others else count}, {_beside(others, unused)}"))),
        "Quality": rows(
            ("samples", "samples", lambda count: f"{number(count)}, guidance scale {found.get('guidance_scale')}"),
            *((f"fd_{model}", name.format(steps), lambda _, model=model: quality(found, model))
              for model, name in _QUALITY.items())),
        "Mean squared error on held-out data": rows(
            ("output_error", "against the dense model's output", number), ("denoise_error", "of denoising", number)),
        "Run": rows(("seconds_total", "duration", duration),
                    *((key, key.replace("_", " "), number) for key in _COUNTS if found.get(key))),
        "Other": rows(*((key, key.replace("_", " "), number) for key, value in found.items()
                        if key not in _KNOWN and not isinstance(value, (list, dict)))),
    }
    return {title: group for title, group in groups.items() if group}


def used(experts: TemporalExperts) -> str:
    """How many experts other rungs use, and which ones none does, in words."""
    return _beside(len(experts.used_by_any) - len(experts.used), _unused_experts(experts))


def _unused_experts(experts: TemporalExperts) -> list[int]:
    return sorted({*range(len(experts.mask_EL))} - {*experts.used_by_any})


def _beside(others: int, unused: list[int]) -> str:
    more = f"{others} more in other rungs"
    if not unused:
        return more if others else "all used"
    if others or len(unused) > _NAMED:
        return ", ".join([more] * (others > 0) + [f"{len(unused)} unused"])
    return f"unused: expert{'s' * (len(unused) > 1)} {', '.join(map(str, unused))}"


def summary_table(summary: dict[str, Any]) -> str:
    """The summary in groups, for a terminal."""
    groups = summary_groups(summary)
    width = max((len(name) for rows in groups.values() for name in rows), default=0)
    return "\n".join("\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])
                     for title, rows in groups.items())


def verdict(table: Sensitivity, budget: Budget, experts: int) -> str:
    """What the table says about experts on this model, in plain words."""
    middle = [(low + high - 1) / 2 for low, high in pairwise(table.edges)]
    depth_B = table.relative_LB.mean(axis=0)
    deepest, strongest = int(depth_B.argmax()), int(table.amplification_B.argmax())
    gain = table.gain(budget, experts)
    kind = ("nearly the same at all timesteps" if table.agreement > 0.9 else
            "similar at all timesteps" if table.agreement > 0.6 else "different at different timesteps")
    return (
        f"The ranking of the layers is {kind} (mean rank correlation {table.agreement:.2f}). Skipping a layer costs "
        f"most around t = {middle[deepest]:.0f}: {depth_B[deepest] / depth_B.mean():.1f} times the mean, in units of "
        f"the dense model's error there. An error of the output moves samples most around t = {middle[strongest]:.0f}: "
        f"{table.amplification_B[strongest] / table.amplification_B.mean():.1f} times the mean. At keep ratio "
        f"{budget.keep_ratio}, if effects added up, one mask for all timesteps would move the samples {gain:.2f} times "
        f"as far (squared) as {experts} experts' masks: "
        + ("experts may have something to gain (where that was tuned, effects did not add up: docs/results.md)."
           if gain > 1.1 else "experts have little to gain over one mask."))


def as_text(table: Sensitivity) -> str:
    """The table in plain text, one line per layer: absolute errors, in brackets those relative to the dense model's."""
    bins, width = [f"t {low}-{high - 1}" for low, high in pairwise(table.edges)], max(map(len, table.sites))
    lines = [" " * width + "".join(f"{name:>20}" for name in bins)]
    for site, absolute_B, relative_B in zip(table.sites, table.error_LB, table.relative_LB, strict=True):
        cells = (f"{absolute:.2e} ({relative:.2g})" for absolute, relative in zip(absolute_B, relative_B, strict=True))
        lines.append(f"{site:{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
