"""The command line: one function per command; exit code 0 done, 1 refused or failed, 2 wrong usage."""

from surgery.cli import files, models
from surgery.cli.app import app

__all__ = ["app", "files", "main", "models"]


def main() -> None:
    """The console script."""
    app()
