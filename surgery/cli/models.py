"""Commands that open a model: locate, run, list."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, Device, JsonFile, Model, Quiet, command, examples
from surgery.errors import SurgeryError


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
    data: Annotated[
        str, typer.Option("--data", help="Prompt set: genbias, race, or a .toml / .json file.")
    ] = "genbias",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="How many prompts; default 32, 128 for gain alone, all for bmi alone."),
    ] = None,
    positions: Annotated[str, typer.Option("--positions", help="Of bmi: last or all prompt tokens.")] = "last",
    aggregate: Annotated[str, typer.Option("--aggregate", help="Of bmi: mean or sum.")] = "mean",
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
    seed: Annotated[int, typer.Option("--seed", help="Draws the counterparts, the halves, the random blocks.")] = 0,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --compare: every ranking, correlation and ablation as well.")
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a picture to this PNG file.")] = None,
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
    from surgery.files.atomic import write_json
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
    from surgery.locate import LIMIT, check, key, picture, rank, tables
    from surgery.locate.gain import GAIN_LIMIT, RETAIN, details, gain_of, rankings_of
    from surgery.locate.summary import picture as compared
    from surgery.locate.summary import summary

    alone = by == "bmi" and not compare
    rows = every[: limit or (None if alone else GAIN_LIMIT if by == "gain" and not compare else LIMIT)]
    opened, tokenizer = open_model(model, quiet, device=device)
    of_gain: Any = {"objective": objective, "retain": retained[:RETAIN], "factored": sketch, "seed": seed}
    options = {"positions": positions, "aggregate": aggregate, **of_gain}
    found: list[Any] = []
    said = ""
    for method in chosen:
        with progress.work("rank the blocks" if alone else f"rank the blocks by {method}", len(rows)) as step:
            if method == "gain":
                given = sample(sentences, limit or GAIN_LIMIT, seed) if sentences else rows
                measured = gain_of(opened, tokenizer, prompts, given, step=step, **of_gain)
                found, said = found + rankings_of(measured), f"\n\n{details(measured)}"
            else:
                found += rank(opened, tokenizer, prompts, rows, method, step=step, **options)
    if not alone and not sentences:
        print(f"the first {len(rows)} of {len(every)} training prompts of {prompts.name} (--limit)\n")
    numbers: dict[str, Any] = {key(ranking): ranking.to_dict() for ranking in found}
    if compare:
        checked = check(opened, tokenizer, prompts, rows, chosen, found, progress=progress, **options)
        numbers |= checked.to_dict()
        print(summary(found, checked.comparison, checked.ablation, checked.others))
    if verbose or not compare:
        print(("\n" if compare else "") + f"{tables(found)}{said}")
    if compare and verbose:
        print(f"\n{checked.table()}")
    if json_file:
        write_json(json_file, numbers)
    if plot:
        (compared if compare and len(found) > 1 else picture)(found).savefig(plot, dpi=130)


@command(
    add_help_option=False,
    epilog=examples(
        "surgery run lftf --help",
        "surgery run lftf --model demo --set lr=1e-4 --out runs/first",
        "surgery run runs/first/recipe.toml --out runs/again",
        "surgery run lftf --model demo --set ablations=true --set block=25",
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
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    show_help: Annotated[bool, typer.Option("--help", help="This message; of a recipe, its settings too.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a whole operation: locate, edit, write the delta, apply it on disk, measure before and after, report."""
    if show_help or not recipe:
        _help(ctx, recipe, asked=show_help)
        return
    from surgery.progress import Progress
    from surgery.runs.mechanism import said
    from surgery.runs.settings import build
    from surgery.runs.words_report import verdict

    module, values, path = chosen_recipe(recipe, model, settings or [], seed)
    ready = build(module.Settings, values, str(path))
    folder = out or Path("runs") / path.stem
    # Every process of a distributed run computes the same; the first one writes, the others into a scratch folder.
    if int(os.environ.get("RANK", "0")) > 0:
        quiet, folder, resume = True, Path(tempfile.mkdtemp()) / "run", False
    from surgery.runs.folder import check_free

    check_free(folder, resume=resume)
    check_opening(ready.model, device)
    ready.check()
    for line in ready.cautions():
        Progress(quiet).say(line)
    began = time.monotonic()
    opened, tokenizer = open_model(ready.model, quiet, dtype=ready.dtype, device=device)
    where: Any = {"out": folder, "resume": resume, "progress": Progress(quiet), "opened": time.monotonic() - began}
    try:
        finished = module.run(opened, tokenizer, ready, **where)
    except KeyboardInterrupt:
        again = f"surgery run {folder}.part/recipe.toml --out {folder} --resume"
        print(
            f"interrupted; continue with: {again}" if Path(f"{folder}.part").exists() else "interrupted",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    for line in [*verdict(finished.summary), *said(finished.summary)]:
        print(line)
    print(finished.folder / "report.html")


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


def check_opening(model: str, device: str | None) -> None:
    """Refuse, without torch, a model that is not there and a device that is none; call it before heavy imports."""
    from surgery.catalogue import check_device
    from surgery.files.converted import check_model

    check_device(device)
    check_model(model)


def open_model(spec: str, quiet: bool, **options: Any) -> Any:
    """``surgery.load``; the libraries' own bars are for terminals."""
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
    from surgery.checkpoints import load

    return load(spec, **options)


def chosen_recipe(
    recipe: str, model: str | None, pairs: list[str], seed: int | None
) -> tuple[Any, dict[str, Any], Path]:
    """The recipe's module; its TOML file's values with ``--set``, ``--model`` and ``--seed`` over them; the file."""
    from importlib import import_module

    from surgery.runs.settings import by_new_names, parse_set, read_toml

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
