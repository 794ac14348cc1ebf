"""The settings of an erasure: which projection, where, and of what rank."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surgery.data import genbias
from surgery.edits.places import check_place
from surgery.runs import settings as shared


class Settings(shared.PromptSet, shared.Neutral, shared.Saving):
    """Which projection, and where; the defaults are the sources'."""

    method: Literal["leace", "inlp", "sentence_debias", "dama"] = "leace"
    site: Literal["head", "mlp", "attention", "both"] = "head"
    """head: what the head reads, as a module. The others: what these matrices of ``block`` write, folded into them."""
    block: str | int | list[int] = "upper"
    """upper (two thirds of the depth to a fifteenth below the end), auto (one, by the gain), all, last, middle, first,
    random, or numbers."""
    rank: int = Field(0, ge=0)
    """Directions that go, at most: 0 takes 1 (SentenceDebias), 80 or an eighth of the width (INLP), a sixteenth (DAMA).
    LEACE needs one for two words."""
    prompts: int = Field(0, ge=0)
    """So many pairs of hint prompts, or of DAMA's prompts, drawn by the seed; 0 takes all, of DAMA's 64."""
    search_steps: shared.Count = 20
    """Of DAMA's search for a value."""
    test_rows: shared.Limit = 0
    """At most so many prompts of the prompt set and its hints are measured, drawn by the seed; 0 takes all."""
    split_seed: shared.Seed = genbias.SEED
    controls: list[str] = ["random"]
    """random: as many directions, drawn at random, at the same places."""

    def check(self) -> None:
        """Also the block."""
        super().check()
        check_place(self.block, self.model)

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """DAMA edits MLPs."""
        return {"site": "mlp"} if values.get("method") == "dama" else {}
