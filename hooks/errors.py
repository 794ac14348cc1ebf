"""The one error class of the package `hooks`."""


class HookError(Exception):
    """One line: what went wrong, where, what was got, what was expected, and what to do next."""
