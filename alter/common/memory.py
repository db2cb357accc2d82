"""How much memory this process has needed."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


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
