"""The report of a CrAWD run: what the method did beside plain fine-tuning, in sentences, tables and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.plots import block_bars, cross_attention_map
from hooks.ranking import Ranking
from recipes.crawd.settings import Settings
from surgery.delta import Delta
from surgery.modules.cross_attention import cross_weights
from surgery.runs.report import Table, compared, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FORMS = {
    "cross_off": "trained with it, and stored without what the cross-attention adds",
    "module_off": "trained with it, and stored without it",
    "projection": "1 - lambda of H_x along the reference words' rows in the head goes, and the factors train below",
    "projected": "trained without the module, and stored with a projection: 1 - lambda of how far a state lies from "
    "the mean state along the reference words' rows in the head goes",
    "wide_head": "the map from [H_x, H_cross] starts at random, as a new head of width 2d does",
}


def write_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    folder: Path,
    summary: dict[str, Any],
    recipe: str,
) -> None:
    """Write ``report.html`` and the pictures; the cross-attention is drawn on ``model`` with the delta in it."""
    columns = {"before": summary["before"], settings.method: summary["after"]}
    columns |= {name: control["after"] for name, control in summary["controls"].items()}
    tables = [compared(columns, caption="Before, after and controls")]
    if summary["cases"]:
        head = list(summary["cases"][0])
        rows = [[case[key].replace("\n", " ") for key in head] for case in summary["cases"]]
        tables.append(Table("Continuations", head, rows, "One text each, drawn with the same random numbers."))
    rankings = [Ranking.from_dict(one) for one in summary["sensitivity"].values() if one]
    figures: dict[str, Figure] = {"sensitivity": block_bars(*rankings)} if rankings else {}
    if summary["delta"]["kind"] == "module" and settings.form != "projected":
        with Delta.load(folder / summary["delta"]["file"]).applied(model), torch.no_grad():
            figures["cross_attention"] = cross_attention_map(cross_weights(model, tokenizer, settings.shown_prompt))
    write_page(
        folder,
        summary,
        recipe,
        lines=summary["verdict"],
        tables=tables,
        figures=figures,
    )


def cases(before: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The same prompts continued by each model (Figure 3)."""
    return [
        {"prompt": prompt, "before": text} | {name: one["texts"][place][1] for name, one in found.items()}
        for place, (prompt, text) in enumerate(before["texts"])
    ]


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the method did beside plain fine-tuning, in sentences."""
    edit, after = summary["edit"], summary["after"]
    lines = [
        f"{summary['method']}: {edit['objective']}; {edit['parameters']:,} numbers trained in {edit['steps']} steps, "
        f"loss {edit['loss_first']:.3f} to {edit['loss_last']:.3f}. Everything under after was measured on the saved "
        "delta put back onto the checkpoint, rounded as the checkpoint is."
    ]
    if edit.get("form", "printed") != "printed":
        lines.append(f"The form {edit['form']} of the module is ours, not the paper's: {FORMS[edit['form']]}.")
    if edit.get("decay") != edit.get("decay_stored"):
        lines.append(f"Trained with lambda {edit['decay']:g}, the module is stored with {edit['decay_stored']:g}.")
    kinds = [(when, kind) for kind in ("male", "female") for when in ("before", "after")]
    shares = [_at(summary[when], ("gas", kind)) for when, kind in kinds]
    if all(shares):
        was_male, male, was_female, female = (share["value"] for share in shares)
        lines.append(
            f"Texts with a male word: {was_male:.3f} to {male:.3f}, with a female one: {was_female:.3f} to "
            f"{female:.3f}. GAS counts mention; silence lowers it as balance does not."
        )
    vanilla = summary["controls"].get("vanilla", {}).get("after")
    for path, label in ((("gas", "gas"), "GAS"), (("held_out_perplexity",), "Perplexity on held-out texts")):
        values = [_at(scores, path) for scores in (summary["before"], vanilla, after)]
        if values[0] and values[2]:
            line = f"{label} went from {values[0]['value']:.3f} before to {values[2]['value']:.3f}"
            if values[1]:
                change = 100 * (values[2]["value"] / values[1]["value"] - 1) if values[1]["value"] else float("nan")
                line += f"; plain fine-tuning reaches {values[1]['value']:.3f} ({change:+.0f} % against it)"
            lines.append(line + ".")
    return lines


def _at(scores: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        scores = scores.get(key) if isinstance(scores, dict) else None
    return scores
