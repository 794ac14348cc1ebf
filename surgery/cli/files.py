"""Commands on delta files and checkpoints on disk; apply, undo, inspect, compose and card work without torch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, Quiet, command, examples, local
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    epilog=examples(
        "surgery apply delta.safetensors ./checkpoint --out ./edited",
        "surgery apply delta.safetensors ./checkpoint --out ./half --scale 0.5 --rounding stochastic --seed 7",
        "surgery apply delta.safetensors model.gguf --out edited.gguf --touched-type Q8_0",
    )
)
def apply(
    delta: Annotated[Path, typer.Argument(help="The delta file.")],
    checkpoint: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[
        Path, typer.Option("--out", help="The new directory, or the .gguf file of a GGUF checkpoint; must not exist.")
    ],
    scale: Annotated[float, typer.Option("--scale", help="Multiply the difference; -1 subtracts it.")] = 1.0,
    rounding: Annotated[
        str, typer.Option("--rounding", help="nearest, stochastic, or auto: as the delta was measured.")
    ] = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=SEEDS, help="Of stochastic rounding; default: the delta's.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also onto a distant relative of the base, or onto one that holds it.")
    ] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard-link the shards that do not change.")] = False,
    undo_kind: Annotated[str, typer.Option("--undo", help="record, reference or none.")] = "record",
    tied: Annotated[str | None, typer.Option("--tied", help="embed, head or both, if tying differs.")] = None,
    vocabulary: Annotated[str, typer.Option("--vocabulary", help="refuse, or first rows only.")] = "refuse",
    rename: Annotated[str | None, typer.Option("--rename", help="OLD=NEW prefix of tensor names.")] = None,
    touched_type: Annotated[
        str | None, typer.Option("--touched-type", help="GGUF: write the touched matrices as this, such as Q8_0.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a new checkpoint with the delta added: all checks first, streaming, without torch."""
    from surgery.apply import apply as apply_to
    from surgery.progress import Progress

    if out.suffix == ".gguf":
        if link or rename is not None or vocabulary != "refuse":
            raise SurgeryError(
                "--link, --rename and --vocabulary are for directories; leave them out with a .gguf file"
            )
        options: dict[str, Any] = {"rounding": rounding, "scale": scale, "seed": seed, "force": force, "tied": tied}
        options |= {"undo": undo_kind, "touched_type": touched_type}
        _apply_gguf(delta, checkpoint, out, options, Progress(quiet))
        return
    if touched_type is not None:
        raise SurgeryError("--touched-type is for GGUF files; give --out a name that ends in .gguf")
    if rename is not None and "=" not in rename:
        raise SurgeryError(f"--rename {rename!r}: expected OLD=NEW, for example --rename model.=language_model.model.")
    pair = tuple(rename.split("=", 1)) if rename is not None else None
    options = {"rename": pair, "tied": tied, "vocabulary": vocabulary, "undo": undo_kind}
    options |= {"rounding": rounding, "scale": scale, "seed": seed, "force": force, "link": link}
    report = apply_to(delta, local(checkpoint), out, **options)
    progress = Progress(quiet)
    for note in report.notes:
        progress.say(note)
    print(report)


def _apply_gguf(delta: Path, checkpoint: str, out: Path, options: dict[str, Any], progress: Any) -> None:
    from surgery.apply.gguf import apply_gguf

    source = Path(checkpoint).expanduser()
    if checkpoint == "demo":
        from surgery.checkpoints import demo_gguf

        source = demo_gguf()
    elif source.suffix != ".gguf":
        raise SurgeryError(
            f"{checkpoint}: --out {out.name} needs a .gguf file to edit; name a directory as --out instead"
        )
    report = apply_gguf(delta, source, out, **options)
    for note in report.notes:
        progress.say(note)
    print(f"{report}; {report.bytes - report.bytes_before:+,} bytes")


@command(epilog=examples("surgery undo ./edited --out ./original", "surgery undo edited.gguf --out original.gguf"))
def undo(
    checkpoint: Annotated[Path, typer.Argument(help="A directory or GGUF file that surgery apply wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The new directory or file; must not exist.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give back the original checkpoint, byte for byte; what was changed since beside the edit stays changed."""
    from surgery.apply import undo as undo_to
    from surgery.apply.gguf_undo import undo_gguf

    place = undo_gguf(checkpoint, out) if checkpoint.suffix == ".gguf" else undo_to(checkpoint, out).out
    print(f"{place}: what the edit changed is as before it, byte for byte; all else is as in {checkpoint}")


@command(
    epilog=examples("surgery inspect delta.safetensors", "surgery inspect delta.safetensors --against ./checkpoint")
)
def inspect(
    delta: Annotated[Path, typer.Argument(help="The delta file.")],
    against: Annotated[str | None, typer.Option("--against", help="Print the distance to this checkpoint.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a delta file holds, without torch."""
    from dataclasses import asdict

    from surgery.apply import inspect as look

    found = look(delta, against=local(against) if against else None)
    if as_json:
        print(json.dumps(asdict(found), indent=1, sort_keys=True, default=str))
    else:
        _print_inspection(found)


def _shown(value: Any) -> str:
    return "/".join(dict.fromkeys(value)) if isinstance(value, list) else str(value)


def _print_inspection(found: Any) -> None:
    print(f"{found.path}: kind {found.kind}, base {found.base}, {found.bytes:,} bytes, sha256 {found.sha256}")
    if found.module:
        settings = ", ".join(f"{key} {_shown(value)}" for key, value in found.module.items() if key != "type")
        print(f"module {found.module['type']}: {settings}")
        print("a plain checkpoint cannot hold it: surgery export --transformers, or surgery.load(..., deltas=[...])")
    print(f"{len(found.tensors)} tensors, {found.parameters:,} entries; seed {found.seed}, written by {found.tool}")
    for view in found.tensors:
        far = "" if view.distance is None else f", distance {view.distance:.4f}"
        change = f"changed by {view.relative:.2e} of its norm" if view.base_norm else f"norm {view.norm:.3g}"
        print(f"  {view.name}  {list(view.shape)} {view.dtype}  {change}, {view.nonzero:,} entries{far}")
    if found.against:
        distance = "" if found.distance is None else f" (largest distance {found.distance:.4f})"
        print(f"against {found.against}: {found.verdict}{distance}" + (f"; {found.refusal}" if found.refusal else ""))
    for note in found.notes:
        print(note)
    if found.recipe:
        print("recipe:")
        print("  " + found.recipe.strip().replace("\n", "\n  "))


@command(epilog=examples("surgery diff ./base ./finetuned --out finetuned.safetensors"))
def diff(
    base: Annotated[str, typer.Argument(help=MODEL_HELP)],
    edited: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option("--out", help="The delta file to write.")],
    debug: Debug = False,
) -> None:
    """Write the difference between two checkpoints as a delta."""
    from surgery.delta import diff as difference

    found = difference(local(base), local(edited), base=base)
    print(f"{out}: {len(found.shapes)} tensors differ, sha256 {found.save(out)}")


@command(
    epilog=examples("surgery compose a.safetensors b.safetensors --out both.safetensors --weights 1 --weights 0.5")
)
def compose(
    deltas: Annotated[list[Path], typer.Argument(help="Delta files of the same base.")],
    out: Annotated[Path, typer.Option("--out", help="The delta file to write.")],
    weights: Annotated[list[float] | None, typer.Option("--weights", help="One for each delta, in order.")] = None,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of deltas, summed in float32, as one delta."""
    from surgery.delta import Delta
    from surgery.delta import compose as total

    found = total([Delta.load(path) for path in deltas], weights)
    print(f"{out}: {len(found.shapes)} tensors, sha256 {found.save(out)}")


@command(epilog=examples("surgery card runs/first/delta.safetensors > README.md"))
def card(
    delta: Annotated[Path, typer.Argument(help="The delta file; a run.json beside it gives the measured effects.")],
    debug: Debug = False,
) -> None:
    """Print the Markdown model card that goes beside a delta on a hub."""
    from dataclasses import replace

    from surgery.delta import Delta, open_delta
    from surgery.delta.card import card as text

    found, sha256 = Delta.load(delta), open_delta(delta).sha256
    beside = delta.parent / "run.json"
    if beside.is_file() and not found.metadata.get("measured"):
        summary = json.loads(beside.read_text("utf-8"))
        if summary.get("delta", {}).get("sha256") == sha256:
            measured = {when: summary[when] for when in ("before", "after")}
            found = replace(found, metadata=found.metadata | {"measured": measured})
    print(text(found, file=delta.name, sha256=sha256))
