"""Commands on a gradient index: ``surgery attribute build``, ``query`` and ``select``."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli.app import Debug, Device, JsonFile, Model, Quiet, command, examples
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

IndexDir = Annotated[Path, typer.Argument(metavar="INDEX", help="A directory that surgery attribute build wrote.")]
Contrast = Annotated[
    bool, typer.Option("--contrast", help="Probe with the texts minus their twins, so that style cancels.")
]


@command(
    attribute,
    shared=True,
    epilog=examples(
        "surgery attribute build demo --data mixture.jsonl --out index --targets q_proj,v_proj",
        "surgery attribute build ./checkpoint --adapter ./lora --data mixture.jsonl --out index --resume",
        "torchrun --nproc-per-node 8 -m surgery.cli attribute build ./checkpoint --adapter ./lora --data big.jsonl "
        "--out index --dtype bfloat16",
    ),
)
def build(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The index; must not exist.")],
    adapter: Adapter = None,
    column: Column = "text",
    targets: Annotated[str, typer.Option("--targets", help="Only layers whose names end so: a,b. Default all.")] = "",
    projection: Annotated[str, typer.Option("--projection", help="count_sketch or rademacher.")] = "count_sketch",
    dim: Annotated[int, typer.Option("--dim", min=1, help="Numbers kept of a gradient.")] = 8192,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Of the projection.")] = 0,
    rows: Annotated[
        Literal["float16", "float32"], typer.Option("--rows", help="How the numbers are stored.")
    ] = "float16",
    shard: Annotated[int, typer.Option("--shard", min=1, help="Texts in a file; a kill loses less than them.")] = 256,
    cut: Annotated[
        int, typer.Option("--cut", min=0, help="Only the first tokens of longer texts; 0 refuses them.")
    ] = 0,
    batch_tokens: Tokens = 2048,
    dtype: Weights = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted build, if there is one.")] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Store the projected gradient of every text, for queries with any probe later."""
    from surgery.data.texts import Columns, stream
    from surgery.progress import Progress

    texts = Columns(text=column, prompt="", answer="")
    stream(data, columns=texts)  # refused before the model is opened
    check_opening(model, device)
    import_libraries()
    from accelerate import PartialState

    from surgery.attribution.build import build as build_index
    from surgery.attribution.random_projection import RandomProjection
    from surgery.attribution.source import Source

    chosen = RandomProjection(projection, dim, seed)
    state = PartialState() if "WORLD_SIZE" in os.environ else None  # sets this process's own device
    opened, tokenizer = open_adapted(model, adapter, quiet, dtype, device)
    names = tuple(name.strip() for name in targets.split(",") if name.strip()) or None
    source = Source(opened, tokenizer, chosen, targets=names, cut=cut or None, batch_tokens=batch_tokens)
    progress = Progress(quiet or (state is not None and not state.is_main_process))
    options: dict[str, Any] = {"shard": shard, "dtype": rows, "resume": resume}
    if state is not None:
        options |= {"process": (state.process_index, state.num_processes), "wait": state.wait_for_everyone}
    with progress.work("read the texts", None) as step:
        total = sum(1 for _ in stream(data, columns=texts))
        step(total)
    with progress.work("project the gradients", total) as step:
        again = lambda: (example.answer for example in stream(data, columns=texts))  # noqa: E731
        build_index(out, again, source, step=step, **options)
    if state is None or state.is_main_process:
        print(f"{out}: {total:,} texts, {dim:,} numbers each ({rows})")


@command(
    attribute,
    epilog=examples(
        "surgery attribute query index demo --probe probe.jsonl --data mixture.jsonl",
        "surgery attribute query index ./checkpoint --adapter ./lora --probe probe.jsonl --contrast --json scores.json",
    ),
)
def query(
    index: IndexDir,
    model: Model,
    probe: ProbeFile,
    adapter: Adapter = None,
    contrast: Contrast = False,
    normalise: Normalise = "cosine",
    top: Annotated[int, typer.Option("--top", min=1, help="How many texts to print.")] = 20,
    data: Annotated[Path | None, typer.Option("--data", help="The indexed texts, to print them.")] = None,
    column: Column = "text",
    json_file: JsonFile = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file's sha256 first.")] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank the texts of an index by how far their gradients point along a probe's."""
    import numpy as np

    from surgery.attribution.index import open_index
    from surgery.files.atomic import write_json

    found = open_index(index)
    if verify:
        found.verify()
    texts, twins = read_probe(probe)
    _contrasted(contrast, twins, probe)
    found.refuse_overlap([*texts, *twins])
    source = _source(found, model, adapter, quiet, device)
    vector, scale = source.probe(texts, contrast=twins if contrast else None)
    scores = found.scores(vector, scale=scale, normalise=normalise)
    order = np.lexsort((np.arange(len(scores)), -scores))[:top]
    shown = _texts_at(found, data, column, order.tolist()) if data else {}
    for rank, place in enumerate(order.tolist(), 1):
        print(f"{rank:4} {scores[place]:+.4f}  row {place}" + (f"  {shown[place][:100]}" if shown else ""))
    if json_file:
        losses, norms = (found.column(name).tolist() for name in ("loss", "norm"))
        made = {"index": str(index), "probe": str(probe), "contrast": contrast, "normalise": normalise}
        write_json(json_file, made | {"scores": scores.tolist(), "losses": losses, "norms": norms})


@command(
    attribute,
    epilog=examples(
        "surgery attribute select index demo --probe probe.jsonl --data mixture.jsonl --top 0.35 --out selected.jsonl",
        "surgery attribute select index demo --probe probe.jsonl --data mixture.jsonl --top 0.35 --twins test.jsonl "
        "--out selected.jsonl --rest rest.jsonl --json selection.json",
    ),
)
def select(
    index: IndexDir,
    model: Model,
    probe: ProbeFile,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The selected rows, .jsonl; must not exist.")],
    rest: Annotated[Path | None, typer.Option("--rest", help="The other rows, .jsonl, to train on again.")] = None,
    top: Annotated[float, typer.Option("--top", help="The share of the rows to select.")] = 0.0,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Or all with at least this score.")] = None,
    twins: Annotated[
        Path | None, typer.Option("--twins", help="Pairs (text, anti) of neither data nor probe, for the twin test.")
    ] = None,
    label: Annotated[str, typer.Option("--label", help="The column that says which rows are biased.")] = "biased",
    column: Column = "text",
    adapter: Adapter = None,
    contrast: Contrast = False,
    normalise: Normalise = "cosine",
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Of the controls, ties and intervals.")] = 0,
    json_file: JsonFile = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Select texts by their score; where labels are known, print what was found beside every cheap control."""
    from surgery.attribution.index import open_index
    from surgery.attribution.report import against_controls, twin_scores, write_selected
    from surgery.attribution.select import select as take
    from surgery.files.atomic import check_destination, write_json

    for path in (out, rest):
        if path is not None:
            check_destination(path)
    if rest is not None and rest.resolve() == out.resolve():
        raise SurgeryError(f"--rest {rest}: is --out as well; give the other rows a file of their own")
    found = open_index(index)
    texts, antis = read_probe(probe)
    _contrasted(contrast, antis, probe)
    found.refuse_overlap([*texts, *antis])
    pairs = _twins(found, twins, [*texts, *antis]) if twins else ([], [])
    source = _source(found, model, adapter, quiet, device)
    vector, scale = source.probe(texts, contrast=antis if contrast else None)
    scores = found.scores(vector, scale=scale, normalise=normalise)
    chosen = take(scores, share=top, threshold=threshold, seed=seed)
    method = "contrast" if contrast else "influence"
    by_twin = twin_scores(source, vector, scale, *pairs, normalise=normalise) if twins else None
    compared = against_controls(
        found, data, column, label, {method: scores}, texts, share=top, threshold=threshold, seed=seed,
        pairs=pairs if twins else None, twins={method: by_twin} if by_twin else None,
    )  # fmt: skip
    if compared is None:
        words = f"{data} has no column {label!r}, so what was found cannot be counted; name it with --label"
    else:
        words = compared.words()
        for name, metrics in compared.found.items():
            print(f"{name:12}" + "".join(f"  {key} {metric}" for key, metric in metrics.items()))
    print(words)
    if json_file:
        write_json(json_file, {"selection": compared.to_dict() if compared else {}, "words": words})
    counts = write_selected(data, column, found, chosen, out, rest)
    print(f"{out}: {counts:,} of {len(found):,} rows")


def _contrasted(wanted: bool, twins: list[str], path: Path | None) -> None:
    if wanted and not twins:
        raise SurgeryError(f"{path}: holds no twins; expected pairs with the columns text and anti")


def _twins(found: Any, file: Path, probe: list[str]) -> tuple[list[str], list[str]]:
    """The pairs of the twin test, of which no text is indexed or of the probe."""
    pairs = read_probe(file)
    _contrasted(True, pairs[1], file)
    found.refuse_overlap([*pairs[0], *pairs[1]], "twin test")
    if shared := set(probe).intersection([*pairs[0], *pairs[1]]):
        raise SurgeryError(f"{file}: {min(shared)[:60]!r} is also a text of the probe; test on other pairs")
    return pairs


def _source(found: Any, model: str, adapter: Path | None, quiet: bool, device: str | None) -> Any:
    """The model of the index, looked at as the index was; refused where it is another."""
    from surgery.attribution.random_projection import RandomProjection
    from surgery.attribution.source import Source

    made = found.manifest
    opened, tokenizer = open_adapted(model, adapter, quiet, made["dtype"], device)
    source = Source(
        opened,
        tokenizer,
        RandomProjection(**made["projection"]),
        targets=None if made["targets"] is None else tuple(made["targets"]),
        loss=made["loss"],
        cut=made["cut"],
        batch_tokens=made["batch_tokens"],
    )
    found.check(source.describe())
    return source


def _texts_at(found: Any, data: Path, column: str, places: list[int]) -> dict[int, str]:
    from surgery.attribution.report import rows_of

    wanted = set(places)
    return {place: text for place, text, _ in rows_of(found, data, column) if place in wanted}
