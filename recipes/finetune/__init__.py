"""Plain supervised fine-tuning, of all parameters or with LoRA: the Vanilla / SFT baseline, and how children are made.

The texts or prompt and answer rows of a file are learnt by the mean cross-entropy of their tokens; a share of the
file is held out. What comes out is a delta like every other edit's, and on request the fine-tuned checkpoint.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.finetune.recipe import Summary, run
    from recipes.finetune.settings import Settings

__all__ = ["Settings", "Summary", "run"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("Settings",)})
