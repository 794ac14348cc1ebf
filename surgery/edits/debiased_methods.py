"""CrAWD and its baselines as settings: what is trained by which method, against which words, in which form."""

from dataclasses import dataclass, field, replace
from typing import Any

from surgery.edits.supervised import Lora

METHODS = ("crawd", "vanilla", "debias_tuning", "ibm", "deep_soft_debias")
FORMS = ("printed", "cross_off", "module_off", "projection", "projected", "wide_head")
"""Of CrAWD: the paper's, and ours (see ``Method.form``)."""
OBJECTIVES = {
    "crawd": "token cross-entropy with the cross-attention module",
    "vanilla": "token cross-entropy",
    "debias_tuning": "token cross-entropy + weight * -log(1 - P(any reference word))",
    "ibm": "token cross-entropy + weight * attention to tokens similar to the reference words",
    "deep_soft_debias": "token cross-entropy; afterwards the embeddings through a network that flattens the bias",
}


@dataclass(frozen=True)
class Method:
    """What is trained, and against which words."""

    name: str = "crawd"
    reference: tuple[str, ...] = ("he", "she")
    """The sensitive words: keys of the cross-attention, and what the baselines' terms look for."""
    weight: float = 0.0
    """Of the method's own term. CrAWD's own is none; above 0 it gets Debias Tuning's beside the module."""
    penalised: tuple[str, ...] = ()
    """Words of Debias Tuning's term, where they are not the reference words (CrAWD Table 3)."""
    lora: Lora | None = field(default_factory=Lora)
    """None trains CrAWD's module alone."""
    form: str = "printed"
    """Of CrAWD's module. printed: the paper's, from a map [I, 0], with which training starts from the model.

    Ours: cross_off is trained so and stored without what the cross-attention adds (the map of H_x stays), module_off is
    stored as the identity, so that the factors alone remain. projection: the decay acts on H_x, of which 1 - decay of
    the part along the reference words' rows in the head goes; this map is fixed, and the factors train below it.
    projected: the factors train alone and are stored with such a projection about the
    mean state of the training texts.
    wide_head: the map from [H_x, H_cross] starts at random, as a new head of width 2d does."""
    module: dict[str, Any] = field(default_factory=dict)
    """Settings of ``cross_attention.attached``: top_percent, decay, scope, heads, ffn, renormalise, dropout."""
    module_rate: float = 1.0
    """The module's learning rate over the plan's: what is right for LoRA factors is too fast for whole matrices."""


def factors_of(method: Method) -> Method:
    """What trains the factors of the form projected: plain fine-tuning, or Debias Tuning where there is a weight."""
    return replace(method, name="debias_tuning" if method.weight else "vanilla", form="printed")
