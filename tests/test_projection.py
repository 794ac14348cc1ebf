"""Random projections keep inner products, depend on nothing but their settings, and agree with a plain count sketch."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.attribution import random_projection as module
from surgery.attribution.random_projection import KINDS, RandomProjection
from surgery.errors import SurgeryError
from surgery.files.rounding import hash64


def pair(size: int, cosine: float, seed: int = 0) -> torch.Tensor:
    """Two vectors of length about sqrt(size) with about that cosine."""
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    x[1] = cosine * x[0] + math.sqrt(1 - cosine**2) * x[1]
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [pair(1000, 0.5), pair(100, -0.9), torch.ones(2, 1500)], ids=["a", "short", "constant"])
def test_inner_products_are_unbiased_with_the_variance_of_theory(kind: str, x: torch.Tensor) -> None:
    """Over 400 seeds, at 64 numbers, a vector without any randomness of its own included."""
    products = np.empty(400)
    for seed in range(400):
        y = RandomProjection(kind, 64, seed)("layer", x)
        products[seed] = y[0] @ y[1]
    truth = float(x[0] @ x[1])
    bound = math.sqrt((float(x[0].norm() * x[1].norm()) ** 2 + truth**2) / 64)
    assert abs(products.mean() - truth) < 4 * products.std() / 20
    assert 0.5 * bound < products.std() < 1.15 * bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_depends_on_kind_size_seed_and_name(kind: str) -> None:
    x = pair(500, 0)[:1]
    base = RandomProjection(kind, 64, 0)("a", x)
    assert torch.equal(RandomProjection(kind, 64, 0)("a", x), base)
    for other in (RandomProjection(kind, 64, 1)("a", x), RandomProjection(kind, 64, 0)("b", x)):
        assert not torch.allclose(other, base, atol=0.1)
    assert RandomProjection(kind, 96, 0)("a", x).shape == (1, 96)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 60)),
    dim=st.integers(1, 130),
    portion=st.integers(1, 5000),
)
def test_linear_and_the_same_alone_in_a_batch_and_in_portions(
    kind: str, shape: tuple[int, int], dim: int, portion: int
) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(dim))
    project = RandomProjection(kind, dim, 5)
    whole = project("layer", x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PORTION", portion)
        alone = torch.cat([project("layer", row[None]) for row in x])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(project("layer", x[:1] + 2 * x[1:2]), whole[:1] + 2 * whole[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 64, 65, 1000])
def test_every_coordinate_goes_to_one_bucket_with_a_sign(size: int) -> None:
    """The matrix of a sketch has one +-1 in each row; coordinates of one block never meet."""
    matrix = RandomProjection("count_sketch", 64, 3)("layer", torch.eye(size))
    assert (matrix.abs().sum(1) == 1).all() and (matrix.abs().amax(1) == 1).all()
    buckets = matrix.abs().argmax(1)
    for start in range(0, size, 64):
        block = buckets[start : start + 64]
        assert len(block.unique()) == len(block)
    if size == 1000:
        assert abs(float(matrix.sum())) < 4 * math.sqrt(size)  # signs balance


def test_buckets_and_signs_of_a_pair_are_independent() -> None:
    """Two coordinates of different blocks meet once in `dim` seeds, with either sign as often."""
    x = torch.zeros(2, 200)
    x[0, 3], x[1, 150] = 1, 1
    products = [
        float(y[0] @ y[1]) for y in (RandomProjection("count_sketch", 16, seed)("a", x) for seed in range(1500))
    ]
    meetings = [value for value in products if value]
    assert abs(len(meetings) - 1500 / 16) < 4 * math.sqrt(1500 / 16)
    assert abs(sum(meetings)) < 4 * math.sqrt(len(meetings))


def test_the_dense_matrix_is_the_hash_s_bits() -> None:
    """Known answer, from numpy: the counter of word w of coordinate c is c * words + w, keyed by seed and name."""
    dim, size = 100, 9
    matrix = RandomProjection("rademacher", dim, 7)("x", torch.eye(size)) * math.sqrt(dim)
    key = int.from_bytes(hashlib.sha256(b"7\0x").digest()[:8], "little") >> 1
    counter = np.arange(2 * size, dtype=np.uint64) + np.uint64(key) + np.uint64(1 << 63)
    bits = (hash64(counter)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    expected = bits.reshape(size, 128)[:, :dim].astype(np.float32) * 2 - 1
    assert np.allclose(matrix.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"kind": "gaussian"}, {"dim": 0}, {"seed": -1}], ids=["kind", "dim", "seed"])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(SurgeryError, match="projection: got"):
        RandomProjection(**wrong)
