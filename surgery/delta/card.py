"""The model card of a delta: the Markdown that goes beside the file on a hub."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.delta.describe import describe
from surgery.delta.format import Delta, DeltaFile


def card(delta: Delta | DeltaFile, *, file: str = "delta.safetensors", sha256: str | None = None) -> str:
    """Markdown with a hub's YAML head: what `delta` changes, measured effects with intervals, how to apply
    it.

    `file` is the name that the delta has beside the card, `sha256` that file's own (default: of the file that `save`
    writes). The licence is left as a line to fill: a delta is
    derived from its base, whose licence this tool cannot know.
    """
    data = delta.metadata
    return "\n".join(
        [
            *_head(data),
            *_changes(delta),
            *_effects(data["measured"]),
            *_how(data, file),
            *_origin(delta, sha256 or delta.sha256),
        ]
    )


def _head(data: Mapping[str, Any]) -> list[str]:
    return [
        "---",
        "license: other  # FILL IN: a delta is derived from its base; its licence applies",
        f"base_model: {json.dumps(data['base'])}",
        "library_name: model-surgery",
        "tags:",
        "- model-surgery",
        "- weight-difference",
        "---",
        "",
        f"# A weight difference for {_cell(data['base'])}",
        "",
        "This file is not a model. It holds what an edit adds to the weights of the base, and is applied to it, or",
        "to a checkpoint that was fine-tuned from it.",
        "",
    ]


def _changes(delta: Delta | DeltaFile) -> list[str]:
    views = describe(delta)
    size = sum(math.prod(view.shape) for view in views)
    lines = [
        "## What it changes",
        "",
        f"{len(views)} tensors, {size:,} parameters, kind `{delta.metadata['kind']}`.",
        "",
        "| tensor | shape | norm of the difference | as part of the base's norm |",
        "|---|---|---:|---:|",
    ]
    for view in views:
        shape = " x ".join(map(str, view.shape))
        part = f"{100 * view.relative:.3g} %" if math.isfinite(view.relative) else "-"
        lines.append(f"| `{_cell(view.name)}` | {shape} | {view.norm:.4g} | {part} |")
    return [*lines, ""]


def _effects(measured: Mapping[str, Any]) -> list[str]:
    if not measured:
        return ["## Measured effect", "", "Not measured. Do so before relying on it: `surgery eval`.", ""]
    before, after = dict(_leaves(measured.get("before", {}))), dict(_leaves(measured.get("after", {})))
    rest = {key: value for key, value in measured.items() if key not in ("before", "after")}
    lines = ["## Measured effect", ""]
    if before or after:
        lines += [
            "Value [95 % interval].",
            "",
            "| metric | before | after | rows | scorer |",
            "|---|---|---|---:|---|",
        ]
        for name in dict.fromkeys([*before, *after]):
            known = after.get(name, before.get(name))
            rows, scorer = (known.get(key, "") if isinstance(known, Mapping) else "" for key in ("n", "scorer"))
            cells = (name, _number(before.get(name)), _number(after.get(name)), rows, scorer)
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines.append("")
    other = dict(_leaves(rest))
    if other:
        lines += ["| measured | value |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(_number(value))} |" for name, value in other.items()]
        lines.append("")
    return lines


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of a nested map; a map with a "value" is a leaf."""
    if isinstance(tree, Mapping) and "value" not in tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path or "value", tree


def _number(leaf: Any) -> str:
    if leaf is None:
        return "-"
    if not isinstance(leaf, Mapping):
        return f"{leaf:.4g}" if isinstance(leaf, float) else str(leaf)
    text = _number(leaf["value"])
    if leaf.get("low") is not None and leaf.get("high") is not None:
        text += f" [{_number(leaf['low'])}, {_number(leaf['high'])}]"
    return text


def _how(data: Mapping[str, Any], file: str) -> list[str]:
    if data["kind"] == "module":
        use = [
            "It holds new parts, which a plain checkpoint cannot hold. `surgery.load(CHECKPOINT, deltas=[FILE])` opens",
            "the edited model in Python.",
        ]
        if data["module"]["type"] == "cross_attention":
            use += [
                "This writes a directory for transformers with `trust_remote_code=True`:",
                "```",
                "pip install model-surgery",
                f"surgery export {file} --transformers EDITED --checkpoint CHECKPOINT",
                "```",
            ]
    else:
        use = [
            "```",
            "pip install model-surgery",
            f"surgery inspect {file} --against CHECKPOINT        # how far CHECKPOINT is from the base",
            f"surgery apply {file} CHECKPOINT --out EDITED",
            "surgery undo EDITED --out ORIGINAL                  # byte for byte",
            "```",
            "",
            "CHECKPOINT is a directory with the base or a model fine-tuned from it, in fp32, fp16 or bf16; anything",
            "else is refused. Without the tool: add each tensor of the file to the tensor of the same name."
            if data["kind"] == "dense"
            else "else is refused.",
        ]
    return ["## How to apply it", "", *use, ""]


def _origin(delta: Delta | DeltaFile, sha256: str) -> list[str]:
    data = delta.metadata
    facts = ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted(data["architecture"].items()))
    lines = [
        "## Where it comes from",
        "",
        f"- Base: {_cell(data['base'])} ({_cell(facts)})",
        f"- Made by {_cell(data['tool'])}, seed {data['seed']}",
        f"- sha256 of the file: `{sha256}`",
    ]
    for parent in data["parents"]:
        lines.append(
            f"- Part: weight {_cell(parent.get('weight', 1))}, sha256 `{_cell(parent.get('sha256', 'unknown'))}`"
        )
    for title, recipe in [("Recipe", data["recipe"]), *_recipes(data["parents"])]:
        if recipe.strip():
            fence = "```" if "```" not in recipe else "~~~~~~"
            lines += ["", f"{title}:", "", fence + "toml", recipe.rstrip("\n"), fence]
    return [*lines, ""]


def _recipes(parents: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(f"Recipe of part {n}", str(parent.get("recipe", ""))) for n, parent in enumerate(parents, 1)]


def _cell(value: Any) -> str:
    """Text from a file of unknown origin as one table cell: no line breaks, no column marks, no HTML."""
    text = str(value).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return " ".join(text.split())
