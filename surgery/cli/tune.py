"""The command tune: find the settings of a recipe for a model by trying some, and write them as a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import Debug, Device, Model, Quiet, command, examples
from surgery.cli.models import check_opening, chosen_recipe, open_model
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    epilog=examples(
        "surgery tune demo",
        "surgery tune ./checkpoint --out runs/tune --texts all",
        "surgery tune ./checkpoint --recipe equalize --set prompt_set=age.toml",
    )
)
def tune(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", help="What is tuned: a recipe's name (surgery list) or a TOML file.")
    ] = "equalize",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of all candidates.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write; default runs/tune.")] = None,
    texts: Annotated[
        str,
        typer.Option(
            "--texts",
            help="What finalists, and then the tuned recipe, train on: few, for minutes on two cores; all, "
            "the recipe's own.",
        ),
    ] = "few",
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=SEEDS)] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted tuning in --out.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Try places and rates on development parts, and write the best setting as a recipe with the reason.

    Bias, cost and locality of each setting stand on the page that it leaves. No test part is looked at: the recipe's
    run measures that.
    """
    from surgery.progress import Progress
    from surgery.runs.folder import check_free
    from surgery.runs.recipe_files import build

    if texts not in ("few", "all"):
        raise SurgeryError(f"--texts {texts}: expected few or all")
    module, values, path = chosen_recipe(recipe, model, settings or [], seed)
    if "tune" not in dir(module):
        raise SurgeryError(f"--recipe {recipe}: has nothing that could be tuned; expected equalize or a file of it")
    ready = build(module.Settings, values, str(path))
    ready.check()
    ready.check_tuning()
    folder = out or Path("runs") / "tune"
    check_free(folder, resume=resume)
    check_opening(ready.model, device, folder)
    opened, tokenizer = open_model(ready.model, quiet, dtype=ready.dtype, device=device)
    again = f"surgery tune {model} --recipe {{recipe}} --out {{out}} --resume --texts {texts}"
    where: Any = {"out": folder, "resume": resume, "progress": Progress(quiet), "again": again}
    found = module.tune(opened, tokenizer, ready, few=texts == "few", **where)
    for line in found.lines:
        print(line)
    print(found.folder / "report.html")
    print(found.recipe)
