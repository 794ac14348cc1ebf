"""Commands between deltas and other forms: PEFT adapters in and out, a module's checkpoint for transformers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.app import MODEL_HELP, Debug, command, examples, local
from surgery.cli.models import without_bars
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS


@command(
    epilog=examples(
        "surgery export delta.safetensors --peft ./adapter --rank 64 --checkpoint demo",
        "surgery export delta.safetensors --peft ./adapter --rank 64 --served --drop-vectors --checkpoint demo",
        "surgery export crawd.safetensors --transformers ./edited --checkpoint demo",
    )
)
def export(
    delta: Annotated[Path, typer.Argument(help="The delta file.")],
    peft: Annotated[Path | None, typer.Option("--peft", help="Write this PEFT LoRA adapter directory.")] = None,
    transformers: Annotated[
        Path | None,
        typer.Option(
            "--transformers",
            help="Write this directory for transformers (trust_remote_code=True); of a delta of kind module.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="PEFT: cut to this rank; default: exact.")] = None,
    drop_vectors: Annotated[bool, typer.Option("--drop-vectors", help="PEFT: leave norms and biases out.")] = False,
    served: Annotated[
        bool, typer.Option("--served", help="PEFT: only what vLLM, SGLang and llama.cpp load; needs a --rank.")
    ] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", help=f"To put the module into; PEFT: keep norms whole and measure the effect. {MODEL_HELP}"
        ),
    ] = None,
    scale: Annotated[float, typer.Option("--scale", help="Multiply what the delta adds.")] = 1.0,
    rounding: Annotated[
        str, typer.Option("--rounding", help="Of the changed weights: nearest, stochastic, auto (as it was measured).")
    ] = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=SEEDS, help="Of stochastic rounding; default: the delta's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also onto a distant relative of the base.")] = False,
    debug: Debug = False,
) -> None:
    """Write a delta as a PEFT adapter, or a checkpoint with a delta's module in it for transformers."""
    from surgery.delta import Delta

    if (peft is None) == (transformers is None):
        raise SurgeryError(
            f"export: got {'neither' if peft is None else 'both'} of --peft DIR and --transformers DIR; name one"
        )
    of_other = {"--rank": rank is not None, "--drop-vectors": drop_vectors, "--served": served}
    if peft is not None:
        of_other = {"--rounding": rounding != "auto", "--seed": seed is not None, "--force": force}
    if any(of_other.values()):
        given = ", ".join(name for name, said in of_other.items() if said)
        raise SurgeryError(
            f"export --{'peft' if peft else 'transformers'}: {given} would change nothing there; leave it out"
        )
    found = Delta.load(delta)
    if transformers is not None:
        if checkpoint is None:
            raise SurgeryError("export --transformers: needs the base or a relative of it; add --checkpoint CHECKPOINT")
        _with_module(found, local(checkpoint), transformers, scale=scale, rounding=rounding, seed=seed, force=force)
        return
    assert peft is not None
    from surgery.adapters.exporting import export_peft
    from surgery.delta import compose

    found = found if scale == 1 else compose([found], [scale])
    place = local(checkpoint) if checkpoint is not None else None
    if place is not None:  # which peft is to read the adapter onto
        without_bars()
    report = export_peft(found, peft, rank=rank, drop_vectors=drop_vectors, checkpoint=place, served=served)
    for name, error in report.errors.items():
        print(f"  {name}  relative error {error:.4f}")
    for name, share in report.dropped.items():
        print(f"  {name}  left out, {100 * share:.2f} % of the delta's squared norm")
    for name in report.saved:
        print(f"  {name}  kept whole (modules_to_save): on a sibling it replaces that one's own")
    print(f"{report.out}: rank {report.rank}, largest relative error {max(report.errors.values(), default=0.0):.4f}")
    if place is None:
        print("its effect was not measured: add --checkpoint CHECKPOINT")
    else:
        _tell_effect(found, report.out, place)


def _with_module(delta: Any, checkpoint: Path, out: Path, **options: Any) -> None:
    from surgery.apply.export import export_transformers

    written = export_transformers(delta, checkpoint, out, **options)
    print(
        f"{written.out}: {written.bytes:,} bytes, module of {written.parameters:,} parameters, {written.changed:,} "
        f"entries of the base changed, {written.lost:,} left as they were by rounding; open it with "
        f"{written.auto_class}.from_pretrained({str(written.out)!r}, trust_remote_code=True)"
    )


def _tell_effect(delta: Any, adapter: Path, checkpoint: Path) -> None:
    from surgery.adapters.effect import effect

    kept = effect(delta, adapter, checkpoint)
    if kept is None:
        print(f"its effect was not measured: the model of {checkpoint} predicts no next token")
        return
    print(
        f"effect kept, through peft: {kept.kept:.1%} [{kept.low:.1%}, {kept.high:.1%}] of the edit's KL of the next "
        f"token ({kept.edit:.4f} nats, of which {kept.lost:.4f} are missing; {kept.prompts} dev prompts of genbias)"
    )
    if kept.gap_kept and kept.gaps:
        share, low, high = kept.gap_kept
        base, edit, adapted = kept.gaps
        print(
            f"gap reduction kept: {share:.1%} [{low:.1%}, {high:.1%}] (relative gap {base:.3f} untouched, {edit:.3f} "
            f"with the edit, {adapted:.3f} with the adapter, same prompts)"
        )


@command(name="import", epilog=examples("surgery import ./adapter ./checkpoint --out adapter.safetensors"))
def import_(
    adapter: Annotated[Path, typer.Argument(help="A PEFT adapter directory.")],
    checkpoint: Annotated[str, typer.Argument(help=f"What it was trained on. {MODEL_HELP}")],
    out: Annotated[Path, typer.Option("--out", help="The delta file to write.")],
    kind: Annotated[
        str, typer.Option("--kind", help="auto keeps LoRA factors where they are all; lora insists; dense multiplies.")
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Write what PEFT makes of an adapter and its base as a delta."""
    from surgery.adapters.importing import import_peft

    without_bars()
    found = import_peft(adapter, local(checkpoint), base=checkpoint, kind=kind)
    print(f"{out}: {len(found.shapes)} tensors of kind {found.kind}, sha256 {found.save(out)}")
