"""The operation: open a checkpoint, edit it, judge the edit, carry it to other checkpoints.

Names are loaded on first use (PEP 562), so that ``surgery.apply`` and ``surgery.delta`` start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.checkpoints import checkpoint_dir, load
    from surgery.delta import Delta
    from surgery.errors import SurgeryError

__version__ = "0.1.0"
__all__ = ["Delta", "SurgeryError", "checkpoint_dir", "load"]

_HOME = {
    "checkpoint_dir": "surgery.checkpoints",
    "load": "surgery.checkpoints",
    "Delta": "surgery.delta",
    "SurgeryError": "surgery.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
