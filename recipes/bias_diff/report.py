"""What a reader of a BIAS DIFF run gets: sentences, tables, the texts with their tokens, every score of every text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from numpy import ndarray

from hooks.gradient_influence import TokenInfluence, highlighted
from hooks.plots import BLUE, GREY, ORANGE, new_figure
from recipes.bias_diff.dataset import Material
from recipes.bias_diff.measuring import STANDARD_ERRORS, standard_errors
from surgery.runs.report import Table, cell, compared, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_scores(path: Path, material: Material, scores: Mapping[str, Any], chosen: Bool[ndarray, " texts"]) -> None:
    """JSON lines: every text with its scores, those of each epoch, its loss, its label, and whether it was selected."""
    with path.open("w", encoding="utf-8") as file:
        for place, text in enumerate(material.texts):
            row: dict[str, Any] = {"row": place, "selected": bool(chosen[place]), "text": text}
            row |= {name: float(values[place]) for name, values in scores["rows"].items()}
            row["loss"] = float(scores["losses"][place])
            row["epochs"] = {
                str(number): {name: values[place] for name, values in sorted(one.items())}
                for number, one in scores["epochs"].items()
            }
            if material.biased is not None:
                row["biased"] = bool(material.biased[place])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def strongest(path: Path, material: Material, shown: Sequence[TokenInfluence], method: str) -> Table:
    """Write the texts of ``shown`` with shaded tokens as a page of its own; the same in a few words for the report."""
    title = f"Texts with the highest {method}"
    if not shown:
        return Table(title, ["row"], [], "None were asked for (tokens_of).")
    path.write_text(highlighted(shown, title=title), "utf-8")
    labels = [] if material.biased is None else ["biased"]
    rows = []
    for one in shown:
        values, text = one.values[:, 0], material.texts[one.place]
        most = [one.tokens[token].strip() for token in values.argsort()[::-1][:4] if values[token] > 0]
        label = [] if material.biased is None else ["yes" if material.biased[one.place] else "no"]
        rows.append([str(one.place), *label, ", ".join(most), text if len(text) < 90 else f"{text[:87]}..."])
    return Table(title, ["row", *labels, "tokens that add most", "text"], rows, f"{path.name} shades every token.")


def said(summary: Mapping[str, Any], note: str, words: str) -> list[str]:
    """What happened, in sentences; warnings begin with "Warning"."""
    lines = [f"{note}."]
    scores = {when: summary[when].get("crows_pairs") for when in ("before", "warmed", "after")}
    if all(scores.values()):
        key = "stereotype" if "stereotype" in scores["after"] else "metric"
        was, warm, now = (found[key]["value"] for found in scores.values())
        lines.append(
            f"The CrowS-Pairs {key} score was {was:.2f} in the original, {warm:.2f} after the warm-up and {now:.2f} "
            f"after {summary['edit']['part']} ({scores['after'][key]['n']} pairs, 50 is ideal)."
        )
        lines.append(_injected(summary["injected"]))
    for name, metric in summary["removed"].items():
        random = next((c["removed"].get(name) for n, c in summary["controls"].items() if n.endswith(":random")), None)
        beside = f"; with random texts instead {random['value']:.0%}" if random else ""
        lines.append(
            f"Of the injected increase of the {name}{' score' if name != 'margin' else ''} {metric['value']:.0%} "
            f"[{metric['low']:.0%}, {metric['high']:.0%}] was removed{beside}."
        )
    lines += _ended(summary["edit"])
    for control, each in summary["controls"].items():
        if control.endswith(":random") and (more := each.get("beyond")):
            apart = "" if more["low"] > 0 else ": not clearly more than random texts do"
            lines.append(f"Beyond random texts ({control}) the margin fell by {cell(more)} nats, pair by pair{apart}.")
    costs = [summary[when]["perplexity"]["value"] for when in ("before", "warmed", "after")]
    cost = "Perplexity on neutral text: {:.2f} in the original, {:.2f} warmed up, {:.2f} at the end."
    lines.append(cost.format(*costs))
    chosen = summary["selected"]
    by = chosen["by"].replace("_", " ")
    lines.append(f"{chosen['rows']} of {chosen['of']} texts were selected, by {by}.")
    return [*lines, words]


def _injected(metric: Mapping[str, Any]) -> str:
    """How much margin the warm-up put in, and whether that can be told from nothing."""
    raised = f"The warm-up raised the margin of stereotypes over their twins by {cell(metric)} nats"
    more = "train longer or faster (epochs, lr), on more biased texts, or measure with more pairs"
    if metric["low"] <= 0:
        return f"Warning: {raised}, which is not different from 0: there is nothing to remove; {more}."
    away = standard_errors(metric)
    if away < STANDARD_ERRORS:
        return f"Warning: {raised}, {away:.1f} standard errors from 0: shares of it are vague; {more}."
    return f"{raised}, {away:.1f} standard errors from 0."


def _ended(edit: Mapping[str, Any]) -> list[str]:
    """Why an unlearning ended."""
    if "stopped" not in edit:
        return []
    was, warm = edit["likelihood_original"], edit["likelihood_warmed"]
    what = f"the selected texts' {'margin over their twins' if edit['part'].startswith('margin') else 'likelihood'}"
    aim = f"{what} was back at that of the original model ({was:.3f} nats a token; warmed up {warm:.3f})"
    kept = f"Texts that were not selected went from {edit['kept_warmed']:.3f} to {edit['kept_after']:.3f} nats a token."
    if edit["stopped"]:
        return [f"Unlearning ended after {edit['steps']} steps, when {aim}.", kept]
    more = "raise unlearn_epochs or unlearn_lr"
    return [f"Warning: unlearning ended after all {edit['steps']} steps, before {aim}; {more}.", kept]


def write_report(texts: Table, path: Path, summary: Mapping[str, Any], recipe: str) -> None:
    """``report.html``; ``texts`` is the table of ``strongest``."""
    name, others = summary["edit"]["part"], summary["controls"]
    columns = {"original": summary["before"], "warmed up": summary["warmed"], name: summary["after"]}
    columns |= {other: control["after"] for other, control in others.items()}
    shares = {name: summary["removed"]} | {other: control["removed"] for other, control in others.items()}
    tables = [compared(columns, caption="Original, warmed up, and what was done")]
    if any(shares.values()):
        tables.append(compared(shares, caption="Share of the injected increase that was removed"))
    found = [(score, metrics) for score, metrics in summary["selection"].items() if "coverage" in metrics]
    if found:
        twin = [f"twin_auc{part}" for part in ("", "_balanced", "_stereo", "_antistereo")]
        keys = ["coverage", "precision", *twin]
        head = ["score", "coverage (Eq. 9)", "precision (Eq. 10)", "stereotype above its twin"]
        head += ["both directions alike", "stereo", "antistereo"]
        cells = [[score, *(cell(m.get(key)) for key in keys)] for score, m in found]
        best = found[0][1]
        note = (
            f"At best this many rows could have a coverage of {best['coverage']['ideal']:.3f} and a precision of "
            f"{best['precision']['ideal']:.3f}; a blind score puts half of the stereotypes above their twins. "
            "One that sees only the words of the groups is right on the stereo pairs and wrong on the antistereo ones."
        )
        tables.append(Table("What each score selects", head, cells, note))
    write_page(
        path,
        summary,
        recipe,
        lines=summary["verdict"],
        tables=[*tables, texts],
        figures=_figures(summary, columns),
    )


def _figures(summary: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, "Figure"]:
    """What each score selects, and the margin of stereotypes in every case, where they were measured."""
    found = {name: metrics for name, metrics in summary["selection"].items() if "coverage" in metrics}
    figures = {}
    if found:
        panels = {"coverage": "biased rows covered", "twin_auc": "stereotype above its twin"}
        figures["selection"] = _points(
            {label: {name: m[key] for name, m in found.items() if key in m} for key, label in panels.items()},
            {"biased rows covered": summary["selected"]["top"], "stereotype above its twin": 0.5},
        )
    margins = {name: case["crows_pairs"]["margin"] for name, case in columns.items() if "crows_pairs" in case}
    if margins:
        figures["margin"] = _points({"margin of stereotypes (nats)": margins}, {"margin of stereotypes (nats)": 0.0})
    return figures


def _points(panels: Mapping[str, Mapping[str, Any]], marks: Mapping[str, float]) -> "Figure":
    """A panel for each metric: a point with its interval for each name, and a line at ``marks`` (chance, or ideal)."""
    names = list(dict.fromkeys(name for metrics in panels.values() for name in metrics))
    figure = new_figure(3.6 * len(panels) + 1.4, 0.9 + 0.3 * len(names))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (label, metrics) in zip(axes, panels.items(), strict=True):
        for name, metric in metrics.items():
            place = names.index(name)
            axis.plot([metric["low"], metric["high"]], [place, place], color=GREY, linewidth=2)
            axis.plot(metric["value"], place, "o", color=BLUE)
        axis.axvline(marks[label], color=ORANGE, linewidth=1, linestyle="--")
        axis.set_xlabel(label)
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[0].invert_yaxis()  # shared by all panels
    return figure
