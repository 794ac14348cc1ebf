"""The one error class of the package `hooks`, and what a reader of its numbers is told."""


class HookError(Exception):
    """One line: what went wrong, where, what was got, what was expected, and what to do next."""


class Note(UserWarning):
    """One line that a reader of the numbers must know; the command line prints it as such."""
