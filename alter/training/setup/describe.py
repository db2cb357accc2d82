"""What a configuration means, before anything is loaded: sites, MACs, budget, memory."""

from typing import Any

import numpy as np
from torch import nn

from ...backbones.guidance import guidance_of
from ...backbones.noising import Betas, Flow
from ...backbones.pretrained import DTYPES, trained_parameters
from ...common.config import Config
from ...common.errors import Faults, InputError
from ...common.load import without_effect
from ...experts.artefact import TemporalExperts
from ...method.allocation import likely
from ...method.budget import Budget
from ...method.measured import Forwards, forwards
from .machine import check_shares
from .noise import response_sampler
from .parts import choose_trained
from .plan import Plan, known_folder, make_plan

_GIB = 2**30
_PEAK, _USED = 989e12, 0.4  # FLOP/s of an H100 (SXM) with dense bf16, and the share of them that training attains


def describe_run(config: Config, processes: int = 1) -> str:
    """The text of `alter train --dry-run`; needs no weights, no data and no network."""
    faults = Faults()
    with faults.caught():
        check_shares(config, processes)  # and not this machine: the run may be for another
    with faults.caught():
        plan = _plan(config)
    faults.refuse()
    backbone, cost, budget, experts = plan.backbone, plan.cost, plan.budget, plan.experts
    everything = sum(parameter.numel() for parameter in backbone.parameters())
    choose_trained(backbone, config)
    trained = sum(parameter.numel() for parameter in trained_parameters(backbone).values())
    scale, unit = cost.unit
    teacher, state = {"fp32": 4, "bf16": 2}[config.teacher.precision], {"adamw": 8, "adamw_8bit": 2}
    kind = config.backbone.quantize or config.backbone.precision
    memory = {f"weights ({kind})": _weights(config, backbone)}
    if config.lora.rank is not None:
        memory["adapters (fp32)"] = 4 * trained
    own = config.lora.rank is not None and config.teacher.pretrained is None  # the backbone without its adapters
    if config.loss.distils and not config.teacher.offload and not own:
        memory[f"teacher ({config.teacher.precision})"] = teacher * everything
    memory["gradients (fp32)"] = 4 * trained
    memory[f"optimizer ({config.optim.optimizer})"] = state[config.optim.optimizer] * trained
    if config.train.ema_decay:
        memory["weights' average (EMA)"] = 4 * trained
    lines = [
        cost.table(), "",
        f"{type(backbone).__name__}: {len(cost.sites)} sites, {cost.macs_total / scale:.1f} {unit} a forward "
        "(batch 1; convolutions, matrix and attention products)",
        f"prunable: {cost.prunable_share:.1%} of the MACs",
        f"budget: keep {_budget(config, budget, experts)}{_averaged(config, plan)}; "
        f"{len(experts.used) if experts else config.experts.count} experts",
        f"noise: {_noise(plan)}" + (f", at {len(plan.noising.visited)} timesteps" if plan.noising.visited else ""),
        f"updates: {0 if experts else config.train.t_end} of {config.train.steps} steps search, "
        f"{config.train.batch_size} samples each",
        *_measured(config, plan),
        "memory a process, without activations, VAE and text encoder "
        f"({trained / 1e6:.1f}M of {everything / 1e6:.1f}M parameters trained):",
    ]
    lines += [f"  {name:22} {size / _GIB:7.2f} GiB" for name, size in memory.items()]
    lines.append(f"  {'total':22} {sum(memory.values()) / _GIB:7.2f} GiB")
    lines.append(f"time: about {_hours(config, plan):,.1f} GPU-hours, of the backbone alone, at {_USED:.0%} of an "
                 f"H100's {_PEAK / 1e12:.0f} TFLOP/s (forward 1, backward 2, to masks 1, dense model "
                 f"{int(config.loss.distils)}"
                 f"{', recomputed forward 1' if config.backbone.gradient_checkpointing else ''})")
    return "\n".join(lines)


def _weights(config: Config, backbone: Any) -> float:
    """Bytes of the weights without adapters."""
    linear = {f"{name}.weight" for name, module in backbone.named_modules()
              if config.backbone.quantize and isinstance(module, nn.Linear)}
    small, whole = {"int8": 1, "nf4": 0.5}.get(str(config.backbone.quantize), 0), DTYPES[config.backbone.precision]
    return sum(value.numel() * (small if name in linear else whole.itemsize)
               for name, value in backbone.named_parameters() if ".lora_" not in name)


def _plan(config: Config) -> Plan:
    folder = known_folder(config)
    if folder is None:
        raise InputError(f"backbone.pretrained={config.backbone.pretrained!r}: no such folder, and configs/models/ "
                         "does not know it: give a diffusers folder")
    return make_plan(config, folder, source=None)


def _hours(config: Config, plan: Plan) -> float:
    """GPU-hours: a search of masks runs every layer, one of random depths what they keep, and updates of the weights
    the kept layers; and what is measured."""
    train, searched = config.train, 0 if plan.experts else config.train.t_end
    tuned = train.steps - searched * (train.schedule == "two_stage")
    low, high = config.budget.range if plan.experts is None else (plan.experts.keep_ratio_target,) * 2
    kept = (low + high) / 2 if plan.budget is None else _total(plan.budget, (low + high) / 2)
    passes, measured = 4 if config.backbone.gradient_checkpointing else 3, 0
    shares = searched + kept * tuned
    if _elastic(config, plan):
        shares = _mean_depth(config, plan) * searched + kept * (tuned - searched)
        measured = _forwards(config, plan).total
    else:
        shares -= searched / passes  # Φ's update differentiates no weights
    run = (passes * shares + config.loss.distils * train.steps) * train.batch_size + measured
    return 2 * plan.cost.macs_total * run / (_PEAK * _USED) / 3600


def _elastic(config: Config, plan: Plan) -> bool:
    return plan.experts is None and config.search.method == "elastic"


def _mean_depth(config: Config, plan: Plan) -> float:
    """The share of the whole backbone that random depths keep in the mean, as if all layers cost the same."""
    layers, budget = len(plan.cost.sites), config.budget
    depth_M = np.arange(layers, max(int(np.ceil(layers * config.search.least - 1e-9)), 1) - 1, -1) / layers
    cost_M = 1 - plan.cost.prunable_share * (1 - depth_M)
    return float(likely(cost_M if budget.over == "total" else depth_M, *budget.range) @ cost_M)


def _forwards(config: Config, plan: Plan) -> Forwards:
    search, evaluate = config.search, config.evaluate
    guided = guidance_of(plan.backbone, evaluate.guidance_scale) != 1
    steps = response_sampler(config, isinstance(plan.noising, Flow))[1]
    return forwards(len(plan.cost.sites), search.least, search.samples, search.bins, steps, guided,
                    config.experts.count)


def _measured(config: Config, plan: Plan) -> list[str]:
    """What a search does not use and what an elastic one measures, in a line each."""
    keys = without_effect(config)
    unused = [f"no effect with search.method={config.search.method}: {', '.join(keys)}"] if keys else []
    if not _elastic(config, plan):
        return unused
    counted = _forwards(config, plan)
    return [*unused,
            f"measured, in forwards of one sample: about {counted.order:,} to order the layers, {counted.forecast:,} "
            f"for a forecast, {counted.errors:,} for errors and {counted.response:,} for the response of samples"]


def _total(budget: Budget, keep_ratio: float) -> float:
    """The share that a keep ratio leaves of the whole backbone."""
    return keep_ratio if budget.over == "total" else 1 - float(budget.share_L.sum()) * (1 - keep_ratio)


def _noise(plan: Plan) -> str:
    noising, name = plan.noising, type(plan.scheduler).__name__
    if isinstance(noising, Betas):
        return f"by betas, prediction type {noising.prediction_type}"
    trained = noising.trained.tolist()
    within = f", timesteps {trained[0]} to {trained[-1]}, those of {plan.component}" if noising.within else ""
    return (f"flow matching ({name}), density {noising.density}, shift {noising.shift:.4g}, weighting "
            f"{noising.weighting}{within}")


def _averaged(config: Config, plan: Plan) -> str:
    """Over which timesteps a budget is averaged, if not over all alike."""
    if plan.budget is None or plan.budget.timesteps is None:
        return ""
    if plan.experts:
        return f", averaged over {len(plan.budget.timesteps)} timesteps of a sampler"
    name = config.budget.sampler or f"the pipeline's {type(plan.scheduler).__name__}"
    return f", averaged over the timesteps of {config.budget.sampling_steps} steps of {name}"


def _budget(config: Config, budget: Budget | None, experts: TemporalExperts | None) -> str:
    if budget is None:
        return (f"{config.budget.range[0]:.3f} of the {config.budget.over} time, measured when the run begins "
                "(`alter latency` measures it now)")
    prunable = float(budget.share_L.sum())
    kept = (budget.keep_ratio - budget.fixed) * budget.scale / prunable
    of_time = experts.latency is not None if experts else config.budget.cost == "latency"
    unit = "time" if of_time else "MACs"
    total = _total(budget, budget.keep_ratio)
    return (f"{budget.keep_ratio:.3f} of the {budget.over} {unit}, which is {total:.3f} of all {unit} and {kept:.3f} "
            "of the prunable")
