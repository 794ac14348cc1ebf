"""BiasUnlearn: forget stereotypes, learn anti-stereotypes, keep everything else, and stop where neither is preferred.

LoRA factors train on chunks of StereoSet's test split (the training source); a development set with other target
terms, cut from that source, decides swaps, the stop and the kept checkpoint; StereoSet's dev file is the test.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.bias_unlearn.recipe import Summary, run
    from recipes.bias_unlearn.settings import CHANGES, Settings

__all__ = ["CHANGES", "Settings", "Summary", "run"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("CHANGES", "Settings")})
