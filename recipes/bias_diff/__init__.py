"""BIAS DIFF: find the training texts that carry a bias by their gradients, and unlearn them, beside every control.

Bias Data Attribution with Influence Function. A warm-up trains the model on a mixture (2.2); each text is scored by
how far its gradient points along that of biased sentences (2.3); what is selected is taken out of the data, or
unlearned (2.4). Everything is measured on checkpoints as saved.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.bias_diff.recipe import Summary, run
    from recipes.bias_diff.settings import PROFILES, Settings

__all__ = ["PROFILES", "Settings", "Summary", "run"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("PROFILES", "Settings")})
