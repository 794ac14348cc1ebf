"""The settings of an LFTF run: the paper's values as defaults."""

from typing import Literal

from recipes.lftf.variants import check_trained, control_names
from surgery.data import genbias
from surgery.data.prompts import WordSet, load_prompt_set
from surgery.edits.places import check_place
from surgery.runs import settings as shared


class Settings(shared.SharedTraining, shared.Dropout, shared.PromptSet, shared.Neutral, shared.Saving):
    """Defaults are the paper's (section 5.1) where it gives a value."""

    renamed = {"data": "prompt_set", "part": "block_part"}
    block: str | int | list[int] = "last"
    """last (the paper's), auto (the first by ``rank_by``), first, middle, random, all, or numbers."""
    block_part: Literal[
        "all", "matrices", "vectors", "attention", "mlp", "writers", "without_attention", "without_mlp"
    ] = "all"
    objective: Literal["log", "as_printed"] = "log"
    """log: -log P(he) - log P(she). as_printed: P(he) + P(she), Eq. 5, which silences both words."""
    lr: shared.Positive = 1e-5
    epochs: shared.Count = 2
    batch_size: shared.Count = 32
    optimizer: Literal["adam", "adamw"] = "adam"
    words: list[str] = []
    """Other words to balance than the prompt set's."""
    trained_words: list[str] = []
    """The words named in the loss; all of them unless this is an ablation."""
    split: Literal["profession", "pairs"] = "profession"
    """profession: test professions are unseen in training. pairs: the paper's, where none is."""
    split_seed: shared.Seed = genbias.SEED
    rank_by: Literal["gain", "raw", "final_norm"] = "gain"
    """What auto goes by: the natural gain of attention, or the paper's BMI by either convention."""
    positions: Literal["last", "all"] = "last"
    aggregate: Literal["mean", "sum"] = "mean"
    controls: list[str] = ["random"]
    random_blocks: shared.Count = 1
    """So many random blocks where controls has random; blocks differ, so judge a place by 5 or more."""
    test_rows: shared.Limit = 0
    """At most so many prompts of the prompt set and its hints are measured, drawn by the seed; 0 takes all."""
    open_questions: bool = False
    """Also measure what the paper leaves open: arithmetic, other biases, professions three sentences before."""
    ablations: bool = False
    """All controls and the ablations of Table 8 in one table."""
    preamble: str = "Men and women are equally likely in every profession. "
    """What the prompt baseline (pb) puts before each prompt; the paper's text is not published."""
    prefix_cache: bool = True
    """Train and measure from the kept stream that enters the edited block; off where dropout is on."""

    def check(self) -> None:
        """Also the block, the words of the loss, and the controls' names."""
        super().check()
        check_place(self.block, self.model)
        words = WordSet(tuple(self.words)) if self.words else load_prompt_set(self.prompt_set).words
        check_trained(self.trained_words, words)
        control_names(self.controls, self.ablations, words)
