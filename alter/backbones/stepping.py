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
    """Whether `keep_steps` knows a scheduler's class."""
    return type(scheduler).__name__ in _FREE


def keep_steps(scheduler: Any, chosen: Sequence[int]) -> None:
    """Let `scheduler` prepare for as many steps as it is asked for, and take `chosen` of them alone, ascending from 0.

    Raises:
        InputError: if its class is not one that can; later, when it prepares for fewer steps.
    """
    if not can_skip_steps(scheduler):
        raise InputError(f"scheduler: a {type(scheduler).__name__} cannot leave out steps: use one of "
                         f"{', '.join(_FREE)}")
    prepare = scheduler.set_timesteps

    @wraps(prepare)
    def preparing(*arguments: Any, **options: Any) -> None:
        prepare(*arguments, **options)
        steps = len(scheduler.timesteps)
        if chosen[-1] >= steps or len(scheduler.sigmas) != steps + 1:
            raise InputError(f"num_inference_steps: of {steps} steps there is none numbered {chosen[-1]}: ask for as "
                             "many as the steps were chosen from")
        rows = list(chosen)
        scheduler.timesteps = scheduler.timesteps[rows]
        scheduler.sigmas = scheduler.sigmas[[*rows, -1]]
        scheduler.num_inference_steps = len(rows)

    scheduler.set_timesteps = preparing


@contextmanager
def only_steps(scheduler: Any, chosen: Sequence[int] | None) -> Iterator[None]:
    """`keep_steps` inside the block; None: all of them."""
    with restored(scheduler, "set_timesteps"):
        if chosen is not None:
            keep_steps(scheduler, chosen)
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
