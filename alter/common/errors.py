"""The one exception that means "what you gave us cannot work", as opposed to a defect of ours."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: the message has one line per fault, which names the field, its value and the remedy.

    The commands print it without a traceback and exit with code 2.
    """


class Faults:
    """Faults that are told all at once.

    Attributes:
        lines: one per fault.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Take down the InputError of what is inside, and go on after it."""
        try:
            yield
        except InputError as error:
            self.lines += str(error).splitlines()

    def refuse(self) -> None:
        """Raise one InputError with all faults, each once, if there are any."""
        if self.lines:
            raise InputError("\n".join(dict.fromkeys(self.lines)))
