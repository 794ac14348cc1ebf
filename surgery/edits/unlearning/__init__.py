"""Unlearning stereotypes (BiasUnlearn): losses, chunks, the kept reference, and the training that they steer."""

from surgery.edits.unlearning.chunks import Chunks, Item
from surgery.edits.unlearning.control import RELEASED_TARGETS, Control, Decision, decide, merit
from surgery.edits.unlearning.encoding import ANTI, STEREOTYPE, UNRELATED, EncodedTriples, boundary, encode_triples
from surgery.edits.unlearning.given import Given, read_given
from surgery.edits.unlearning.losses import ascent, chunk_weights, dpo, kl, npo, npo_batch, retention
from surgery.edits.unlearning.scored import Reference, reference
from surgery.edits.unlearning.split import Split, split_terms
from surgery.edits.unlearning.unlearn import Objective, Unlearned, chunk_losses, unlearn

__all__ = [
    "ANTI",
    "RELEASED_TARGETS",
    "STEREOTYPE",
    "UNRELATED",
    "Chunks",
    "Control",
    "Decision",
    "EncodedTriples",
    "Given",
    "Item",
    "Objective",
    "Reference",
    "Split",
    "Unlearned",
    "ascent",
    "boundary",
    "chunk_losses",
    "chunk_weights",
    "decide",
    "dpo",
    "encode_triples",
    "kl",
    "merit",
    "npo",
    "npo_batch",
    "read_given",
    "reference",
    "retention",
    "split_terms",
    "unlearn",
]
