"""CrAWD: fine-tuning with a decayed cross-attention to a few sensitive words; its baselines; Vanilla beside it.

The texts are Bias in Bios or a file of one's own. What comes out is a delta of kind ``module``, of a baseline one of
kind ``lora`` or ``dense``, and every number stands beside that of plain fine-tuning on the same texts.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.crawd.recipe import Summary, run
    from recipes.crawd.settings import PROFILES, Settings
    from recipes.crawd.texts import read

__all__ = ["PROFILES", "Settings", "Summary", "read", "run"]

__getattr__, __dir__ = lazily(
    __name__, {"recipe": ("Summary", "run"), "settings": ("PROFILES", "Settings"), "texts": ("read",)}
)
