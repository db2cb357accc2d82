"""The one exception that means "what you gave us cannot work", as opposed to a defect of ours."""


class InputError(ValueError):
    """Bad input: the message is one line that names the field, its value and the remedy.

    The scripts print it without a traceback and exit with code 2.
    """
