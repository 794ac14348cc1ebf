"""Dose-response: what a delta does at several scales, and at which scale a number comes to a named value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hooks.drawing import BLUE, GREY, ORANGE, new_figure
from surgery.delta import Delta
from surgery.errors import SurgeryError
from surgery.metrics.metric import Difference, Metric, difference, flat, ideal_of
from surgery.runs.report import Table, cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

# With --force a target is sought up to so many times the largest measured scale.
BEYOND = 2.0


@dataclass(frozen=True)
class Dosed:
    """What was measured with the delta at one scale; ``scores`` is a tree of ``Metric``."""

    scale: float
    scores: Mapping[str, Any]

    @cached_property
    def flat(self) -> dict[str, Metric]:
        """The numbers by place, such as "genbias.afgb.all"."""
        return flat(self.scores)


@dataclass(frozen=True)
class Reached:
    """The scale, nearest to 0, at which a number comes to ``wanted``, on straight lines between measured scales.

    ``low`` and ``high`` bound the scale (95 %, over the bootstrap's draws, in which scales are paired). None for the
    scale: not within what was measured; for a bound: not there in so many of the draws.
    """

    place: str
    wanted: float
    scale: float | None
    low: float | None
    high: float | None
    kept: bool
    """The untouched model meets it already, and ``scale`` is up to where that stays so."""
    extrapolated: bool = False

    def __str__(self) -> str:
        name = f"{self.place} = {self.wanted:g}"
        if self.scale is None:
            return f"{name}: {'met by the untouched model, and at all that was measured' if self.kept else 'not met'}"
        low, high = ("beyond" if bound is None else f"{bound:.4g}" for bound in (self.low, self.high))
        words = "met by the untouched model, and up to" if self.kept else "met at"
        how = "extrapolated beyond what was measured" if self.extrapolated else "interpolated"
        return f"{name}: {words} scale {self.scale:.4g} [{low}, {high}], {how}"


def read_scales(text: str) -> list[float]:
    """The numbers of "0,0.25,1", sorted, with 0, from which differences are. Raises ``SurgeryError``."""
    try:
        found = {float(word) for word in text.split(",")}
    except ValueError:
        found = set()
    if not found - {0.0} or not np.isfinite(list(found)).all():
        raise SurgeryError(f"--scales {text!r}: expected numbers with commas, such as 0,0.5,1; at least one beside 0")
    return sorted(found | {0.0})


def read_target(text: str) -> tuple[str, float]:
    """The place and the value of "genbias.relative_gap.all=0.1". Raises ``SurgeryError``."""
    place, _, value = text.rpartition("=")
    try:
        wanted = float(value)
    except ValueError:
        wanted = np.nan
    if not place.strip() or not np.isfinite(wanted):
        raise SurgeryError(f"--target {text!r}: expected METRIC=NUMBER, such as genbias.relative_gap.all=0.1")
    return place.strip(), wanted


def dosed(
    delta: Delta,
    model: "PreTrainedModel",
    scale: float,
    judge: Callable[[], Mapping[str, Any]],
    *,
    as_stored: bool = True,
    force: bool = False,
) -> Dosed:
    """What ``judge`` finds with ``delta`` at ``scale`` in ``model``, which is as before afterwards.

    At 0 it is the untouched model. Raises ``SurgeryError`` where the delta does not fit.
    """
    if scale == 0:
        return Dosed(0.0, judge())
    with delta.applied(model, scale=scale, as_stored=as_stored, force=force):
        return Dosed(scale, judge())


def reached(found: Sequence[Dosed], place: str, wanted: float, *, beyond: bool = False) -> Reached:
    """At which scale the number at ``place`` comes to ``wanted``, of ``found`` by rising scale, with scale 0.

    Lower (or higher) is better: where it is at most (at least) ``wanted``. Nearer to an ideal: where it is as near as
    ``wanted`` is. The same as before: up to where it is as far from what it was as ``wanted`` is. ``beyond``
    prolongs the last line to ``BEYOND`` times the last scale where it is not met before.
    """
    scales = np.array([one.scale for one in found])
    metrics = [one.flat[place] for one in found]
    start = int(np.flatnonzero(scales == 0)[0])
    values = np.array([[metric.value for metric in metrics]])
    draws = _draws(metrics)
    low, high = _band(metrics[start], wanted)
    if metrics[start].direction == "same":
        values = values - values[:, [start]]
        draws = None if draws is None else draws - draws[:, [start]]
    kept = bool(low <= values[0, start] <= high)
    ways = [np.arange(start, len(scales)), np.arange(start, -1, -1)]  # to larger scales, and to negative ones
    for longer in (False, True) if beyond else (False,):
        best = Reached(place, wanted, None, None, None, kept)
        for way in (way for way in ways if len(way) > 1):
            far = np.abs(scales[way])
            scale = float(_crossing(*_prolonged(far, values[:, way], longer), low, high)[0])
            if not np.isfinite(scale) or (best.scale is not None and abs(best.scale) <= scale):
                continue
            sign = float(np.sign(scales[way[-1]]))
            ends = None
            if draws is not None:
                spread = _crossing(*_prolonged(far, draws[:, way], longer), low, high)
                inside = (draws[:, start] >= low) & (draws[:, start] <= high)
                ends = _interval(np.where(inside == kept, spread, 0.0), scale, sign)
            best = Reached(place, wanted, sign * scale, *(ends or (None, None)), kept, longer)
        if best.scale is not None:
            break
    return best


def _draws(metrics: Sequence[Metric]) -> Float[np.ndarray, "resamples scales"] | None:
    """The bootstrap's draws of one number at every scale, or None where these cannot be paired."""
    kept = [one.samples for one in metrics if one.samples is not None]
    if len(kept) < len(metrics) or len({(one.scorer, one.data, one.n) for one in metrics}) > 1:
        return None
    return np.stack(kept, axis=1)


def _band(metric: Metric, wanted: float) -> tuple[float, float]:
    """Between which values the target is met; of a number that is to stay, which changes."""
    if metric.direction == "lower":
        return -np.inf, wanted
    if metric.direction == "higher":
        return wanted, np.inf
    middle = 0.0 if metric.direction == "same" else metric.ideal
    half = abs(wanted - (metric.value if metric.direction == "same" else metric.ideal))
    return middle - half, middle + half


def _prolonged(
    scales: Float[np.ndarray, " scales"], curves: Float[np.ndarray, "draws scales"], longer: bool
) -> tuple[np.ndarray, np.ndarray]:
    if not longer:
        return scales, curves
    slope = (curves[:, -1] - curves[:, -2]) / (scales[-1] - scales[-2])
    end = BEYOND * scales[-1]
    return np.append(scales, end), np.column_stack([curves, curves[:, -1] + slope * (end - scales[-1])])


def _crossing(
    scales: Float[np.ndarray, " scales"], curves: Float[np.ndarray, "draws scales"], low: float, high: float
) -> Float[np.ndarray, " draws"]:
    """The first scale at which each curve of straight lines enters low..high or, starting inside, leaves it; or inf."""
    found = np.full(len(curves), np.inf)
    for n in reversed(range(len(scales) - 1)):  # the first crossing is written last
        a, b = curves[:, n], curves[:, n + 1]
        inside = (low <= a) & (a <= high)
        edge = np.where(a > high, high, np.where(a < low, low, np.where(b > high, high, low)))
        crosses = np.where(inside, (b < low) | (b > high), np.where(a > high, b <= high, b >= low))
        share = np.zeros(len(curves))
        np.divide(edge - a, b - a, out=share, where=crosses)
        found = np.where(crosses, scales[n] + share * (scales[n + 1] - scales[n]), found)
    return found


def _interval(spread: Float[np.ndarray, " draws"], scale: float, sign: float) -> tuple[float | None, float | None]:
    near = min(float(np.quantile(spread, 0.025, method="lower")), scale)
    far = max(float(np.quantile(spread, 0.975, method="higher")), scale)
    ends = sorted((sign * near, sign * far))
    return tuple(end if np.isfinite(end) else None for end in ends)  # type: ignore[return-value]


def changes(found: Sequence[Dosed], places: Sequence[str]) -> dict[float, dict[str, Difference]]:
    """The paired difference from scale 0 of each of ``places`` at each other scale; all intervals hold together."""
    untouched = next(one for one in found if one.scale == 0).flat
    axes = len(places) * (len(found) - 1)
    return {
        one.scale: {
            place: paired
            for place in places
            if place in one.flat
            and place in untouched
            and (paired := difference(untouched[place], one.flat[place], axes=axes)) is not None
        }
        for one in found
        if one.scale != 0
    }


def tables(found: Sequence[Dosed], places: Sequence[str]) -> list[Table]:
    """The numbers at each scale, and their paired differences from scale 0."""
    head = ["scale", *(place.replace(".", " ").replace("_", " ") for place in places)]
    shown = [one.flat[place].to_dict() for one in found[:1] for place in places]
    said = "; ".join(
        f"{name}: {one['scorer']}, on {one['data']}, n {one['n']}, ideal {ideal_of(one)}"
        for name, one in zip(head[1:], shown, strict=True)
    )
    values = [[f"{one.scale:g}", *(cell(one.flat[place].to_dict()) for place in places)] for one in found]
    apart = [
        [f"{scale:g}", *(_change(by.get(place)) for place in places)] for scale, by in changes(found, places).items()
    ]
    together = len(places) * (len(found) - 1)
    return [
        Table("At each scale", head, values, f"{said}. Brackets are 95 % bootstrap intervals."),
        Table(
            "Difference from scale 0", head, apart, f"Paired; 95 % intervals that hold over all {together} together."
        ),
    ]


def _change(one: Difference | None) -> str:
    return "not paired" if one is None else f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}] {one.verdict}"


def picture(found: Sequence[Dosed], places: Sequence[str], targets: Sequence[Reached] = ()) -> "Figure":
    """A panel for each of ``places``: the number with its 95 % interval by scale; dashed: a target and its scale."""
    figure = new_figure(4.2 * min(len(places), 3), 3.2 * -(-len(places) // 3))
    panels = figure.subplots(-(-len(places) // 3), min(len(places), 3), squeeze=False).ravel()
    scales = [one.scale for one in found]
    for axes, place in zip(panels, places, strict=False):
        metrics = [one.flat[place] for one in found]
        axes.fill_between(scales, [m.low for m in metrics], [m.high for m in metrics], color=BLUE, alpha=0.2, lw=0)
        axes.plot(scales, [m.value for m in metrics], color=BLUE, marker="o", ms=4)
        for one in (one for one in targets if one.place == place):
            axes.axhline(one.wanted, color=ORANGE, ls="--", lw=1)
            if one.scale is not None:
                axes.axvline(one.scale, color=ORANGE, ls="--", lw=1)
                if one.low is not None and one.high is not None:
                    axes.axvspan(one.low, one.high, color=ORANGE, alpha=0.15, lw=0)
        axes.axvline(0, color=GREY, lw=0.7, zorder=0)
        better = metrics[0].direction in ("lower", "higher")
        ideal = f"{metrics[0].direction} is better" if better else f"ideal {ideal_of(metrics[0].to_dict())}"
        axes.set_title(f"{place.replace('.', ' ').replace('_', ' ')} ({ideal})", fontsize=9)
        axes.set_xlabel("scale of the delta")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(places) :]:
        axes.set_visible(False)
    figure.set_label(f"{', '.join(places)} at scales {found[0].scale:g} to {found[-1].scale:g} of the delta")
    return figure
