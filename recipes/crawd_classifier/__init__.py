"""CrAWD for a classifier of hate speech: accuracy and TPR gaps by target group, plain and adversarial training beside.

HateCheck (and Davidson's tweets) train a new classifier on a pretrained encoder. What comes out is that classifier
before training (``base/``, a plain checkpoint) and the delta that makes it the trained one.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.crawd_classifier.recipe import Summary, run
    from recipes.crawd_classifier.settings import Settings

__all__ = ["Settings", "Summary", "run"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("Settings",)})
