"""Closed-form erasure: each projection does what its paper defines, folds exactly, and leaves the model as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, state
from torch import Tensor

import surgery
from recipes import erase as recipe
from surgery.data.prompts import load_prompt_set
from surgery.delta import Delta
from surgery.edits.erasure import erase, fit, writers_of
from surgery.edits.erasure.closed_form import dama, inlp, leace, random, sentence_debias
from surgery.edits.erasure.dama_values import Search, Subjects, subjects, values
from surgery.edits.erasure.folding import written
from surgery.errors import SurgeryError
from surgery.metrics.material import fewer, material
from surgery.metrics.suite import measure
from surgery.modules import projection as modules


def groups(n: int = 240, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated states in pairs; the second group is moved along one direction, and a little along another."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=draw, dtype=torch.float64) @ torch.randn(
        width, width, generator=draw, dtype=torch.float64
    )
    z = torch.arange(n) % 2
    x[z == 1] += 3.0 * torch.randn(width, generator=draw, dtype=torch.float64)
    return x + 5.0, z


def covariance(x: Tensor, z: Tensor) -> Tensor:
    z = z.double() - z.double().mean()
    return (x - x.mean(0)).mT @ z / len(x)


def test_leace_leaves_no_covariance_and_moves_least() -> None:
    x, z = groups()
    made = leace(x, z)
    after = made(x)
    assert covariance(after, z).norm() < 1e-8 * covariance(x, z).norm()  # Theorem 3.1: no linear reader sees z
    torch.testing.assert_close(after.mean(0), x.mean(0))  # affine: the mean stays
    assert made.settings == {"width": 12, "rank": 1}
    # Among projections with the same kernel condition, the orthogonal one moves x more in the whitened norm (Eq. 1).
    orthogonal = sentence_debias(x, z, 12)
    assert (after - x).square().sum() < (orthogonal(x) - x).square().sum()


def test_sentence_debias_takes_out_the_first_component_of_the_pairs() -> None:
    x, z = groups()
    differences = x[1::2] - x[0::2]
    first = torch.linalg.eigh(differences.mT @ differences).eigenvectors[:, -1]
    made = sentence_debias(x, z, 1)
    torch.testing.assert_close(made(x), x - torch.outer(x @ first, first))
    with pytest.raises(SurgeryError, match="pairs of rows"):
        sentence_debias(x[:-1], z[:-1], 1)


def test_inlp_ends_when_no_reader_is_left() -> None:
    x, z = groups(n=400)
    made = inlp(x, z, 12, seed=0)
    assert 1 <= made.settings["rank"] < 12
    basis = made.right
    torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64))
    torch.testing.assert_close(made(x) @ basis.mT, torch.zeros(len(x), len(basis), dtype=torch.float64))
    # A fresh least-squares reader of what is left is right about as often as a coin.
    left = torch.cat([made(x), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    guess = left[100:] @ torch.linalg.lstsq(left[:100], z[:100].double()[:, None], driver="gelsd").solution > 0.5
    assert (guess[:, 0].long() == z[100:]).double().mean() < 0.75
    before = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    seen = before[100:] @ torch.linalg.lstsq(before[:100], z[:100].double()[:, None]).solution > 0.5
    assert (seen[:, 0].long() == z[100:]).double().mean() > 0.85


def test_dama_projects_onto_the_complement_of_what_covaries() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(60, 10, generator=draw, dtype=torch.float64)
    y = x[:, :3] @ torch.randn(3, 10, generator=draw, dtype=torch.float64)
    centred = (x - x.mean(0)).mT @ (y - y.mean(0))
    one = dama(x, y, 1)
    torch.testing.assert_close(one.right[0].abs(), torch.linalg.svd(centred).U[:, 0].abs())  # PLS's first weights
    many = dama(x, y, 10)
    assert many.settings["rank"] == 3 or many.settings["rank"] <= 10
    assert torch.linalg.norm((many(x) - many(x).mean(0)).mT @ (y - y.mean(0))) < 1e-6 * centred.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_a_fold_is_the_projection_of_what_is_written(family: str) -> None:
    model = build(family)
    before = state(model)
    ids = ((5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16), (17, 18))
    (name,) = writers_of(model, [1], ["mlp"])
    was = written(model, ids, name)
    made: dict[str, Any] = {}

    def chosen(place: str, states: Tensor) -> modules.Projection:
        offset = torch.linspace(-1, 1, states.shape[1], dtype=torch.float64)
        drawn = random(states.shape[1], 2, 3)
        made[place] = modules.Projection(drawn.left, drawn.right, offset)
        return made[place]

    found = erase(model, ids, [name], chosen)
    assert state(model) == before
    biased = f"{name}.bias" in found.differences
    assert biased == (family in ("gpt2", "opt")) and (found.mean_lost == (name,)) == (not biased)
    with torch.no_grad():
        for key, difference in found.differences.items():
            model.get_parameter(key).add_(difference)
    wanted = made[name](was) - (0 if biased else made[name].offset)
    torch.testing.assert_close(written(model, ids, name), wanted, rtol=1e-4, atol=1e-5)


def test_blocks_are_erased_one_after_the_other() -> None:
    model = build("llama")
    ids = tuple((3 + n, 7, 5 + n % 3, 11) for n in range(20))
    z = torch.arange(20) % 2
    names = writers_of(model, [0, 2], ["attention", "mlp"])
    assert [name.split(".")[-1] for name in names] == ["o_proj", "down_proj"] * 2
    found = erase(model, ids, names, lambda _, x: fit("leace", x, z, rank=1, seed=0))
    assert list(found.ranks) == names and set(found.ranks.values()) == {1}
    with torch.no_grad():
        for key, difference in found.differences.items():
            model.get_parameter(key).add_(difference)
    # Fitted on the edited model, the last place has nothing left to read, which a joint fit would not give.
    assert covariance(written(model, ids, names[-1]), z).abs().max() < 1e-5


def test_a_matrix_that_is_none_is_refused() -> None:
    with pytest.raises(SurgeryError, match="no single matrix"):
        writers_of(build("mixtral"), [0], ["mlp"])
    with pytest.raises(SurgeryError, match="blocks 0 to 2"):
        writers_of(build("llama"), [7], ["mlp"])


def test_damas_value_makes_the_word_likelier() -> None:
    model = build("llama")
    before = state(model)
    ids = ((5, 6, 7, 8), (9, 10, 11))
    given = Subjects(ids, torch.tensor([1, 1]), ((5, 6, 20), (9, 10, 20)), torch.tensor([1, 1]))
    (name,) = writers_of(model, [1], ["mlp"])
    lengths = written(model, ids, name, given.ends).norm(dim=-1)
    value = values(model, given, name, 40, Search(rate=float(lengths.mean()) / 4))
    assert state(model) == before and value.shape == (2, 32)
    assert (value.norm(dim=-1) <= 4.0 * lengths * 1.001).all()

    def chance(add: float) -> Tensor:
        def put(_: Any, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, 1] += add * value[0].float()
            return output

        handle = model.get_submodule(name).register_forward_hook(put)
        try:
            with torch.no_grad():
                return model(torch.tensor([ids[0]])).logits[0, -1].softmax(-1)[40]
        finally:
            handle.remove()

    assert chance(1.0) > chance(0.0)


def test_subjects_end_at_their_last_token(tiny: Any) -> None:
    found = subjects(
        tiny[1], ["The nurse smiled because", "As usual, the film director sat"], ["nurse", "film director"]
    )
    assert [tiny[1].decode(row[end]) for row, end in zip(found.ids, found.ends, strict=True)] == ["nurse", "director"]
    with pytest.raises(SurgeryError, match="does not hold its subject"):
        subjects(tiny[1], ["The nurse"], ["judge"])


@pytest.mark.parametrize(
    "settings", [{"method": "leace"}, {"method": "dama", "block": [1], "search_steps": 2, "controls": []}]
)
def test_the_recipe_writes_what_was_measured(settings: Any, tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    before = state(tiny[0])
    ready = recipe.Settings(model=str(checkpoint), prompts=12, test_rows=90, **settings)
    found = recipe.run(*tiny, ready, out=tmp_path / "run").summary
    assert state(tiny[0]) == before
    assert found["verdict"][0].startswith({"leace": "LEACE", "dama": "DAMA"}[settings["method"]])
    gaps = [one["genbias"]["afgb"]["all"]["value"] for one in (found["before"], found["after"])]
    assert gaps[0] != gaps[1]
    delta = Delta.load(tmp_path / "run" / "delta.safetensors")
    assert delta.kind == ("module" if settings["method"] == "leace" else "dense")
    model, tokenizer = surgery.load(checkpoint, deltas=[tmp_path / "run" / "delta.safetensors"])
    asked = fewer(material(model, tokenizer, load_prompt_set("genbias"), suites=["genbias"]), {"genbias": 90})
    again = measure(model, asked).scores["genbias"]["afgb"]["all"].value
    assert again == pytest.approx(gaps[1], rel=2e-2)
    if settings["method"] == "leace":
        assert found["controls"]["random"]["edit"]["ranks"] == found["edit"]["ranks"]
        with delta.applied(tiny[0], scale=0.0):
            same = measure(tiny[0], asked).scores["genbias"]["afgb"]["all"].value
        assert same == pytest.approx(gaps[0], rel=1e-6)
    assert state(tiny[0]) == before


def test_what_does_not_go_together_is_refused(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"method": "dama", "site": "head"}, "expected mlp"),
        ({"controls": ["x"]}, "expected random"),
    ):
        with pytest.raises(SurgeryError, match=message):
            recipe.run(*tiny, recipe.Settings(model=str(checkpoint), **settings), out=tmp_path / "r")
