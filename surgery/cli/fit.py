"""The command fit: scale the tensors of a delta for a fine-tuned child of its base, and write the fitted delta."""

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.app import MODEL_HELP, Debug, Device, PromptSet, Quiet, command, examples
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
    data: PromptSet = "genbias",
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS, help="Draws the held prompts.")] = 0,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose a scale for each tensor at which the words come even on the child's development prompts.

    What is settled (hints, facts of gender, things; training prompts) is held at what the child says untouched. Nothing
    is trained: each scale is moved once, and the answer taken as linear. Measure the result on the test part (eval).
    """
    from surgery.data.prompts import load_prompt_set
    from surgery.delta import Delta
    from surgery.files.atomic import check_destination
    from surgery.progress import Progress
    from surgery.runs.fitting import fitted, together

    check_destination(out, overwrite=False)
    prompts, edit = load_prompt_set(data), Delta.load(delta)
    if edit.kind == "module":
        raise SurgeryError(f"{delta}: a delta of kind 'module' holds new parts, which have no scale; expected another")
    check_opening(checkpoint, device)
    progress = Progress(quiet)
    model, tokenizer = open_model(checkpoint, quiet, device=device)
    with progress.work("answers to the scales", len(together(edit)) + 2) as step:
        found, fit = fitted(edit, model.float(), tokenizer, prompts, seed=seed, step=step)
    low, high = min(fit.scales.values()), max(fit.scales.values())
    print(f"scales {low:.2f} to {high:.2f}; uneven shares {fit.given:.4f} at scale 1, foretold {fit.foretold:.4f}")
    print(f"{out}: {len(found.shapes)} tensors, sha256 {found.save(out)}")
