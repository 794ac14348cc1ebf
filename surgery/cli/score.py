"""The command ``surgery attribute score``: how far each training text's gradient points along a bias."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli.app import Debug, Device, Model, Quiet, command, examples, to_write
from surgery.cli.attribute import (
    Adapter,
    Column,
    Data,
    Normalise,
    ProbeFile,
    Tokens,
    Weights,
    attribute,
    open_adapted,
    read_probe,
)
from surgery.cli.models import check_opening, import_libraries
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    attribute,
    epilog=examples(
        "surgery attribute score demo --data texts.jsonl --probe biased.txt --json scores.json --targets q_proj,v_proj",
        "surgery attribute score ./checkpoint --adapter ./lora --data mixture.jsonl --probe probe.jsonl "
        "--json scores.json --top 0.35 --twins test.jsonl",
        "surgery attribute score demo --data texts.jsonl --probe more.txt --contrast less.txt --json scores.json "
        "--html tokens.html",
    ),
)
def score(
    model: Model,
    data: Data,
    probe: ProbeFile,
    json_file: Annotated[Path, to_write("--json", "The scores, one row on each line.")],
    contrast: Annotated[
        Path | None, typer.Option("--contrast", help="The probe's twins in the same order, if not in its column anti.")
    ] = None,
    adapter: Adapter = None,
    column: Column = "text",
    targets: Annotated[str, typer.Option("--targets", help="Only layers whose names end so: a,b. Default all.")] = "",
    normalise: Normalise = "cosine",
    unit: Annotated[
        int, typer.Option("--batch-unit", min=0, help="Score batches of so many texts (the paper); 0: each text.")
    ] = 0,
    top: Annotated[
        float, typer.Option("--top", help="With labels: the share to select, and to judge beside the controls.")
    ] = 0.0,
    label: Annotated[str, typer.Option("--label", help="The column that says which rows are biased.")] = "biased",
    twins: Annotated[
        Path | None, typer.Option("--twins", help="Pairs (text, anti) of neither data nor probe, for the twin test.")
    ] = None,
    html: Annotated[Path | None, to_write("--html", "Show the top texts' tokens by what they add.")] = None,
    cut: Annotated[
        int, typer.Option("--cut", min=0, help="Only the first tokens of longer texts; 0 refuses them.")
    ] = 0,
    batch_tokens: Tokens = 2048,
    dtype: Weights = "float32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations: less memory, a third more time.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Of the controls, ties and intervals.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, if there is one.")] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score every text by its gradient along the probe's, at the price of one forward and one backward pass.

    Of a probe with twins the contrast (text minus twin, so that style cancels) is scored as well. The file is read
    row by row, and memory does not grow with it, except for a few numbers a row with --top.
    """
    from surgery.attribution.tfidf import scorer
    from surgery.data.texts import Columns, stream
    from surgery.progress import Progress

    columns, progress = Columns(text=column, prompt="", answer=""), Progress(quiet)

    def texts() -> Iterator[str]:
        return (example.answer for example in stream(data, columns=columns))

    biased, antis = _probe(probe, contrast)
    pairs = read_probe(twins) if twins else ([], [])
    if twins and not pairs[1]:
        raise SurgeryError(f"{twins}: holds no twins; expected pairs with the columns text and anti")
    labels = _labels(data, label) if top else None
    if top and not 0 < top < 1:
        raise SurgeryError(f"--top {top}: expected a share between 0 and 1")
    check_opening(model, device)
    digest = hashlib.sha256()
    with progress.work("count the words", None) as step:
        similar = scorer(_passing(texts(), digest, step), biased)

    import_libraries()
    from hooks.gradient_influence import check_texts, influence
    from surgery.attribution import score_file as scored

    opened, tokenizer = open_adapted(model, adapter, quiet, dtype, device)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "cut": cut or None, "checkpointing": checkpointing}
    with progress.work("probe", None) as step:
        found = _probed(opened, tokenizer, biased, antis, targets, options)
        step(len(biased))
    way: Literal["example", "batch"] = "batch" if unit else "example"
    options |= {"normalise": normalise, "unit": way, "unit_size": unit or 1}

    with progress.work("check the texts", None) as step:  # now, not after hours
        step(check_texts(opened, tokenizer, texts(), found, cut=cut or None))
    with progress.work("score", None) as step:
        header = {
            "model": model, "adapter": str(adapter) if adapter else None, "data": str(data), "probe": str(probe),
            "data_sha256": digest.hexdigest(),
            "scores": list(found.names), "normalise": normalise, "batch_unit": unit, "targets": targets, "cut": cut,
            "dtype": dtype, "batch_tokens": batch_tokens, "layers": len(found.vectors), "probe_texts": len(biased),
        }  # fmt: skip
        windows = partial(_windows, opened, tokenizer, found, texts, similar, step, options)
        summary = scored.write_scores(json_file, header, windows, resume=resume)
    _tell(summary, texts(), by_batch=bool(unit), progress=progress)
    if html:
        shown = _at(texts(), [row["row"] for row in summary["top"][found.names[-1]][:50]])
        _show(html, opened, tokenizer, shown, found, normalise, cut)
    if labels is not None:
        tested = None
        if pairs[0]:
            each = options | {"unit": "example"}
            tested = (pairs, influence(opened, tokenizer, [*pairs[0], *pairs[1]], found, **each).scores)
        _judge(json_file, labels, similar, tested, found.names, data.name, top, seed)
    print(json_file)


def _probe(file: Path, contrast: Path | None) -> tuple[list[str], list[str]]:
    """The probe's texts and their twins, of its own column or of another file; no twins where there are none."""
    biased, antis = read_probe(file)
    if contrast is None:
        return biased, antis
    if antis:
        raise SurgeryError(f"--contrast {contrast}: {file} has twins of its own in the column anti; drop one")
    return biased, read_probe(contrast)[0]


def _probed(
    model: Any, tokenizer: Any, biased: list[str], antis: list[str], targets: str, options: dict[str, Any]
) -> Any:
    """The gradients of the probe: of its texts and, where they have twins, of each minus its twin's (contrast)."""
    from hooks.gradient_influence import influence_probe

    names = {"influence": biased, "contrast": biased} if antis else {"influence": biased}
    layers = [name.strip() for name in targets.split(",") if name.strip()] or None
    twins = {"contrast": antis} if antis else None
    return influence_probe(model, tokenizer, names, contrast=twins, targets=layers, **options)


def _windows(
    model: Any,
    tokenizer: Any,
    probe: Any,
    texts: Callable[[], Iterator[str]],
    similar: Callable[[str], float],
    step: Callable[[int], None],
    options: dict[str, Any],
    start: int,
) -> Iterator[Any]:
    """Scores of the texts from row ``start`` on, some at a time, and those texts' similarities to the probe."""
    from hooks.gradient_influence import influence_windows

    told, kept = start, list[float]()

    def passing() -> Iterator[str]:
        for text in islice(texts(), start, None):
            kept.append(similar(text))
            yield text

    step(start)
    for part in influence_windows(model, tokenizer, passing(), probe, first=start, **options):
        count = len(part.scores)
        yield part, kept[:count]
        del kept[:count]
        step(part.first + count - told)
        told = part.first + count


def _tell(summary: Any, texts: Iterator[str], *, by_batch: bool, progress: Any) -> None:
    """The scores' correlations with the controls, and the ten texts with the highest ones."""
    if by_batch:
        progress.say(
            "scores of batches: where rows of a kind stand together, they give the kind away; shuffle the file"
        )
    for name, gaps in summary["correlation"].items():
        print(f"{name}: correlation with minus the loss {gaps['minus_loss']:+.2f}, with TF-IDF {gaps['tfidf']:+.2f}")
    highest = {row["row"]: row["score"] for row in summary["top"]["influence"][:10]}
    for place, text in _at(texts, list(highest)):
        print(f"{highest[place]:+.4f}  row {place}  {' '.join(text.split())[:100]}")


def _passing(texts: Iterator[str], digest: Any, step: Any) -> Iterator[str]:
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
        yield text
        step(1)


def _labels(data: Path, label: str) -> Any:
    """Which rows are biased; refused where the file does not say."""
    import numpy as np

    from surgery.data.rows import label_of
    from surgery.data.texts import table

    return np.fromiter((label_of(row.get(label), label, at) for at, row in table(data)), dtype=bool)


def _at(texts: Iterator[str], places: list[int]) -> list[tuple[int, str]]:
    """The texts at these places, in the places' order."""
    wanted = set(places)
    found = {place: text for place, text in enumerate(texts) if place in wanted}
    return [(place, found[place]) for place in places]


def _show(out: Path, model: Any, tokenizer: Any, shown: Any, probe: Any, normalise: Any, cut: int) -> None:
    from dataclasses import replace

    from hooks.gradient_influence import highlighted, token_influence
    from surgery.files.atomic import write_text

    parts = token_influence(model, tokenizer, [text for _, text in shown], probe, normalise=normalise, cut=cut or None)
    placed = [replace(part, place=place) for part, (place, _) in zip(parts, shown, strict=True)]
    write_text(out, highlighted(placed, probe=len(probe.names) - 1, title="What the tokens add to the score"))


def _judge(
    json_file: Path, labels: Any, similar: Any, tested: Any, names: Any, data: str, share: float, seed: int
) -> None:
    """Coverage and precision beside the controls, printed and put into a file beside the scores."""
    import numpy as np

    from surgery.attribution.score_file import read_scores
    from surgery.attribution.select import compare, controls
    from surgery.files.atomic import write_json

    keys = (*names, "loss", "tfidf")
    columns = np.array([[row[key] for key in keys] for row in read_scores(json_file)]).T
    by = dict(zip(keys, columns, strict=True))
    methods = {name: by[name] for name in names}
    twins = None
    if tested is not None:
        (more, less), scores = tested
        twins = {name: (scores[: len(more), n], scores[len(more) :, n]) for n, name in enumerate(names)}
        twins["tfidf"] = (np.array([similar(text) for text in more]), np.array([similar(text) for text in less]))
    others = controls(by["influence"], by["loss"], by["tfidf"], seed=seed)
    compared = compare(methods, others, labels, data=data, share=share, twins=twins, seed=seed)
    for name, metrics in compared.found.items():
        print(f"{name:12}" + "".join(f"  {key} {metric}" for key, metric in metrics.items()))
    print(compared.words())
    out = json_file.with_suffix(".selection.json")
    write_json(out, {"selection": compared.to_dict(), "words": compared.words()})
    print(out)
