"""Commands over several runs: sweep makes them, compare puts finished ones side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, Device, JsonFile, Quiet, command, examples, to_write
from surgery.cli.models import check_opening, chosen_recipe, open_model
from surgery.errors import SurgeryError

Only = Annotated[
    list[str] | None, typer.Option("--metric", help="Only metrics whose place starts so, such as gas; default all.")
]
Pareto = Annotated[
    str | None,
    typer.Option("--pareto", help="BIAS,COST: the two metrics of the picture; default: what the recipe named."),
]
Html = Annotated[Path | None, to_write("--html", "Write the table and the picture to this HTML file.")]


@command(
    epilog=examples(
        "surgery sweep crawd --set data=DIR --vary decay=0.1,0.2,0.3,0.4 --out runs/decay",
        "surgery sweep crawd --set data=DIR --vary method=vanilla,crawd --vary seed=0,1,2 --out runs/methods",
    )
)
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (surgery list) or a TOML file.")],
    out: Annotated[Path, typer.Option("--out", help="The folder that gets a folder for every run.")],
    vary: Annotated[
        list[str] | None, typer.Option("--vary", metavar="KEY=V1,V2,...", help="A setting and its values; repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help=MODEL_HELP)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of all runs.")
    ] = None,
    only: Only = None,
    pareto: Pareto = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a recipe for every combination of some settings; the same command again goes on where it stopped.

    Runs that are finished are skipped, and an interrupted one is taken up; the ranking and the measurement before are
    shared where nothing that they depend on differs. At the end compare.html stands beside them.
    """
    from surgery.progress import Progress
    from surgery.runs.sharing import Shared
    from surgery.runs.sweep import parse_vary
    from surgery.runs.sweep import sweep as run_all

    module, values, _ = chosen_recipe(recipe, model, settings or [], None)
    check_opening(str(values.get("model", "demo")), device)
    progress = Progress(quiet)
    opened: dict[tuple[str, str], Any] = {}

    def run(ready: Any, folder: Path, resume: bool) -> None:
        key = (ready.model, ready.dtype)
        if key not in opened:
            opened.clear()  # one model at a time
            opened[key] = *open_model(ready.model, quiet, dtype=ready.dtype, device=device), Shared()
        live, tokenizer, shared = opened[key]
        module.run(live, tokenizer, ready, out=folder, resume=resume, progress=progress, shared=shared)

    name = module.__name__.rpartition(".")[2]
    folders = run_all(module.Settings, name, values, parse_vary(vary or []), out, run, progress=progress)
    _show(folders, only or [], pareto, out / "compare.html", None)


@command(
    epilog=examples(
        "surgery compare runs/first runs/second",
        "surgery compare runs/decay/* --metric gas --metric perplexity --html decay.html",
        "surgery compare runs/a runs/b --pareto genbias.relative_gap.all,perplexity --html front.html",
    )
)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, of one recipe or several.")],
    html: Html = None,
    only: Only = None,
    pareto: Pareto = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side: what differs, every metric with its interval, the mean over seeds."""
    folders = [path for path in runs if not path.is_file()]  # of a sweep's folder with *: its own compare.html
    if not folders:
        raise SurgeryError(f"{runs[0]}: is a file; give the folders of finished runs")
    _show(folders, only or [], pareto, html, json_file)


def _show(folders: list[Path], only: list[str], pareto: str | None, html: Path | None, json_file: Path | None) -> None:
    from dataclasses import asdict

    from surgery.files.atomic import write_bytes, write_json, write_text
    from surgery.runs.compare import axis, cases, differing, read_run, table
    from surgery.runs.compare import pareto as picture
    from surgery.runs.report import page

    runs = [read_run(folder) for folder in folders]
    found = cases(runs)
    shown = table(found, only=only)
    for case in sorted(found, key=lambda case: not case.reference):
        print(f"{case.name} ({case.count})")
        for path, metric in case.scores.items():
            if not only or path.startswith(tuple(only)):
                print(f"  {path:40} {metric['value']:10.4f}  [{metric['low']:.4f}, {metric['high']:.4f}]")
    named = pareto.split(",") if pareto else runs[0].summary.get("pareto", [])
    if len(named) not in (0, 2):
        raise SurgeryError(f"--pareto {pareto!r}: expected BIAS,COST, for example --pareto gas,perplexity")
    places = [place for case in found for place in case.scores]
    figures = {"pareto": picture(found, *(axis(places, name.strip()) for name in named))} if named else {}
    if html:
        keys = ", ".join(differing(runs)) or "nothing"
        lines = [f"{len(runs)} runs; what differs between their settings: {keys}."]
        text, pictures = page(title="Runs side by side", lines=lines, tables=[shown], figures=figures)
        write_text(html, text)
        for name, data in pictures.items():
            write_bytes(html.with_name(f"{html.stem}_{name}.png"), data)
        print(html)
    if json_file:
        write_json(json_file, {"runs": [str(folder) for folder in folders], "cases": [asdict(case) for case in found]})
