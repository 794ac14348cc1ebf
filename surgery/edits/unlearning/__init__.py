"""Unlearning stereotypes (BiasUnlearn): losses, chunks, the kept reference, and the training that they steer."""

from surgery.edits.unlearning.batches import BatchSampler, Item
from surgery.edits.unlearning.dataset import Dataset, read_dataset
from surgery.edits.unlearning.early_stopping import RELEASED_TARGETS, Decision, EarlyStopping, decide, merit
from surgery.edits.unlearning.encoding import ANTI, STEREOTYPE, UNRELATED, EncodedTriples, boundary, encode_triples
from surgery.edits.unlearning.losses import ascent, batch_weights, dpo, kl, npo, npo_batch, retention
from surgery.edits.unlearning.reference_logprobs import Reference, reference
from surgery.edits.unlearning.split import Split, split_terms
from surgery.edits.unlearning.unlearn import Objective, Unlearned, batch_losses, trained_names, unlearn

__all__ = [
    "ANTI",
    "RELEASED_TARGETS",
    "STEREOTYPE",
    "UNRELATED",
    "BatchSampler",
    "Dataset",
    "Decision",
    "EarlyStopping",
    "EncodedTriples",
    "Item",
    "Objective",
    "Reference",
    "Split",
    "Unlearned",
    "ascent",
    "batch_losses",
    "batch_weights",
    "boundary",
    "decide",
    "dpo",
    "encode_triples",
    "kl",
    "merit",
    "npo",
    "npo_batch",
    "read_dataset",
    "reference",
    "retention",
    "split_terms",
    "trained_names",
    "unlearn",
]
