"""The operation: open a checkpoint, edit it, judge the edit, carry it to other checkpoints.

Names are loaded on first use (PEP 562), so that ``surgery.apply`` and ``surgery.delta`` start without torch.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from surgery.checkpoints import checkpoint_dir, load
    from surgery.delta import Delta
    from surgery.errors import SurgeryError

__version__ = "0.1.0"
__all__ = ["Delta", "SurgeryError", "checkpoint_dir", "load"]

__getattr__, __dir__ = lazily(
    __name__, {"checkpoints": ("checkpoint_dir", "load"), "delta": ("Delta",), "errors": ("SurgeryError",)}
)
