"""The one exception that means "your input, not our bug": the command line makes it one line and exit code 2."""


class InputError(Exception):
    """Something outside the program is wrong. The message says what, where, and the cure, in one line."""
