"""Equalise and hold: the compared words share their mass anew, and everything that must not move is held.

One training on several terms (``surgery.edits.equalize``): prompts of hundreds of shapes whose next word is equalised,
and hints, settled subjects, ordinary sentences and a user's own texts, whose distributions stay the untouched model's.
Measured at three distances: the prompt set's templates, templates that training never saw, other shapes of text.

With ``pairs`` whole sentences are compared instead of words (``recipes.equalize.pairs``): StereoSet's, CrowS-Pairs', or
those of a file.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.equalize.recipe import Summary, run
    from recipes.equalize.settings import Settings
    from recipes.equalize.tuning import tune

__all__ = ["Settings", "Summary", "run", "tune"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("Settings",), "tuning": ("tune",)})
