"""Methods, models and seeds on one page: run what is missing, judge all on the same rows, say which edit to ship."""

from surgery.study.carry_out import carry_out
from surgery.study.cells import Cell
from surgery.study.settings import Method, Study, read

__all__ = ["Cell", "Method", "Study", "carry_out", "read"]
