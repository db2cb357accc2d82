"""One denoising step, or a whole trajectory: dense, with experts, and with the skipped layers taken out by hand."""

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from ...backbones.inputs import example_inputs
from ...backbones.latency import measure_latency
from ...backbones.sampling import sample_latents
from ...experts.artefact import TemporalExperts
from .cases import Case, draw_experts, shallow_copy, trained_experts, without_layers
from .timing import host_reads, interleave, peak_memory, ratio

DENSE_STEPS, EXPERT_STEPS, EXPERTS = 50, 20, 4  # of a trajectory


@torch.no_grad()
def steps(case: Case, arguments: Any, batch: int, mode: str) -> Iterator[dict[str, Any]]:
    """Every mask by itself; in eager mode also the time ratio that the layers' latencies promise."""
    inputs = example_inputs(case.backbone, case.size, batch=batch)
    latency = measure_latency(case.backbone, case.size, batch, arguments.runs) if mode == "eager" else None
    for about, experts in _experts(case, arguments, count=1):
        for expert in experts.used:
            timestep = int(np.flatnonzero(experts.expert_T == expert)[0])
            given = {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}

            def run(name: str, model: Any, given: dict[str, Any] = given) -> torch.Tensor:
                return model(**given).sample

            macs = float(experts.macs_T[timestep]) / experts.macs_total
            row = {**about, **_compare(case, experts, [expert], mode, run, arguments.runs, macs)}
            if latency is not None:
                row["time_ratio_by_latency"] = 1 - float(latency.share_L[~experts.mask_EL[expert]].sum())
            yield {**row, "expert": expert} if arguments.run else row


@torch.no_grad()
def trajectories(case: Case, arguments: Any, batch: int, mode: str) -> Iterator[dict[str, Any]]:
    """50 dense steps against 20 with several experts, without guidance, from noise to latents."""
    scheduler = DDPMScheduler()
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    solver.set_timesteps(EXPERT_STEPS)
    visited = solver.timesteps.numpy()
    inputs = {name: value for name, value in example_inputs(case.backbone, case.size, batch=batch).items()
              if name in ("class_labels", "encoder_hidden_states")}
    shape = (case.backbone.config.in_channels, case.size, case.size)

    def run(name: str, model: Any) -> torch.Tensor:
        count = DENSE_STEPS if name == "dense" else EXPERT_STEPS
        return sample_latents(model, scheduler, shape, inputs, inputs, count, seed=0)

    for about, experts in _experts(case, arguments, count=EXPERTS):
        order = experts.expert_T[visited].tolist()
        macs = float(experts.macs_T[visited].sum()) / (DENSE_STEPS * experts.macs_total)
        yield {**about, **_compare(case, experts, order, mode, run, arguments.runs, macs)}


def _experts(case: Case, arguments: Any, count: int) -> Iterator[tuple[dict[str, Any], TemporalExperts]]:
    if arguments.run:
        experts = trained_experts(arguments.run)
        yield {"keep_ratio": experts.keep_ratio, "mask_seed": None}, experts
        return
    for keep in arguments.keep:
        for seed in range(arguments.masks):
            yield {"keep_ratio": keep, "mask_seed": seed}, draw_experts(case.cost, keep, seed, count)


def _compare(case: Case, experts: TemporalExperts, order: list[int], mode: str, run: Callable[[str, Any], torch.Tensor],
             runs: int, macs: float) -> dict[str, Any]:
    """One row, of models made for it and gone after it.

    Compiled code is slower next to the remains of other compiled models, by where its memory happens to lie.
    """
    torch._inductor.config.compile_threads = 1  # no processes that still work while the first rounds are timed
    torch.compiler.reset()
    gc.collect()
    models = _models(case, experts, order, compiled=mode == "compiled")
    ways: dict[str, Callable] = {name: functools.partial(run, name, model) for name, model in models.items()}
    return _measure(case, ways, runs, macs, len(order))


def _models(case: Case, experts: TemporalExperts, order: list[int], compiled: bool) -> dict[str, Any]:
    """Those to compare; compiled: each of their prunable layers, as `TemporalExperts.compile` does."""
    dense, served = shallow_copy(case.backbone), shallow_copy(case.backbone)
    experts.apply(served)
    by_hand = {expert: without_layers(case, experts.mask_EL[expert]) for expert in sorted(set(order))}
    if compiled:
        experts.compile(served)
        for model in (dense, *by_hand.values()):
            for site in case.sites:
                model.get_submodule(site.name).compile()
    return {"dense": dense, "experts": served, "by_hand": _in_turn(by_hand, order)}


def _in_turn(copies: dict[int, Any], order: list[int]) -> Any:
    return _InTurn(copies, order) if len(copies) > 1 else copies[order[0]]


class _InTurn(torch.nn.Module):
    """Calls the copy of the expert whose turn it is, without reading the timestep."""

    def __init__(self, copies: dict[int, Any], order: list[int]) -> None:
        super().__init__()
        self.copies = torch.nn.ModuleList(copies.values())
        self.config = copies[order[0]].config
        self.turns = itertools.cycle([copies[expert] for expert in order])

    @property
    def module(self) -> Any:
        """What `backbones.family` takes for the backbone, as in other wrappers."""
        return self.copies[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(self.turns)(*args, **kwargs)


def _measure(case: Case, ways: dict[str, Callable], runs: int, macs: float, count: int) -> dict[str, Any]:
    device = case.backbone.device
    seconds, results = interleave(ways, runs, device)
    if case.backbone.dtype == torch.float32:
        torch.testing.assert_close(results["experts"], results["by_hand"], rtol=1e-3, atol=1e-3)
    with host_reads(device) as reads:
        ways["experts"]()
    time_ratio = ratio(seconds, "experts", "dense")
    return {"macs_ratio": macs, "time_ratio": time_ratio, "efficiency": macs / time_ratio,
            "overhead": ratio(seconds, "experts", "by_hand"),
            "seconds_dense": float(np.median(seconds["dense"])),
            "peak_memory_bytes": peak_memory(ways["experts"], device), "host_syncs_per_step": len(reads) / count}
