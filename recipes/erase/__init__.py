"""Closed-form erasure as an edit: LEACE, INLP, SentenceDebias and DAMA, a random projection of the same rank beside.

The concept is what tells a prompt with one word's hint from the same prompt with the other's ("... forgot his keys and"
/ "... her keys and"): the hint prompts of the training professions, each with both hints. DAMA takes the prompts that
settle nothing and asks instead what an MLP would have to write there for either word to follow.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.erase.recipe import Summary, run
    from recipes.erase.settings import Settings

__all__ = ["Settings", "Summary", "run"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("Settings",)})
