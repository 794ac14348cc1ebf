"""A model over several devices gives what it gives on one, and its blocks are shared out by size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, state
from twodevices import split

from hooks import anatomy
from surgery.devices import check_shares
from surgery.edits.block import fine_tune
from surgery.edits.equalize import equalize, hold_term, words_term
from surgery.edits.supervised import Lora
from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words, rank_blocks, token_losses
from surgery.training import Plan
from surgery.weights import TRAINED, on_disk, shares

IDS = [[5, 9, 11, 30], [7, 3], [8, 8, 21, 40, 2, 6], [4, 60, 33]]
WORDS = [12, 17]


def test_mixing_two_devices_is_an_error_there() -> None:
    model: Any = build("llama", num_hidden_layers=4)
    with split(model) as devices:
        first, last = (model.model.layers[place].mlp.up_proj.weight for place in (0, 3))
        assert str(first.device) == "cuda:0" and str(last.device) == "cuda:1" and str(model.device) == "cuda:0"
        with pytest.raises(RuntimeError, match="same device"):
            first + last
        assert str((first + last.to(first.device)).device) == "cuda:0"
        assert str(devices.of(model(torch.tensor([[1, 2]], device=model.device)).logits)) == "cuda:0"


def mixed(model: Any) -> Any:
    """The model in bfloat16, its last norm and its head in float32."""
    model.bfloat16()
    model.model.norm.float(), model.lm_head.float()
    return model


@pytest.mark.parametrize("kind", ["float32", "mixed"])
def test_what_is_located_measured_and_trained_over_two_devices_is_that_of_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = torch.autocast  # whose arithmetic is the CPU's here
    monkeypatch.setattr(torch, "autocast", lambda _, **given: cast("cpu", **given))
    one, two = (build("llama", num_hidden_layers=4) for _ in range(2))
    near = 1e-4
    if kind == "mixed":
        one, two, near = mixed(one), mixed(two), 0.1  # Adam divides small gradients by their own size
    before = state(two)

    def everything(model: Any) -> list[torch.Tensor]:
        found = rank_blocks(model, IDS, WORDS, keep=[2, 3])
        again = next_words(model, IDS, WORDS, prefix=found.prefixes[3])
        sums, _, _ = token_losses(model, IDS, prefix=token_losses(model, IDS, keep=[2])[2][2])
        plan = Plan(1e-3, 2, 2)
        edits = [
            fine_tune(model, IDS, WORDS, plan, blocks=[block], seed=0, prefix=found.prefixes.get(block)).differences
            for block in (3, 0)
        ]
        raw = found.importance.raw.scores
        return [*map(torch.as_tensor, (raw, again.probabilities, sums)), *(t for each in edits for t in each.values())]

    with split(two):
        assert anatomy.find(two).table() == anatomy.find(one).table()
        spread = everything(two)
    for wanted, found in zip(everything(one), spread, strict=True):
        with torch.no_grad():
            assert (found.double() - wanted.double()).norm() <= near * wanted.double().norm()
    assert state(two) == before


@pytest.mark.parametrize("how", [{}, {"lora": Lora(rank=2)}], ids=["dense", "lora"])
def test_equalising_blocks_of_both_devices_gives_what_it_gives_on_one(how: Any) -> None:
    one, two = (build("llama", num_hidden_layers=4) for _ in range(2))
    before = state(two)

    def differences(model: Any) -> list[torch.Tensor]:
        terms = [words_term(IDS, WORDS), hold_term("texts", [[9, 4, 31, 2, 8], [3, 5, 7, 11]], positions="all")]
        found = equalize(model, terms, Plan(1e-3, 2, 3), blocks=[1, 2], seed=0, **how)
        return list(found.differences.values())

    with split(two):
        spread = differences(two)
    for wanted, found in zip(differences(one), spread, strict=True):
        assert wanted.norm() > 0 and (found - wanted).norm() <= 1e-3 * wanted.norm()
    assert state(two) == before


def test_devices_are_filled_alike_when_the_last_block_trains() -> None:
    with torch.device("meta"):
        model: Any = build("llama", num_hidden_layers=40, hidden_size=64, intermediate_size=128)
    devices = [torch.device("cuda", number) for number in range(4)]
    found, weights = shares(model, torch.bfloat16, devices)
    held = dict.fromkeys(devices, 0)
    for name, parameter in model.named_parameters():
        (unit,) = [each for each in found if name.startswith(f"{each}.")]
        held[found[unit]] += 2 * parameter.numel()
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert held == weights
    held[devices[-1]] += TRAINED * block
    assert max(held.values()) - min(held.values()) <= 3 * block  # a block and a half in 16 bits
    order = [found[f"model.layers.{number}"].index for number in range(40)]
    assert order == sorted(order) and found["model.rotary_emb"] == devices[0]


def test_a_card_too_small_for_its_share_is_said_with_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (torch.device("cuda", number) for number in range(2))
    monkeypatch.setattr("surgery.devices.free_memory", lambda place: {one: 50 * 10**9, two: 2 * 10**9}[place])
    check_shares(tmp_path, {one: 40 * 10**9, two: 10**9})
    with pytest.raises(SurgeryError, match=r"cuda:1 has 2\.0 GB free, expected 3\.0 .*cuda:0 40\.0, cuda:1 3\.0"):
        check_shares(tmp_path, {one: 40 * 10**9, two: 3 * 10**9})


def test_weights_are_read_by_others_where_they_are_no_plain_floats(tmp_path: Path, checkpoint: Path) -> None:
    place = torch.device("cuda", 1)
    found = on_disk(
        checkpoint, {"model.layers.1": place, "model": torch.device("cuda", 0), "": torch.device("cuda", 2)}
    )
    assert found is not None
    assert found["model.layers.1.mlp.up_proj.weight"].device == place
    assert found["model.layers.0.mlp.up_proj.weight"].device.index == 0
    assert on_disk(tmp_path, {"": place}) is None
