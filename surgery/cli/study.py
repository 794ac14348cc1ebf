"""The command study: methods, models and seeds on one page, judged on the same rows."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.app import Debug, Device, Quiet, command, examples
from surgery.cli.models import check_opening, chosen_recipe, import_libraries
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.study.cells import Cell
    from surgery.study.taking import Source


@command(
    epilog=examples(
        "surgery study studies/quick.toml",
        "surgery study studies/full.toml --folder ./data --out runs/full --device cuda",
        "surgery study studies/full.toml --folder ./data --model demo --model ./gemma-3-270m",
        "surgery study studies/full.toml --folder ./data --take ../other-machine/runs/full",
    )
)
def study(
    file: Annotated[Path, typer.Argument(help="A study's TOML file: models, seeds, judges, and [[methods]].")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Its folder; default runs/NAME. May exist: it goes on.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Instead of the file's models; may be given several times.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="The data folder, for suites and recipes that need one.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Let several processes work on it, each on its cells.")
    ] = False,
    take: Annotated[
        list[Path] | None,
        typer.Option("--take", help="Another folder of this study, whose judged cells are copied; several times."),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run methods on models with seeds, judge all on the same rows, and say which edit to ship and what it breaks."""
    from surgery.delta import open_delta
    from surgery.delta.metadata import recipes_of
    from surgery.edits.places import PlaceError
    from surgery.progress import Progress
    from surgery.study.settings import check_names, read, refuse_seen

    asked, methods = read(file)
    if folder is not None:
        asked = asked.model_copy(update={"folder": str(folder)})
    if model:
        asked = asked.model_copy(update={"models": model})
    progress = Progress(quiet)
    modules = {one.name: chosen_recipe(one.recipe, None, [], None)[:2] for one in methods if one.recipe}
    ready = _settings(asked, methods, modules, str(file), progress)
    check_names(asked.models)
    missing = [method.delta for method in methods if method.delta and not Path(method.delta).is_file()]
    if missing:
        raise SurgeryError(f"{missing[0]}: no such delta file; expected what surgery run or diff wrote")
    for method in (one for one in methods if one.delta):
        for recipe in recipes_of(open_delta(method.delta).metadata):
            refuse_seen(asked, recipe, f"{file}, method {method.name}, {method.delta}")

    place = out or Path("runs") / file.stem
    sources, known = _taken(asked, methods, ready, take, place, progress) if take else ([], set())
    for where in (where for where in asked.models if where not in known):
        check_opening(where, device)
    for settings in (one for (_, _, where), one in ready.items() if where not in known):
        with suppress(PlaceError):  # what cannot be on one model is a row that says so
            settings.check()
    import_libraries()
    from surgery.study.carry_out import carry_out
    from surgery.study.cells import cells
    from surgery.study.judging import check_axes
    from surgery.study.made_with import refuse_other_settings

    for cell in cells(asked, methods, place):
        if cell.method and cell.method.recipe:
            refuse_other_settings(cell, ready[cell.name, cell.seed, cell.model])

    def run(cell: "Cell", opened: Any, resume: bool) -> None:
        assert cell.method is not None
        if (cell.folder / "run").exists():
            return
        settings = ready[cell.method.name, cell.seed, cell.model]
        model, tokenizer, shared = opened
        where: Any = {"out": cell.folder / "run", "resume": resume, "progress": progress, "shared": shared}
        modules[cell.method.name][0].run(model, tokenizer, settings, **where)

    def untouched(found: Any) -> None:
        from surgery.study.taking import refuse_another

        refuse_another(found, sources)
        if not found.refused:
            check_axes(asked, found.scores)

    print(carry_out(asked, methods, place, run, untouched, share=share, device=device, progress=progress))


def _settings(asked: Any, methods: Any, modules: Any, file: str, progress: Any) -> dict[tuple[str, int, str], Any]:
    """The settings of each method of a recipe for each seed and model, by these three.

    ``modules``: of each such method the recipe's module, and the values of the recipe's file.
    """
    from surgery.runs.recipe_files import build, by_new_names
    from surgery.study.settings import refuse_seen, seeds_of, settings_for

    ready: dict[tuple[str, int, str], Any] = {}
    for method in (one for one in methods if one.recipe):
        module, values = modules[method.name]
        fields, place = module.Settings.model_fields, f"{file}, method {method.name}"
        for name in sorted(set(method.by_model) - {form for path in asked.models for form in (path, Path(path).name)}):
            progress.say(f"{method.name}: no model is called {name}, so its settings are not used")
        for where in asked.models:
            changed = by_new_names(module.Settings, settings_for(method, where), place)
            shared = {"dtype": asked.dtype, "prompt_set": asked.data}
            if "data" in fields and module.Settings.reads_data(values | changed):
                shared["data"] = asked.folder
            given = {key: value for key, value in shared.items() if key in fields and value}
            for seed in seeds_of(asked, method):
                own = {**values, **given, **changed, "model": where, "seed": seed}
                ready[method.name, seed, where] = build(module.Settings, own, place)
                refuse_seen(asked, ready[method.name, seed, where].model_dump(), place)
    return ready


def _taken(
    asked: Any, methods: Any, ready: Any, folders: list[Path], out: Path, progress: Any
) -> tuple[list["Source"], set[str]]:
    """Copy the cells of ``folders`` into ``out``: what they had, and the models of which nothing is left to measure."""
    import_libraries()
    from surgery.study.judging import check
    from surgery.study.taking import look, take, unfinished, whole

    judges, _ = check(asked)
    sources = [look(asked, methods, ready, judges, folder) for folder in folders]
    left = unfinished(asked, methods, judges, sources, out)
    for source in sources:
        take(asked, methods, judges, source, out, progress, left)
    return sources, whole(asked, methods, judges, out)
