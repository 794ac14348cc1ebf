"""The error class of this package: its message is a single line that a user can act on."""


class SurgeryError(Exception):
    """Something was refused or failed; the message says what, where, got, expected and the next step."""


class Diverged(SurgeryError):
    """A training left the finite numbers; a search over rates goes on without it."""


class NoRoom(SurgeryError):
    """A model does not fit beside what an accelerator holds now; a study of several processes tries it again."""
