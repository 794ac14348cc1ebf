"""What a CrAWD run trains on and holds out: Bias in Bios, or a file of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from recipes.crawd.settings import Settings
from surgery.data import bios
from surgery.data.rows import part, sample
from surgery.data.texts import Columns, Example, examples
from surgery.edits.supervised import Row, encode_rows
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class Given:
    """The training texts and their tokens, the held-out texts, and how many there were."""

    texts: tuple[str, ...]
    rows: tuple[Row, ...]
    held_out: tuple[str, ...]
    name: str
    counts: dict[str, Any]
    note: str


def read(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Given:
    """The texts that the settings name; raises ``SurgeryError`` where none are named, or one part of them is empty."""
    settings.check()
    if settings.file:
        every = [row.answer for row in examples(settings.file, columns=Columns(text=settings.text))]
        alike: Any = {"stratum": lambda _: 0, "unit": lambda text: text}  # copies of a text stand in one part
        texts, held = (part(every, which, settings.seed, **alike) for which in ("train", settings.part))
        name = f"{settings.file}, {settings.part} part of seed {settings.seed}"
    else:
        texts = [row.text for row in bios.load(settings.data, "train", settings.seed)]
        if settings.accountants:
            known = {row.text for row in bios.load(settings.data)}  # of both files once: no test text is trained on
            more = bios.load(settings.data, files=(bios.ACCOUNTANTS,))
            texts += [row.text for row in more if row.text not in known]
        held = [row.text for row in bios.load(settings.data, settings.part, settings.seed)]
        name = f"Bias in Bios, {Path(bios.FILE).name}, {settings.part} part of seed {settings.seed}"
    if not texts or not held:
        raise SurgeryError(f"{name}: {len(texts)} texts to train on, {len(held)} held out; expected some; add texts")
    chosen = sample(texts, settings.train_rows, settings.seed)
    encoded = encode_rows(tokenizer, [Example("", text) for text in chosen], max_length=settings.max_length)
    counts = {"read": len(texts), "trained": len(encoded.rows), "held_out": len(held), "cut": encoded.cut}
    note = (
        f"{len(encoded.rows)} of {len(texts)} texts to train on, {encoded.cut} of them cut to {settings.max_length} "
        f"tokens, {encoded.left_out} left out (no token to learn); {len(held)} held out"
    )
    return Given(tuple(chosen), encoded.rows, tuple(held), name, counts | {"left_out": encoded.left_out}, note)
