"""The command survive: how much of an edit's effect is left after formats, training, merging and prompts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, Device, Quiet, command, examples, local
from surgery.cli.dose import as_stored
from surgery.cli.models import check_opening, import_libraries, open_model
from surgery.seeds import SEEDS


@command(
    epilog=examples(
        "surgery survive runs/demo/delta.safetensors demo --out survive",
        "surgery survive delta.safetensors ./checkpoint --treatment formats --out survive",
        "surgery survive delta.safetensors ./checkpoint --pairs data/stereoset/dev.json --out survive",
        "surgery survive delta.safetensors ./checkpoint --texts mine.txt --steps 1000 --out survive",
    )
)
def survive(
    delta: Annotated[Path, typer.Argument(help="The delta file, ours or foreign (surgery diff, surgery import).")],
    checkpoint: Annotated[str, typer.Argument(help=f"What it is put on, in memory. {MODEL_HELP}")],
    out: Annotated[Path, typer.Option("--out", help="The new folder for survive.json, survive.html and the picture.")],
    treatment: Annotated[
        list[str] | None, typer.Option("--treatment", help="formats, training or prompts; default: all three.")
    ] = None,
    measure: Annotated[
        str, typer.Option("--measure", help="words (the relative gap), pairs (the margin), auto: as the recipe edited.")
    ] = "auto",
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Of pairs: StereoSet's .json, CrowS-Pairs' .csv or your .jsonl.")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="Of words: the prompt set; default: the recipe's.")] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, help="So many prompts (default 105) or pairs (all); 0 for all.")
    ] = None,
    scorer: Annotated[str, typer.Option("--scorer", help="Of pairs.")] = "bias-bench",
    texts: Annotated[
        Path | None, typer.Option("--texts", help="To fine-tune on, a line each; default: the shipped neutral ones.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of fine-tuning.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Of the trainings.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Also on a distant relative of the base.")] = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what is left of an edit in other formats, after training and merging, and under prompts against it.

    Weights change in memory only. The untouched model gets every treatment, too, and the edit's effect is the
    difference between the two.
    """
    from surgery.catalogue import TREATMENTS, check_measure, check_scorer, check_treatments
    from surgery.data import neutral
    from surgery.data.pairs import load
    from surgery.data.prompts import load_prompt_set
    from surgery.delta import Delta, open_delta
    from surgery.files.atomic import check_destination

    check_destination(out)
    open_delta(delta)
    check_treatments(treatment or TREATMENTS)
    check_measure(measure)
    check_scorer(scorer)
    if data:
        load_prompt_set(data)
    sentences = load(pairs) if pairs else None
    check_opening(checkpoint, device)
    import_libraries()
    from surgery.progress import Progress
    from surgery.survive import check_kind, kind_of, prompts_of, question_of, report
    from surgery.survive import survive as measured

    edit, progress, lines = Delta.load(delta), Progress(quiet), neutral.sentences(texts)
    check_kind(edit)
    kind = kind_of(edit.metadata, measure, sentences)
    data = data or (prompts_of(edit.metadata) if kind == "words" else "")
    model, tokenizer = open_model(checkpoint, quiet, device=device)
    amount = {"words": 105, "pairs": 0} if limit is None else {"words": limit, "pairs": limit}
    question = question_of(
        edit.metadata, model, tokenizer, kind=kind, sentences=sentences, prompts=data, limit=amount, scorer=scorer
    )
    found = measured(
        edit,
        model,
        tokenizer,
        question,
        texts=lines,
        steps=steps,
        groups=treatment or TREATMENTS,
        as_stored=as_stored(edit, local(checkpoint), progress),
        force=force,
        seed=seed,
        progress=progress,
    )
    for line in report.lines(found):
        print(line)
    print(report.verdict(found))
    about = {"delta": str(delta), "checkpoint": checkpoint, "steps": steps, "seed": seed}
    _write(out, found, about)
    print(out / "survive.html")


def _write(out: Path, found: Any, about: dict[str, Any]) -> None:
    """The numbers, the page and its picture, in the new folder ``out``."""
    from surgery.files.atomic import publish, temporary, write_json
    from surgery.runs.report import page, save
    from surgery.survive import report

    delta, checkpoint = about["delta"], about["checkpoint"]
    text, pictures = page(
        title="What is left of the edit",
        lines=[f"{delta} on {checkpoint}, in memory.", report.verdict(found), *found.notes],
        tables=[report.table(found)],
        figures={"survive": report.picture(found)},
        commands=[f"surgery survive {delta} {checkpoint} --out again"],
    )
    with temporary(out, folder=True) as part:
        write_json(part / "survive.json", about | report.to_dict(found))
        save(part / "survive.html", text, pictures)
        publish(part, out)
