"""Apply a delta to a checkpoint on disk, look before applying, and undo: streaming, without torch.

    report = apply("debias.safetensors", "somebody/finetuned", "out/finetuned-debiased", rounding="auto")
    undo("out/finetuned-debiased", "out/original-again")

Everything is checked before anything is created; the destination appears complete or not at all; the source
is only read. Peak memory does not depend on the model's size.
"""

from surgery.apply.engine import apply
from surgery.apply.inspection import Inspection, inspect
from surgery.apply.report import ApplyReport, TensorChange
from surgery.apply.undoing import UndoReport, undo

__all__ = ["ApplyReport", "Inspection", "TensorChange", "UndoReport", "apply", "inspect", "undo"]
