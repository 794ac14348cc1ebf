"""Erasing a concept that a linear reader can see, in closed form: LEACE, INLP, SentenceDebias, DAMA's projection.

    made = erase(model, encode(tokenizer, texts), labels, Method("leace"), blocks=[20, 21], parts=["mlp"])
    made.differences                     # of the matrices that write into the stream, as surgery.delta.make takes them

The projection of what a matrix W writes is folded into it, W' = P W, so that the edit is an ordinary dense delta. An
affine offset goes into the matrix's bias; where the architecture has none, the erased mean is not put back.
"""

from surgery.edits.erasure.closed_form import METHODS, fit
from surgery.edits.erasure.folding import Erased, erase, erase_last, fold, writers_of

__all__ = ["METHODS", "Erased", "erase", "erase_last", "fit", "fold", "writers_of"]
