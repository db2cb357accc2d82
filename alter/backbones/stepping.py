"""Some of a scheduler's steps in place of all: which timesteps a sampler visits counts as much as how many."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from ..common.errors import InputError

_FREE = (  # that go from any timestep to any other, by `timesteps` and `sigmas` alone
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler",
)


def can_skip_steps(scheduler: Any) -> bool:
    """Whether `keep_steps` knows a scheduler's class, and its settings prepare nothing else for each step."""
    prepares = scheduler.config.get("interpolation_type") == "log_linear" or getattr(scheduler, "solver_p", None)
    return type(scheduler).__name__ in _FREE and not prepares


def keep_steps(scheduler: Any, chosen: Sequence[int], of: int) -> None:
    """Let `scheduler` prepare for `of` steps, and take `chosen` of them alone, ascending from 0.

    Raises:
        InputError: if it is not one that can; later, when it is to prepare for another number of steps.
    """
    if not can_skip_steps(scheduler):
        raise InputError(f"scheduler: a {type(scheduler).__name__} with these settings cannot leave out steps: use one "
                         f"of {', '.join(_FREE)}")
    prepare = scheduler.set_timesteps

    @wraps(prepare)
    def preparing(*arguments: Any, **options: Any) -> None:
        prepare(*arguments, **options)
        steps = len(scheduler.timesteps)
        if steps != of:
            raise InputError(f"num_inference_steps={steps}: the steps were chosen of {of}: ask for {of}")
        rows = list(chosen)
        scheduler.timesteps = scheduler.timesteps[rows]
        scheduler.sigmas = scheduler.sigmas[[*rows, -1]]
        scheduler.num_inference_steps = len(rows)

    scheduler.set_timesteps = preparing


@contextmanager
def only_steps(scheduler: Any, chosen: Sequence[int] | None, of: int) -> Iterator[None]:
    """`keep_steps` inside the block, whatever was kept around it; None: all of any number of steps."""
    with restored(scheduler, "set_timesteps"):
        vars(scheduler).pop("set_timesteps", None)
        if chosen is not None:
            keep_steps(scheduler, chosen, of)
        yield


@contextmanager
def outputs_given(scheduler: Any) -> Iterator[list[Tensor]]:
    """What a scheduler is given by the backbone at each step inside the block, guidance applied, [B, ...]."""
    step: Callable = scheduler.step
    seen: list[Tensor] = []

    @wraps(step)
    def stepping(output: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(output.detach().float().cpu())
        return step(output, *arguments, **options)

    with restored(scheduler, "step"):
        scheduler.step = stepping
        yield seen


@contextmanager
def restored(scheduler: Any, *names: str) -> Iterator[None]:
    """Methods that are replaced inside the block are as before it afterwards."""
    before = {name: vars(scheduler)[name] for name in names if name in vars(scheduler)}
    try:
        yield
    finally:
        for name in names:
            vars(scheduler).pop(name, None)
        vars(scheduler).update(before)
