"""Methods, models and seeds on one page: run what is missing, judge all on the same rows, say which edit to ship."""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from surgery.study.cells import Cell
    from surgery.study.settings import Method, Study, read

__all__ = ["Cell", "Method", "Study", "read"]

__getattr__, __dir__ = lazily(__name__, {"cells": ("Cell",), "settings": ("Method", "Study", "read")})
