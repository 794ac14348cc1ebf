"""Equalise and hold: share the compared words' mass out anew, and keep every distribution that must not move."""

from surgery.edits.equalize.passes import Prepared, losses_of, losses_untouched
from surgery.edits.equalize.target import TOP, divergence, even_out, keep, share_out
from surgery.edits.equalize.terms import Term, hints_term, hold_term, words_term
from surgery.edits.equalize.training import equalize, prepare, prepare_each

__all__ = [
    "TOP",
    "Prepared",
    "Term",
    "divergence",
    "equalize",
    "even_out",
    "hints_term",
    "hold_term",
    "keep",
    "losses_of",
    "losses_untouched",
    "prepare",
    "prepare_each",
    "share_out",
    "words_term",
]
