"""Unlearning stereotypes (BiasUnlearn): losses, chunks, the kept reference, and the training that they steer."""

from surgery.edits.unlearning.batches import BatchSampler, Item
from surgery.edits.unlearning.dataset import Dataset, read_dataset
from surgery.edits.unlearning.early_stopping import RELEASED_TARGETS, Decision, EarlyStopping, decide, merit
from surgery.edits.unlearning.encoding import ANTI, STEREOTYPE, UNRELATED, EncodedTriples, boundary, encode_triples
from surgery.edits.unlearning.losses import ascent, batch_weights, dpo, kl, npo, npo_batch, preference, retention
from surgery.edits.unlearning.objective import PUSHES, Objective, batch_losses, gradients_of_terms, push
from surgery.edits.unlearning.reference_logprobs import Reference, reference
from surgery.edits.unlearning.split import Split, split_terms
from surgery.edits.unlearning.unlearn import Unlearned, trained_names, unlearn
from surgery.edits.unlearning.watching import Scores

__all__ = [
    "ANTI",
    "PUSHES",
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
    "Scores",
    "Split",
    "Unlearned",
    "ascent",
    "batch_losses",
    "batch_weights",
    "boundary",
    "decide",
    "dpo",
    "encode_triples",
    "gradients_of_terms",
    "kl",
    "merit",
    "npo",
    "npo_batch",
    "preference",
    "push",
    "read_dataset",
    "reference",
    "retention",
    "split_terms",
    "trained_names",
    "unlearn",
]
