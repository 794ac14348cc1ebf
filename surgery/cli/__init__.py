"""The command line: one function per command; exit code 0 done, 1 refused or failed, 2 wrong usage."""

from surgery.cli import (
    adapters,
    attribute,
    compare,
    data,
    dose,
    evaluate,
    files,
    fit,
    index,
    locate,
    models,
    score,
    study,
    survive,
    tune,
)
from surgery.cli.app import app

__all__ = [
    "adapters",
    "app",
    "attribute",
    "compare",
    "data",
    "dose",
    "evaluate",
    "files",
    "fit",
    "index",
    "locate",
    "main",
    "models",
    "score",
    "study",
    "survive",
    "tune",
]


def main() -> None:
    """The console script."""
    app()
