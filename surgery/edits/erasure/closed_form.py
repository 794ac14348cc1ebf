"""The projections, from states with two labels: LEACE, INLP, SentenceDebias, DAMA's least squares, and random ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.modules.projection import Projection

METHODS = ("leace", "inlp", "sentence_debias", "dama", "random")
CHANCE = 0.02  # a reader that is right by no more than this above the larger class knows nothing


def leace(x: Float[Tensor, "n width"], z: Int[Tensor, " n"]) -> Projection:
    """Least-squares concept erasure (Belrose et al. 2023, Theorem 4.3), through the library concept-erasure.

    Of all affine maps after which no linear reader does better than a constant, the one that moves ``x`` least.
    Raises ``SurgeryError`` where the library is not installed.
    """
    try:
        from concept_erasure import LeaceEraser
    except ImportError:
        raise SurgeryError(
            "leace: the package concept-erasure is not installed; pip install 'model-surgery[erasure]'"
        ) from None
    eraser = LeaceEraser.fit(x.double(), z.double()[:, None])
    offset = eraser.proj_left @ (eraser.proj_right @ eraser.bias)
    return _ready(eraser.proj_left, eraser.proj_right, offset)


def sentence_debias(x: Float[Tensor, "n width"], z: Int[Tensor, " n"], rank: int) -> Projection:
    """SentenceDebias (Liang et al. 2020): out go the first ``rank`` principal components of pairs around their mean.

    Rows 2i and 2i + 1 are a pair that differs in its group alone.

    Raises ``SurgeryError`` for rows that are not such pairs.
    """
    if len(x) % 2 or bool((z[0::2] == z[1::2]).any()):
        raise SurgeryError("sentence_debias: expected pairs of rows, one of each group, one behind the other")
    pairs = x.double().reshape(-1, 2, x.shape[1])
    around = (pairs - pairs.mean(1, keepdim=True)).flatten(0, 1)
    # The two halves of a pair are opposite, so that the mean of all is 0 and the components are those of the matrix.
    return _orthogonal(torch.linalg.svd(around, full_matrices=False).Vh[:rank])


def inlp(x: Float[Tensor, "n width"], z: Int[Tensor, " n"], rank: int, seed: int) -> Projection:
    """Iterative null-space projection (Ravfogel et al. 2020): reader after reader, each on what the others left.

    At most ``rank`` readers; it ends when one is no better than chance on a fifth of the rows that it did not see.
    The projection is onto the common null space of all their directions.
    """
    x = x.double()
    mean, z = x.mean(0), z.to(x.device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, seen = order[: len(x) // 5], order[len(x) // 5 :]
    chance = max(float((z[held] == label).double().mean()) for label in (0, 1))
    found: list[Tensor] = []
    for _ in range(rank):
        left = x - mean if not found else _orthogonal(torch.stack(found))(x - mean)
        direction, bias = _reader(left[seen], z[seen])
        found.append(direction)
        right = ((left[held] @ direction + bias > 0).long() == z[held]).double().mean()
        if right <= chance + CHANCE:
            break
    return _orthogonal(torch.stack(found))


def dama(written: Float[Tensor, "n width"], wanted: Float[Tensor, "n width"], rank: int) -> Projection:
    """DAMA (Limisiewicz et al. 2024): the directions of what an MLP writes that covary with what would turn the word.

    ``wanted``: what would have to be written for "he" minus what would for "she". Partial least squares of it on
    ``written`` gives ``rank`` directions, and the projection is onto the complement of their span.

    Raises ``SurgeryError`` where the two do not vary together.
    """
    x, y = written.double() - written.double().mean(0), wanted.double() - wanted.double().mean(0)
    weights = []
    for _ in range(min(rank, len(x) - 1, x.shape[1])):
        crossed = x.mT @ y
        if crossed.norm() <= 1e-12 * max(1.0, float(x.norm() * y.norm())):
            break
        weight = torch.linalg.svd(crossed, full_matrices=False).U[:, 0]
        score = x @ weight
        score = score / score.norm()
        weights.append(weight)
        x = x - torch.outer(score, score @ x)
        y = y - torch.outer(score, score @ y)
    if not weights:
        raise SurgeryError("dama: what is written does not vary with what is wanted; give more prompts")
    return _orthogonal(torch.stack(weights))


def random(width: int, rank: int, seed: int, device: torch.device | str = "cpu") -> Projection:
    """The control: as many directions, drawn at random."""
    drawn = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _orthogonal(drawn.to(device))


def fit(name: str, x: Float[Tensor, "n width"], z: Int[Tensor, " n"], *, rank: int, seed: int) -> Projection:
    """The projection by its method's name, of states ``x`` with labels ``z`` (0 or 1), all but DAMA's.

    Raises ``SurgeryError`` for an unknown method, and labels that are not two.
    """
    if set(z.tolist()) != {0, 1}:
        raise SurgeryError(f"{name}: expected rows of two groups, got labels {sorted(set(z.tolist()))}")
    if name == "leace":
        return leace(x, z)
    if name == "sentence_debias":
        return sentence_debias(x, z, rank)
    if name == "inlp":
        return inlp(x, z, rank, seed)
    if name == "random":
        return random(x.shape[1], rank, seed, x.device)
    raise SurgeryError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")


def _reader(x: Float[Tensor, "n width"], z: Int[Tensor, " n"]) -> tuple[Float[Tensor, " width"], float]:
    """A logistic regression with a little weight decay: its direction and bias."""
    size = x.square().mean().sqrt().clamp(min=1e-12)
    weight = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    target = z.to(x)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(x / size @ weight + bias, target)
        value = value + 1e-3 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (weight / size).detach(), float(bias.detach())


def _orthogonal(directions: Float[Tensor, "rank width"]) -> Projection:
    """Onto the complement of the span of the directions."""
    basis = torch.linalg.svd(directions.double(), full_matrices=False)
    kept = basis.Vh[basis.S.max() * 1e-9 < basis.S]
    return _ready(kept.mT, kept, torch.zeros_like(kept[0]))


def _ready(left: Tensor, right: Tensor, offset: Tensor) -> Projection:
    return Projection(left.detach().contiguous(), right.detach().contiguous(), offset.detach().contiguous())
