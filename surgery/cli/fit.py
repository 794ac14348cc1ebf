"""The command fit: scale the parts of a delta for a fine-tuned child of its base, and write the fitted delta."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, Device, Quiet, command, examples
from surgery.cli.models import check_opening, open_model
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    epilog=examples(
        "surgery fit delta.safetensors ./child --out fitted.safetensors",
        "surgery apply fitted.safetensors ./child --out edited --force",
    )
)
def fit(
    delta: Annotated[Path, typer.Argument(help="The delta file of an edit of the child's parent.")],
    checkpoint: Annotated[str, typer.Argument(help=f"The child, measured in memory. {MODEL_HELP}")],
    out: Annotated[Path, typer.Option("--out", help="The delta file to write.")],
    data: Annotated[
        str, typer.Option("--data", help="Prompt set. Unsaid: the one that the delta was made with, or genbias.")
    ] = "",
    hold: Annotated[
        float, typer.Option("--hold", min=0, help="Weight of what is held, beside 1 of what is to come even.")
    ] = 1.0,
    components: Annotated[
        int,
        typer.Option("--components", min=0, help="Singular components of a matrix with a scale of their own; 0: none."),
    ] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Draws the held prompts.")] = 0,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose a scale for each part of each matrix at which the words come even on the child's development prompts.

    What is settled (hints, facts of gender, things; training prompts) is held at what the child says untouched. Nothing
    is trained: how the answers change with each scale is computed, and least squares finds the scales. The table is
    measured on the child's test prompts, of professions that the scales have not seen.
    """
    from surgery.data.prompts import load_prompt_set
    from surgery.delta import Delta
    from surgery.delta.metadata import recipes_of
    from surgery.files.atomic import check_destination
    from surgery.metrics.judges import split_seed_of
    from surgery.progress import Progress
    from surgery.runs.fitting import first_block, fitted
    from surgery.runs.fitting_report import measured
    from surgery.runs.fitting_tasks import equal_words
    from surgery.survive.question import is_of_pairs, prompts_of

    if not math.isfinite(hold):
        raise SurgeryError(f"--hold {hold}: expected a finite number, 0 or more; 1 counts as much as what comes even")
    check_destination(out, overwrite=False)
    edit = Delta.load(delta)
    if any(map(is_of_pairs, recipes_of(edit.metadata))) and not data:
        raise SurgeryError(
            f"{delta}: an edit of pairs of sentences, and the scales are chosen on words; expected an edit of words; "
            "put it on with the --scale that surgery dose finds, or name the words' prompt set with --data"
        )
    prompts = load_prompt_set(data or prompts_of(edit.metadata))
    if edit.kind == "module":
        raise SurgeryError(f"{delta}: a delta of kind 'module' holds new parts, which have no scale; expected another")
    check_opening(checkpoint, device)
    progress = Progress(quiet)
    model, tokenizer = open_model(checkpoint, quiet, device=device)
    model = model.float()
    start = first_block(edit, model)
    # As the delta's own recipe cut the set: of the test part neither it nor the scales have seen a word.
    at: Any = {"start": start, "split_seed": split_seed_of(edit.metadata), "progress": progress}
    task = equal_words(model, tokenizer, prompts, seed=seed, hold=hold, **at)
    found, chosen = fitted(edit, model, task, components=components, progress=progress)
    rows = measured(model, tokenizer, prompts, {"as it is": edit, "fitted": found}, **at)
    print(f"{'child, test part':34} {'untouched':>18} {'as it is':>18} {'fitted':>18}")
    for place, cells in rows.items():
        print(f"{place:34} " + " ".join(f"{cell:>18}" for cell in cells))
    low, high = chosen.scales.min(), chosen.scales.max()
    shares = f"uneven shares {chosen.given:.4f} as it is, {chosen.found:.4f} fitted (dev)"
    print(f"{len(chosen.scales)} scales, {low:.2f} to {high:.2f}; {shares}")
    print(f"{out}: {len(found.shapes)} tensors, sha256 {found.save(out)}")
