"""The command dose: what a delta does at several scales, and the scale at which a number comes to a named value."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.app import (
    MODEL_HELP,
    Debug,
    Device,
    JsonFile,
    Part,
    Plot,
    PromptSet,
    Quiet,
    Rows,
    Scorer,
    command,
    examples,
    local,
    to_write,
)
from surgery.cli.models import check_opening, open_model
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.delta import Delta
    from surgery.progress import Progress
    from surgery.runs.dose import Dosed, Reached

PANELS = 9


@command(
    epilog=examples(
        "surgery dose delta.safetensors demo --target genbias.relative_gap.all=0.1 --plot dose.png",
        "surgery dose delta.safetensors ./checkpoint --scales 0,0.5,1 --suite genbias --suite perplexity --json d.json",
        "surgery dose delta.safetensors demo --suite stereoset --folder ./data --scorer bos --html dose.html",
        "surgery dose delta.safetensors demo --suite genbias --apply-at 0.8",
    )
)
def dose(
    delta: Annotated[Path, typer.Argument(help="The delta file, ours or foreign (surgery diff, surgery import).")],
    checkpoint: Annotated[str, typer.Argument(help=f"What it is put on, in memory. {MODEL_HELP}")],
    scales: Annotated[
        str,
        typer.Option("--scales", help="What the delta is multiplied by; 0 is the untouched model, always measured."),
    ] = "0,0.25,0.5,0.75,1,1.25,1.5",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="METRIC=NUMBER", help="Find the scale at which the number comes to this."),
    ] = None,
    apply_at: Annotated[
        float | None, typer.Option("--apply-at", help="Measure at this scale too, and print the command for it.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also beyond the measured scales, and on a distant relative of the base.")
    ] = False,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="A suite; default: those that need no data folder. See surgery list."),
    ] = None,
    data: PromptSet = "genbias",
    folder: Annotated[str, typer.Option("--folder", help="The data folder, for suites that need one.")] = "",
    part: Part = "test",
    scorer: Scorer = "bias-bench",
    limit: Rows = 0,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="Show metrics whose place starts so; default: the whole ones.")
    ] = None,
    json_file: JsonFile = None,
    plot: Plot = None,
    html: Annotated[Path | None, to_write("--html", "Write tables and picture to this HTML file.")] = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure bias and cost of a delta at scales from 0 up; weights change in memory only, no checkpoint is written.

    In the table "+" is better than at scale 0 and "-" worse, by the paired interval. A target's scale is interpolated
    between the measured ones, with its interval over the bootstrap, and then measured itself.
    """
    from dataclasses import replace

    from surgery.catalogue import SUITES
    from surgery.delta import Delta
    from surgery.metrics.judges import Judges, split_seed_of
    from surgery.progress import Progress
    from surgery.runs.compare import axis
    from surgery.runs.dose import dosed, reached, read_scales, read_target

    wanted = [read_target(text) for text in target or []]
    steps = _steps(read_scales(scales), apply_at, force)
    names = tuple(dict.fromkeys(suite or SUITES))
    judges = Judges(suites=names, prompts=data, folder=folder, part=part, scorer=scorer, limit=limit)
    judges.check("--folder")
    check_opening(checkpoint, device)
    edit, progress = Delta.load(delta), Progress(quiet)
    judges = replace(judges, split_seed=split_seed_of(edit.metadata))
    model, tokenizer = open_model(checkpoint, quiet, device=device)
    how: Any = {"as_stored": as_stored(edit, local(checkpoint), progress), "force": force}
    with edit.applied(model, scale=max(steps, key=abs), **how):
        pass  # all checks, before the first measurement
    reference = judges.reference(model, tokenizer, progress=progress)

    def at(scale: float) -> "Dosed":
        progress.say(f"scale {scale:g}")
        return dosed(
            edit, model, scale, lambda: judges.judge(model, tokenizer, reference=reference, progress=progress), **how
        )

    untouched = at(0.0)
    wanted = [(axis(untouched.flat, place), value) for place, value in wanted]
    shown = _shown(list(untouched.flat), metric or [], [place for place, _ in wanted])
    found = [untouched if scale == 0 else at(scale) for scale in steps]
    answers = [reached(found, place, value, beyond=force) for place, value in wanted]
    checked = [None if one.scale is None else at(float(f"{one.scale:.4g}")) for one in answers]
    about = {"delta": str(delta), "checkpoint": checkpoint, "as_stored": how["as_stored"]}
    _print(found, shown, answers, checked)
    for scale in [*(one.scale for one in checked if one is not None), *([] if apply_at is None else [apply_at])]:
        print(_command(edit, delta, checkpoint, scale))
    _write(found, shown, answers, checked, about, json_file, plot, html, progress)


def _steps(scales: list[float], apply_at: float | None, force: bool) -> list[float]:
    if apply_at is None:
        return scales
    if not (scales[0] <= apply_at <= scales[-1]) and not (force and abs(apply_at) < float("inf")):
        raise SurgeryError(
            f"--apply-at {apply_at:g}: beyond the measured scales, {scales[0]:g} to {scales[-1]:g}; what the delta "
            "does there is not known: name larger --scales, or add --force"
        )
    return sorted({*scales, apply_at})


def as_stored(delta: "Delta", checkpoint: Path, progress: "Progress") -> bool:
    """Whether sums round to the dtype of the delta's base, as ``surgery apply`` rounds to the checkpoint's own."""
    from surgery.files.checkpoint_files import open_checkpoint

    files, base = open_checkpoint(checkpoint), delta.metadata["tensors"]
    own = {name: files.entry(name).dtype for name in delta.shapes if name in files.places}
    other = [name for name, dtype in own.items() if dtype != base[name]["dtype"]]
    if any(own[name] != "F32" for name in other):
        progress.say(
            f"note: {other[0]} is {own[other[0]]} in the checkpoint and {base[other[0]]['dtype']} in the delta's base; "
            "measured without the rounding that surgery apply does on disk"
        )
    return not other


def _shown(places: list[str], only: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Targets first; then those named by ``only``, or the whole ones (not the parts), and of locality the KL."""
    if only:
        chosen = [place for place in places if place.startswith(tuple(only))]
        if not chosen:
            raise SurgeryError(f"--metric {', '.join(only)}: not measured; expected some of {', '.join(places)}")
    else:
        parents = {place.rpartition(".")[0] for place in places if place.rpartition(".")[2] in ("all", "overall")}
        chosen = [
            place
            for place in places
            if (place.rpartition(".")[0] not in parents or place.rpartition(".")[2] in ("all", "overall"))
            and (not place.startswith("locality.") or place.endswith(".kl"))
        ]
    return list(dict.fromkeys([*targets, *chosen]))


def _print(
    found: "Sequence[Dosed]", shown: Sequence[str], answers: "Sequence[Reached]", checked: "Sequence[Dosed | None]"
) -> None:
    from surgery.runs.dose import changes

    apart = changes(found, shown)
    marks = {"better": "+", "worse": "-", "within noise": " "}
    print(f"{'scale':34} " + " ".join(f"{one.scale:>10g} " for one in found))
    for place in shown:
        cells = []
        for one in found:
            pair = apart.get(one.scale, {}).get(place)
            mark = marks[pair.verdict] if pair else " " if one.scale == 0 else "?"
            cells.append(f"{one.flat[place].value:10.4f}{mark}")
        print(f"{place.replace('.', ' ').replace('_', ' '):34} " + " ".join(cells))
    together = len(shown) * (len(found) - 1)
    print(f'"+" better, "-" worse than at scale 0 (95 %, over all {together} together), "?" cannot be paired')
    for answer, point in zip(answers, checked, strict=True):
        if point is not None:
            there = point.flat[answer.place]
            print(f"{answer}; measured there: {there}, {there.scorer}; {there.data}, n {there.n}")
        else:
            rows = ", ".join(f"{one.flat[answer.place].value:.4g} at {one.scale:g}" for one in found)
            print(f"{answer} within scales {found[0].scale:g} to {found[-1].scale:g} ({rows})")


def _command(delta: "Delta", file: Path, checkpoint: str, scale: float) -> str:
    """What writes the checkpoint at ``scale``; a module needs the form of transformers."""
    words = ["apply", str(file), checkpoint, "--out", "edited"]
    if delta.kind == "module":
        words = ["export", str(file), "--transformers", "edited", "--checkpoint", checkpoint]
    return shlex.join(["surgery", *words, "--scale", f"{scale:.12g}"])


def _write(
    found: "Sequence[Dosed]",
    shown: list[str],
    answers: "Sequence[Reached]",
    checked: "Sequence[Dosed | None]",
    about: dict[str, Any],
    json_file: Path | None,
    plot: Path | None,
    html: Path | None,
    progress: "Progress",
) -> None:
    from dataclasses import asdict

    from surgery.files.atomic import write_bytes, write_json, write_text
    from surgery.metrics.suite import plain
    from surgery.runs.dose import changes, picture, tables
    from surgery.runs.pictures import bytes_of
    from surgery.runs.report import page

    if json_file:
        apart = changes(found, shown)
        rows = [
            {
                "scale": one.scale,
                "scores": plain(one.scores),
                "differences": {place: asdict(pair) for place, pair in apart.get(one.scale, {}).items()},
            }
            for one in found
        ]
        targets = [
            asdict(answer)
            | {"measured": None if point is None else {"scale": point.scale} | {"scores": plain(point.scores)}}
            for answer, point in zip(answers, checked, strict=True)
        ]
        write_json(json_file, about | {"scales": rows, "targets": targets})
    if not plot and not html:
        return
    if len(shown) > PANELS:
        progress.say(f"the picture has the first {PANELS} of {len(shown)} numbers; choose with --metric")
    figure = picture(found, shown[:PANELS], answers)
    if plot:
        write_bytes(plot, bytes_of(figure, plot.suffix[1:].lower()))
    if html:
        lines = [f"{about['delta']} on {about['checkpoint']}, in memory.", *map(str, answers)]
        text, _ = page(title="Dose-response", lines=lines, tables=tables(found, shown), figures={"dose": figure})
        write_text(html, text)
