"""LFTF: locate the block that turns the stream most, fine-tune it to a fair next word, prove it on the saved file.

Locating First and Then Fine-Tuning (arXiv 2505.15475). One pass over the prompts ranks the blocks (section 4.1),
measures the model before, and keeps the stream that enters the blocks to be trained; training (section 4.2) and
every measurement afterwards start from that stream.
"""

from typing import TYPE_CHECKING

from hooks.lazy import lazily

if TYPE_CHECKING:
    from recipes.lftf.recipe import Summary, run
    from recipes.lftf.settings import Settings

__all__ = ["Settings", "Summary", "run"]

__getattr__, __dir__ = lazily(__name__, {"recipe": ("Summary", "run"), "settings": ("Settings",)})
