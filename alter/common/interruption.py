"""Signals end a run after a complete step and its checkpoint, on all processes together."""

import signal
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
