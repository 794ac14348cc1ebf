"""The command locate: rank the blocks of a model, and compare the rankings."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli.app import Debug, Device, JsonFile, Model, Plot, PromptSet, Quiet, command, examples
from surgery.cli.models import check_opening, import_libraries, open_model
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    epilog=examples(
        "surgery locate demo",
        "surgery locate ./checkpoint --json ranking.json --plot ranking.png",
        "surgery locate demo --by gain",
        "surgery locate ./checkpoint --by gain --objective log --retain texts.txt --limit 128",
        "surgery locate ./checkpoint --by gain --objective dpo --pairs stereoset.jsonl --sketch",
        "surgery locate demo --by all --compare --limit 32",
    )
)
def locate(
    model: Model,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="gain: where a step of the edit gains most for what it moves of neutral text; "
            "bmi: how far each block turns the stream (LFTF Eq. 4); lens: what it adds to the logit difference "
            "of the set's first two words; patching: what it restores between prompts of opposite stereotype; "
            "attribution: the same to first order; sensitivity: attention to the subject, cross-attention to the "
            "words; all.",
        ),
    ] = "bmi",
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Correlate the rankings, repeat them on two halves of the prompts, and ablate each first block.",
        ),
    ] = False,
    data: PromptSet = "genbias",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="How many prompts; default 32, 128 for gain alone, all for bmi alone."),
    ] = None,
    positions: Annotated[
        Literal["last", "all"], typer.Option("--positions", help="Of bmi: last or all prompt tokens.")
    ] = "last",
    aggregate: Annotated[Literal["mean", "sum"], typer.Option("--aggregate", help="Of bmi: mean or sum.")] = "mean",
    objective: Annotated[
        str,
        typer.Option("--objective", help="Of gain: equalize (words or pairs), log (LFTF's), npo or dpo (of pairs)."),
    ] = "equalize",
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Of gain: sentences in pairs, as StereoSet's, instead of prompts.")
    ] = None,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="Of gain: hold no number a parameter, but sums of rows and columns.")
    ] = False,
    retain: Annotated[
        Path | None, typer.Option("--retain", help="Of gain: texts that must stay, .txt or .jsonl; default neutral.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=SEEDS, help="Draws the counterparts, the halves, the random blocks.")
    ] = 0,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --compare: every ranking, correlation and ablation as well.")
    ] = False,
    json_file: JsonFile = None,
    plot: Plot = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank the blocks of a model by what they do to the prompts of a data set."""
    from surgery.catalogue import check_objective, rankings
    from surgery.data import genbias, neutral
    from surgery.data.pairs import load
    from surgery.data.prompts import load_prompt_set
    from surgery.data.rows import sample
    from surgery.files.atomic import write_bytes, write_json
    from surgery.progress import Progress

    chosen, progress = rankings(by), Progress(quiet)
    check_objective(objective, pairs=pairs is not None)
    if pairs is not None and (by != "gain" or compare):
        raise SurgeryError(f"--pairs: only gain reads pairs of sentences; got --by {by}{' --compare' * compare}")
    sentences = load(pairs).rows if pairs else ()
    prompts = load_prompt_set(data)
    every = genbias.records("profession", "train", prompts=prompts)
    retained = neutral.sentences(retain)
    check_opening(model, device)
    import_libraries()
    from surgery.locate import LIMIT, check, key, picture, rank, tables
    from surgery.locate.gain import GAIN_LIMIT, RETAIN, details, gain_of, rankings_of
    from surgery.locate.summary import picture as compared
    from surgery.locate.summary import summary
    from surgery.runs.pictures import bytes_of

    alone = by == "bmi" and not compare
    rows = every[: limit or (None if alone else GAIN_LIMIT if by == "gain" and not compare else LIMIT)]
    opened, tokenizer = open_model(model, quiet, device=device)
    of_gain: Any = {"objective": objective, "retain": retained[:RETAIN], "factored": sketch, "seed": seed}
    options = {"positions": positions, "aggregate": aggregate, **of_gain}
    found: list[Any] = []
    measured = None
    for method in chosen:
        with progress.work("rank the blocks" if alone else f"rank the blocks by {method}", len(rows)) as step:
            if method == "gain":
                given = sample(sentences, limit or GAIN_LIMIT, seed) if sentences else rows
                measured = gain_of(opened, tokenizer, prompts, given, step=step, **of_gain)
                found += rankings_of(measured)
            else:
                found += rank(opened, tokenizer, prompts, rows, method, step=step, **options)
    if not alone and not sentences:
        print(f"the first {len(rows)} of {len(every)} training prompts of {prompts.name} (--limit)\n")
    numbers: dict[str, Any] = {key(ranking): ranking.to_dict() for ranking in found}
    if compare:
        checked = check(
            opened, tokenizer, prompts, rows, chosen, found, progress=progress, measured=measured, **options
        )
        numbers |= checked.to_dict()
        print(summary(found, checked.comparison, checked.ablation, checked.others))
    if verbose or not compare:
        print(("\n" if compare else "") + tables(found) + (f"\n\n{details(measured)}" if measured else ""))
    if compare and verbose:
        print(f"\n{checked.table()}")
    if json_file:
        write_json(json_file, numbers)
    if plot:
        figure = (compared if compare and len(found) > 1 else picture)(found)
        write_bytes(plot, bytes_of(figure, plot.suffix[1:].lower()))
