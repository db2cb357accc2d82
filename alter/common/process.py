"""This process: its place among those of a launch, its peak memory, and the signals that end a run."""

import contextlib
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from tqdm import tqdm

from .errors import InputError

MEETING = timedelta(days=1)  # the longest that a process waits for another; a launcher ends all when one dies
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
Result = TypeVar("Result")


def this_process() -> PartialState:
    """This process among those of `accelerate launch` or torchrun; without an accelerator they use the CPU, where
    accelerate by itself would take each for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
                        timeout=MEETING)


def on_main_process(function: Callable[[], Result]) -> Result:
    """What `function` returns on the main process, which alone calls it, on every process.

    Raises:
        InputError: that of `function`, on every process.
    """
    outcome: Any = None
    if PartialState().is_main_process:
        try:
            outcome = function()
        except InputError as error:
            outcome = error
    outcome = broadcast_object_list([outcome])[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def summed(values: np.ndarray) -> np.ndarray:
    """The sum of what the processes of a launch found, each a part, on every one of them; in float64."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    found = reduce(torch.from_numpy(np.asarray(values, dtype=np.float64)).to(state.device), "sum")
    return found.cpu().numpy()


def tell(text: str) -> None:
    """Print it beside the bars of the main process, alone."""
    if PartialState().is_main_process:
        tqdm.write(text)


def peak_memory() -> tuple[int, int]:
    """Bytes at the peak since the start, or since `forget_peak`: in main memory and on the process's GPU."""
    main = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        main = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return main, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def forget_peak() -> None:
    """Start anew, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Interrupted(RuntimeError):
    """A signal ended the run after a complete step and its checkpoint."""

    def __init__(self, signum: int, saved: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; go on with resume={saved}")
        self.signum = signum


class Interruption:
    """Notes the first signal inside a `with` block; the second has its usual effect.

    Attributes:
        received: the signal's number; 0 until there is one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        try:
            self._usual = {name: signal.signal(name, self._note) for name in SIGNALS}
        except ValueError:  # not the main thread, which alone receives signals
            self._usual = {}
        return self

    def __exit__(self, *_: Any) -> None:
        for name, handler in self._usual.items():
            signal.signal(name, handler)

    def _note(self, signum: int, _: Any) -> None:
        self.received = signum
        self.__exit__()


def agreed_signal(share: float, mean: float) -> int:
    """The signal that all processes stop for; 0: none.

    Args:
        share: of the processes that received one. mean: of all processes' numbers.
    """
    # The number that those which received one got; any, where they got several.
    return min(SIGNALS, key=lambda number: abs(number - mean / share)) if share else 0
