"""What the commands under ``surgery attribute`` share: their options, the probe's file, a model with its adapter."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli.app import group
from surgery.errors import SurgeryError

attribute = group("attribute", "Find the training examples that carry a bias: score, build, query, select.")
Data = Annotated[Path, typer.Option("--data", help="The texts: .txt, .jsonl, .csv or .tsv.")]
Column = Annotated[str, typer.Option("--column", help="The column of the text.")]
ProbeFile = Annotated[
    Path, typer.Option("--probe", help="The biased texts, in the column text; their twins, if any, in anti.")
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="A PEFT adapter's directory, to look at its factors.")]
Weights = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    typer.Option("--dtype", help="Of the weights: float32, bfloat16, float16 or auto."),
]
Tokens = Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens run together.")]
Normalise = Annotated[Literal["cosine", "dot"], typer.Option("--normalise", help="cosine or dot (Eq. 6).")]


def read_probe(path: Path) -> tuple[list[str], list[str]]:
    """The texts, and their twins where every row has one."""
    from surgery.data.texts import table

    texts, twins = [], []
    for at, row in table(path):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise SurgeryError(f"{at}: 'text' is {str(row.get('text'))[:60]!r}, expected text that is not blank")
        texts.append(row["text"])
        if row.get("anti"):
            twins.append(str(row["anti"]))
    if twins and len(twins) < len(texts):
        raise SurgeryError(f"{path}: {len(twins)} of {len(texts)} rows have a twin in anti; expected all or none")
    return texts, twins


def open_adapted(model: str, adapter: Path | None, quiet: bool, dtype: str, device: str | None) -> Any:
    """The model, with the PEFT adapter in the directory ``adapter`` where one is given, and its tokenizer."""
    from surgery.cli.models import open_model

    opened, tokenizer = open_model(model, quiet, dtype=dtype, device=device)
    if adapter is not None:
        from peft import PeftModel

        try:
            opened = PeftModel.from_pretrained(opened, str(adapter)).eval()
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise SurgeryError(f"{adapter}: no adapter of this model ({first[:150]}); expected PEFT's files") from None
    return opened, tokenizer
