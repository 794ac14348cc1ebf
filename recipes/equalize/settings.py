"""The settings of an equalising, of words and of pairs; the defaults were chosen on development parts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from surgery.data import genbias, neutral
from surgery.data.prompts import WordSet, load_prompt_set
from surgery.data.shares import check_shares, read_shares
from surgery.edits.places import check_place
from surgery.errors import SurgeryError
from surgery.runs import settings as shared

FOLDERS = ("stereoset", "crows_pairs")
CONTROLS = ("lftf", "random", "no_hold")
OF_PAIRS = ("data", "dose", "doses", "margin_gone", "ss_within", "folds", "scorers", "repeat", "hold_unrelated")
"""Keys that only pairs of sentences read, and those that only words do."""
OF_WORDS = (
    *("words", "shares", "prompt_set", "emphasis", "mass_power", "each", "own", "own_each", "endings", "alike"),
    *("hints", "hold_hints", "hold_endings", "hints_each", "hints_power", "facts", "facts_emphasis", "facts_power"),
    *("split", "people", "more_people", "test_texts"),
)


class Settings(shared.SharedTraining, shared.DataFolder, shared.PromptSet, shared.Neutral, shared.Saving):
    """This project's own method; the defaults were chosen on development parts of SmolLM2-135M-Instruct."""

    renamed = {"part": "block_part", "top": "kept_tokens"}
    pairs: str = ""
    """Sentences in pairs instead of words: stereoset or crows_pairs (of the folder data), or a .jsonl of your own."""
    dose: list[str | int | float] = ["auto"]
    """Offset of a pair's margin (nats a token): 0.2, auto (by cross-validation), or by bias type: gender=0.2,auto.
    0.4/0.2 are of a sentence with a start token and of one without."""
    doses: list[str | int | float] = [0.0, 0.6]
    """The doses among which auto chooses, by straight lines between them, or of single types: gender=0.5:1.3,0,0.6."""
    scales: list[float] = [1.0]
    """By how much what is learnt may be multiplied, chosen with the doses: the smallest at which margin_gone is met.
    Of words one number."""
    margin_gone: float = Field(0.3, gt=0, lt=1)
    """The share of the mean |margin| that is to go, with each scorer, from pairs of groups that training never saw."""
    ss_within: float = Field(1.0, ge=0, lt=50)
    """auto takes the smallest dose at which SS of such pairs, the mean over groups and scorers, is so near to 50."""
    folds: int = Field(8, ge=2)
    """Into so many parts of its groups (terms) the training data is cut for that; twice as many trainings are made."""
    scorers: list[str] = ["bos", "bias-bench"]
    """Of the pairs, StereoSet and CrowS-Pairs; doses are chosen on all of them together."""
    test_rows: shared.Limit = 0
    """At most so many rows of StereoSet, CrowS-Pairs and each set of prompts are measured, drawn by the seed; 0 takes
    all. Locality and facts of gender are always measured whole."""
    test_texts: shared.Limit = 0
    """At most so many sentences of each set of perplexity are measured, drawn by the seed; 0 takes all."""
    repeat: int = Field(1, ge=1)
    """A bias type with fewer pairs than another is gone through as much more often, at most so many times an epoch."""
    hold_unrelated: float = Field(0.25, ge=0)
    """Weight of holding the unrelated sentences of the pairs, of each example beside 1 of a pair."""
    samples: int = Field(0, ge=0)
    """So many texts that the untouched model writes itself are held, too, with the weight hold_texts; 800 for pairs."""
    words: list[str] = []
    """Other words to share the mass among than the prompt set's; any number from two."""
    words_as: Literal["tokens", "continuations"] = "tokens"
    """continuations, words of several tokens, are measured (surgery eval --words-as) and not trained."""
    shares: list[str | int | float] = []
    """The share of each word, in the order of the words; equal ones where nothing is said. Or a .toml or .json file
    that gives each word its share (he = 0.53), from a census, say."""
    block: str | int | list[int] = "upper"
    """upper (two thirds of the depth to a fifteenth below the end), auto (one, by the gain), all, last, middle,
    first, random, numbers, or blocks (all of them and nothing else, which is what pairs train)."""
    reason: str = ""
    """Why these blocks, in words, for the report; surgery tune writes it."""
    block_part: Literal[
        "all", "auto", "matrices", "vectors", "attention", "mlp", "writers", "without_attention", "without_mlp"
    ] = "all"
    """writers: the projections by which attention and MLP add to the stream (W_O and W_out), a third of the numbers.
    auto: of all matrices of the chosen blocks (of every block where block is auto), those with the most natural gain
    for each number, together ``part_size`` numbers; they bear a higher rate, 1e-3 where nothing is said."""
    part_size: int = Field(500_000, ge=1)
    """Of block_part = auto: 1 MB in 16 bits."""
    method: Literal["dense", "lora"] = "dense"
    rank: shared.Count = 16
    alpha: shared.Positive = 32.0
    lr: shared.Positive = 5e-4
    epochs: shared.Count = 2
    batch_size: shared.Count = 32
    optimizer: Literal["adam", "adamw"] = "adam"
    schedule: Literal["constant", "linear"] = "linear"
    warmup: shared.Share = 0.05
    emphasis: float = Field(3.0, ge=0)
    """Weight of the gap among the words alone, which counts every prompt alike, beside the whole target's KL."""
    mass_power: shared.Positive = 1.0
    """What is equalised has the odds of the words' mass to this power: above 1 rare words become a little rarer, since
    prompts that training does not see take on something of the mass of those that it sees."""
    shapes: int = Field(2000, ge=1)
    """How many sentence shapes are drawn from the grammar; for he, she and they, about people, only."""
    longest: int = Field(0, ge=0)
    """Only shapes of at most so many words, the subject counted as one; 0: of any length."""
    each: int = Field(8, ge=0)
    """In how many of them each person stands; 0 trains on the prompt set's own templates alone."""
    endings: int = Field(1, ge=1)
    """With how many connectives each person stands there: one beginning, which runs once, and several texts."""
    alike: int = Field(1, ge=1)
    """So many prompts that begin alike stand in one step, at most, where what they share runs once."""
    own: int = Field(0, ge=0)
    """Only so many of the prompt set's own training prompts; 0 takes all."""
    own_each: int = Field(0, ge=0)
    """In how many of the prompt set's own templates each person beyond the set stands, too."""
    hints: int = Field(0, ge=0)
    """Only so many hint prompts, settled subjects and, a term of their own, facts (nouns and relations with gender by
    definition), of each kind alike, drawn by the seed; 0 takes all. Beside pairs 400 settled subjects of all kinds,
    facts among them."""
    settled: int = Field(0, ge=0)
    facts: int = Field(0, ge=0)
    people: int = Field(0, ge=0)
    """Only so many of the grammar's people beside the prompt set's own; 0 takes all."""
    more_people: bool = False
    """Also equalise some 360 further people (``surgery.data.shapes.people``)."""
    more_nouns: bool = False
    """Also hold about 640 further nouns with gender by definition (``surgery.data.facts_of_gender.more_nouns``)."""
    hold_endings: int = Field(1, ge=1)
    """With how many connectives hints, facts and who is introduced stand behind one beginning, their number as it is.
    Things, plurals and names, which then are held less well, stand with one."""
    hold_hints: float = Field(2.0, ge=0)
    """Weights of what is held, of each example beside 1 of a prompt; 0 leaves a kind out."""
    hold_settled: float = Field(4.0, ge=0)
    hold_texts: float = Field(3.0, ge=0)
    hold_emphasis: float = Field(0.0, ge=0)
    """As emphasis, of hints, settled subjects and facts: weight of the words' ratio there, however small their mass."""
    facts_emphasis: float = Field(0.0, ge=0)
    """The same, of facts alone, on top of it."""
    facts_power: shared.Positive = 1.0
    """Facts are held with the words' ratio to this power: above 1 a little more settled than they were, since what is
    held reaches nouns that are not in part."""
    hints_power: shared.Positive = 1.0
    """The same of hints, once what they have in common is out of them."""
    hold_file: str = ""
    """Your own texts to hold, .txt (one a line) or .jsonl (key "text")."""
    hold_positions: Literal["all", "last"] = "all"
    """Of the sentences and of your texts: every position, or the last one."""
    hints_each: int = Field(6, ge=0)
    """In how many of the grammar's hint shapes each person stands, every hint counted as one: each prompt stands there
    with every hint, and what these have in common, the person's own preference, is taken out of what is learnt."""
    settled_each: int = Field(8, ge=0)
    """In how many of the shapes each thing, plural, gendered noun, relation and name stands; who is equalised stands
    in two more, introduced as Mr. or Ms. and as several people."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Products of float32 matrices while targets are computed and blocks train (torch's float32_matmul_precision):
    medium is faster on a CPU with AMX. Everything is measured with highest."""
    clip: float = Field(0.0, ge=0)
    """The largest norm of a step's gradient, all parameters together; 0: as it is; 1 for pairs, which without it can be
    thrown far off by a single step, at one seed and rounding and not at another."""
    kept_tokens: int = Field(256, ge=2)
    """Tokens kept of a target, the others together as one."""
    split: Literal["both", "profession", "pairs"] = "both"
    """both: test professions unseen, and beside them templates and other people unseen, too. pairs: the paper's."""
    split_seed: shared.Seed = genbias.SEED
    controls: list[str] = ["lftf"]
    """lftf (the paper's settings), random (as many other blocks), no_hold (the first term alone); none for pairs."""

    def check_tuning(self) -> None:
        """Raises ``SurgeryError`` for what ``surgery tune`` cannot try."""
        if self.block_part == "auto":
            raise SurgeryError("tune: block_part = auto names its matrices in a run; name another part, or none, here")
        if self.pairs:
            raise SurgeryError(
                "tune: pairs choose their own doses (dose = auto); run equalize with them, or leave pairs out"
            )

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys of the other form, which no written recipe has: where their defaults change, it would be refused."""
        return OF_WORDS if self.pairs else OF_PAIRS

    @classmethod
    def reads_data(cls, values: Mapping[str, Any]) -> bool:
        """Only pairs of sentences do."""
        return bool(values.get("pairs"))

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What pairs change (all blocks train, longer, at a lower rate, without LFTF), and named matrices alone."""
        changed: dict[str, Any] = {"block": "blocks", "lr": 2e-4, "epochs": 2, "batch_size": 64, "controls": []}
        changed |= {"samples": 800, "settled": 400, "clip": 1.0}
        if values.get("pairs"):
            return changed
        return {"lr": 1e-3} if values.get("block_part") == "auto" else {}

    def check(self) -> None:
        """Also the block, the controls, files that are read, the shares, and that the words are of a form to train."""
        super().check()
        controls_of(self.controls)
        if not self.pairs and (len(self.scales) != 1 or not 0 < self.scales[0] <= 2):
            raise SurgeryError(f"scales: got {self.scales}; words take one number above 0 up to 2; name one")
        if self.block != "blocks":
            check_place(self.block, self.model)
        if self.hold_file:
            neutral.sentences(self.hold_file)
        if self.pairs in FOLDERS and not self.data:
            raise SurgeryError(f"pairs: {self.pairs} is read from a folder of data sets; name it with data=DIR")
        if self.pairs and self.pairs not in FOLDERS and not self.pairs.lower().endswith(".jsonl"):
            raise SurgeryError(f"pairs: got {self.pairs!r}, expected {', '.join(FOLDERS)} or a .jsonl file")
        words = self.words or load_prompt_set(self.prompt_set).words.words
        check_shares(words, read_shares(self.shares, words))
        WordSet(tuple(words))
        if self.words_as == "continuations":
            raise SurgeryError(
                "words_as: got continuations, which are measured and not trained; name words of one token each, and "
                "measure the others with surgery eval --words-as continuations"
            )


def controls_of(names: Sequence[str]) -> list[str]:
    """Raises ``SurgeryError`` for a control that does not exist."""
    unknown = next((name for name in names if name not in CONTROLS), None)
    if unknown is not None:
        raise SurgeryError(f"controls: got {unknown!r}, expected some of {', '.join(CONTROLS)}")
    return list(dict.fromkeys(names))
