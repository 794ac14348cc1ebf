"""The commands run and list, and what commands that open a model share."""

import gc
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery import processes
from surgery.cli.app import MODEL_HELP, Debug, Device, Quiet, command, examples
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS

if TYPE_CHECKING:
    from surgery.metrics.judges import Judges
    from surgery.progress import Progress
    from surgery.runs.folder import Run
    from surgery.runs.settings import Settings


@command(
    shared=True,
    add_help_option=False,
    epilog=examples(
        "surgery run lftf --help",
        "surgery run lftf --model demo --set lr=1e-4 --out runs/first",
        "surgery run runs/first/recipe.toml --out runs/again",
        "surgery run lftf --model demo --set ablations=true --set block=25",
        "accelerate launch --num_processes 4 -m surgery run equalize --model ./checkpoint --set parts=4",
    ),
)
def run(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's name (surgery list) or a TOML file.")] = "",
    model: Annotated[str | None, typer.Option("--model", help=MODEL_HELP)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; default runs/RECIPE.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=SEEDS)] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    ledger: Annotated[
        str,
        typer.Option(
            help="Data folder on which every axis is measured without and with the edit, a few rows each. Unsaid: the "
            "run's own data; none: nowhere."
        ),
    ] = "",
    show_help: Annotated[bool, typer.Option("--help", help="This message; of a recipe, its settings too.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a whole operation: locate, edit, write the delta, apply it on disk, measure before and after, report."""
    if show_help or not recipe:
        _help(ctx, recipe, asked=show_help)
        return
    from surgery.progress import Progress
    from surgery.runs.folder import check_free
    from surgery.runs.recipe_files import build

    module, values, path = chosen_recipe(recipe, model, settings or [], seed)
    ready = build(module.Settings, values, str(path))
    folder = out or Path("runs") / path.stem
    if processes.count() > 1 and not module.Settings.shares_work:
        raise SurgeryError(
            f"{path.stem}: got {processes.count()} processes, and this recipe works in one; expected one: start it "
            "without accelerate launch"
        )
    if processes.first():
        check_free(folder, resume=resume)
    check_opening(ready.model, device, folder)
    ready.check()
    for line in ready.cautions():
        Progress(quiet).say(line)
    judges = _ledger(ledger, ready, device, Progress(quiet)) if ready.has_ledger else None
    began = time.monotonic()
    opened, tokenizer = open_model(ready.model, quiet, dtype=ready.dtype, device=device)
    where: Any = {"out": folder, "resume": resume, "progress": Progress(quiet), "opened": time.monotonic() - began}
    try:
        finished = module.run(opened, tokenizer, ready, **where)
    except KeyboardInterrupt:
        again = f"; continue with: surgery run {folder}.part/recipe.toml --out {folder} --resume"
        print(f"interrupted{again if Path(f'{folder}.part').exists() else ''}", file=sys.stderr)
        raise typer.Exit(1) from None
    _tell(finished)
    if judges is not None and (finished.folder / "delta.safetensors").is_file():
        from surgery.runs.spillover import spillover

        for line in spillover(opened, tokenizer, finished.folder, judges, progress=Progress(quiet)):
            print(line)
    print(finished.folder / "report.html")


def _tell(finished: "Run") -> None:
    """What came out, a line for each thing."""
    from surgery.runs.mechanism import said
    from surgery.runs.paired import told
    from surgery.runs.words_report import verdict

    for line in [*verdict(finished.summary), *told(finished.summary), *said(finished.summary)]:
        print(line)


def _ledger(asked: str, settings: "Settings", device: str | None, progress: "Progress") -> "Judges | None":
    """The judges of the spillover ledger, or None where it is not measured; those without their data are named.

    On a processor of fewer rows, since there the full quick form takes longer than many a run.
    """
    folder = asked or getattr(settings, "data", "")
    if asked == "none" or processes.count() > 1 or not folder:
        return None
    from surgery.devices import device_named
    from surgery.metrics.judges import ledger
    from surgery.metrics.ledger import BRIEF

    asking: Any = {"split_seed": settings.split_seed} if hasattr(settings, "split_seed") else {}
    judges, missing = ledger(folder, rows=BRIEF if device_named(device).type == "cpu" else {}, **asking)
    for name, reason in missing.items():
        progress.say(f"ledger: without {name}: {reason}")
    return judges


@command(name="list", epilog=examples("surgery list"))
def list_(debug: Debug = False) -> None:
    """Show the recipes, metrics and data sets, and which of them are ready here."""
    from surgery.catalogue import SUITES, WRITTEN_SUITES, folder_suites
    from surgery.data.prompts import SHIPPED

    try:
        from surgery.files.converted import demo_gguf

        demo = f"ready ({demo_gguf().name})"
    except SurgeryError as error:
        demo = str(error)
    for title, rows in (
        ("recipes", {name: _first_comment(_recipes()[name]) for name in sorted(_recipes())}),
        ("metrics", dict.fromkeys(SUITES, "ready") | WRITTEN_SUITES),
        ("metrics that need --data FOLDER", folder_suites()),
        ("data sets", dict.fromkeys(SHIPPED, "ready") | {"neutral": "ready"}),
        ("models", {"demo": demo}),
    ):
        print(title)
        for name, text in rows.items():
            print(f"  {name:16} {text}")


def _help(ctx: typer.Context, recipe: str, *, asked: bool) -> None:
    """The command's help and, of a named recipe, every setting with its type, default and meaning."""
    from surgery.runs.explain import explain

    if not asked:
        ctx.fail("Missing argument 'recipe': a recipe's name (surgery list) or a TOML file.")
    print(ctx.get_help())
    if not recipe:
        return
    module, values, path = chosen_recipe(recipe, None, [], None)
    print(f"\nSettings of {path.stem} (--set KEY=VALUE):\n")
    for key, kind, default, text in explain(module.Settings):
        own = json.dumps(values[key]) if key in values else default
        print(f"  {key} = {own}  ({kind})" + (f"\n      {text}" if text else ""))


def check_opening(model: str, device: str | None, out: Path | None = None) -> None:
    """Refuse, without torch, a model that is not there, a device that is none and an ``out`` inside the model."""
    from surgery.catalogue import check_device
    from surgery.files.converted import check_model
    from surgery.runs.folder import check_apart

    check_device(None if device == "all" else device)
    check_model(model)
    if out and Path(model).is_dir():
        check_apart(out, Path(model))


def import_libraries() -> None:
    """Import what opens a model; a command calls it once its words are checked, before whatever else needs torch.

    The libraries' million objects live to the end: the collector neither looks at them while they are made nor ever
    after, which takes two seconds off every command, half of them at its end.
    """
    if "surgery.checkpoints" in sys.modules:
        return
    gc.disable()
    try:
        import surgery.checkpoints
    finally:
        gc.enable()
    gc.freeze()
    surgery.devices.keep_freed_memory()


def without_bars(quiet: bool = False) -> None:
    """From here on the libraries' own bars stand on terminals alone."""
    import_libraries()
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def open_model(spec: str, quiet: bool, **options: Any) -> Any:
    """``surgery.load``, ``without_bars``."""
    without_bars(quiet)
    from surgery.checkpoints import load

    return load(spec, **options)


def chosen_recipe(
    recipe: str, model: str | None, pairs: list[str], seed: int | None
) -> tuple[Any, dict[str, Any], Path]:
    """The recipe's module; its TOML file's values with ``--set``, ``--model`` and ``--seed`` over them; the file."""
    from importlib import import_module

    from surgery.runs.recipe_files import by_new_names, parse_set, read_toml

    path = _recipe_file(recipe)
    values = read_toml(path)
    name = values.pop("recipe", None)
    if name not in _recipe_modules():
        raise SurgeryError(
            f"{path}: recipe = {name!r}; expected one of {', '.join(_recipe_modules())}; name the recipe to run"
        )
    module = import_module(f"recipes.{name}")
    values = by_new_names(module.Settings, values, str(path))
    values |= by_new_names(module.Settings, parse_set(pairs), "--set")
    values |= {key: value for key, value in (("model", model), ("seed", seed)) if value is not None}
    return module, values, path


def _recipes() -> dict[str, Path]:
    from importlib.resources import files

    folder = Path(str(files("recipes")))
    return {path.stem: path for path in folder.glob("*.toml")}


def _recipe_modules() -> list[str]:
    """Every recipe, a file or a package: what stands in the folder is the registry."""
    from importlib.resources import files

    folder = Path(str(files("recipes")))
    found = [*folder.glob("[!_]*.py"), *(file.parent for file in folder.glob("[!_]*/__init__.py"))]
    return sorted(path.stem for path in found)


def _recipe_file(recipe: str) -> Path:
    if recipe in _recipes():
        return _recipes()[recipe]
    if Path(recipe).is_file():
        return Path(recipe)
    import difflib

    near = difflib.get_close_matches(recipe, _recipes(), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(_recipes()))}, or a TOML file"
    raise SurgeryError(f"recipe {recipe!r}: no such recipe or file; {hint}")


def _first_comment(path: Path) -> str:
    return path.read_text("utf-8").splitlines()[0].lstrip("# ")
