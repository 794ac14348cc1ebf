"""What is done about the texts that carry a bias: a mitigation, and the score that selects its texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.bias_diff.dataset import Material
from surgery.attribution.scoring import METHODS
from surgery.attribution.select import CONTROLS
from surgery.errors import SurgeryError

WITHOUT_TEXTS = ("prompt", "scaled")  # controls that treat no texts: words before a sentence, a weaker warm-up
MITIGATIONS = ("retrain", "npo", "multi", "ascent", "margin")


@dataclass(frozen=True)
class Variant:
    """One thing done about the bias: how, and by which score its texts were selected."""

    mitigation: str
    by: str

    @property
    def name(self) -> str:
        """How it is called in ``run.json``; without a score it is the selection of ``select_by``."""
        return self.mitigation if self.by == "selected" else f"{self.mitigation}:{self.by}"


def cases_of(mitigation: str, select_by: str, controls: Sequence[str], material: Material) -> list[Variant]:
    """The main case and those of ``controls``; raises ``SurgeryError`` for what is unknown or lacks its material."""
    every = (*METHODS, *CONTROLS, "tfidf_contrast", "labels")
    cases = [Variant(mitigation, "selected")]
    for control in dict.fromkeys(controls):
        first, _, second = control.partition(":")
        how, by = (first, second or "selected") if first in (*MITIGATIONS, *WITHOUT_TEXTS) else (mitigation, first)
        if by not in (*every, "selected") or (second and first not in MITIGATIONS):
            known = ", ".join((*MITIGATIONS, *WITHOUT_TEXTS, *every))
            raise SurgeryError(f"controls: got {control!r}, expected a score, a mitigation or both of {known}")
        cases.append(Variant(how, by))
    wanted = {select_by, *(case.by for case in cases)}
    if not material.twin_of and any(case.mitigation == "margin" for case in cases):
        raise SurgeryError(
            f"mitigation: 'margin' needs a twin of each text to forget, and {material.name} has none; take npo or multi"
        )
    if material.biased is None and (missing := sorted(wanted & {"labels", "best"})):
        raise SurgeryError(f"select_by: {missing[0]!r} needs labels, and {material.name} has none; select by a score")
    if not material.twinned and (missing := sorted(wanted & {"contrast", "tfidf_contrast"})):
        raise SurgeryError(
            f"select_by: {missing[0]!r} needs the probe's anti-stereotypes (column anti); select by influence"
        )
    return list(dict.fromkeys(cases))


def best_of(selection: Mapping[str, Any]) -> str:
    """The score that covers most of the labelled rows, of ``selection`` as it stands in ``run.json``."""
    covered = {name: found["coverage"]["value"] for name, found in selection.items() if "coverage" in found}
    return max(covered, key=lambda name: covered[name])
