"""Every text family that transformers can build tiny, against every capability: `python -m tests.matrix --all`.

Each cell is "works" (the result equals one from outside: a plain forward pass, transformers' own hidden states, the
bytes on disk), "refused" with the project's reason, or "wrong": another result, or a traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hooks
import surgery
from hooks import HookError, anatomy
from surgery.errors import SurgeryError
from tests.families import state
from tests.matrix_table import COLUMNS, KINDS, Family, Row, logged, markdown
from tests.tiny_configs import tiny
from tests.tiny_tokenizer import tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20], [21, 22, 23, 24]]
WORDS = (30, 31)
LARGEST = 3_000_000  # parameters: a family that stays larger has sizes that nobody made small


class Wrong(Exception):
    """A result that is not the right one."""


class NotMade(Exception):
    """An earlier column did not make what this one needs."""


class Refused(Exception):
    """What the test itself cannot ask of this family, and why."""


def families() -> list[Family]:
    """Every class that transformers' three text mappings name, once a kind."""
    from transformers.models.auto import modeling_auto

    found: dict[tuple[str, str], Family] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names[:1]:
                found.setdefault((kind, name), Family(kind, model_type, name))
    return list(found.values())


def built(family: Family) -> Any:
    """A tiny random model in evaluation mode, far from the identity. Raises what transformers raises."""
    import transformers

    model_class = getattr(transformers, family.name)
    settings = {"is_decoder": family.kind == "causal"} if family.model_type == "reformer" else {}
    config = tiny(model_class.config_class, **settings)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise Refused(f"{size / 1e6:.0f} M parameters with small settings: other media have fixed sizes")
    torch.manual_seed(0)
    model = model_class(config).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # the others are no weights (sinusoids)
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # 0.02 leaves the blocks near the identity
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = plain(model, PROMPTS[0])
        if not bool(logits.isfinite().all()) or float(logits.abs().max()) > 1e3:
            for name, parameter in model.named_parameters():  # recurrences explode
                parameter.copy_(before[name])
            logits = plain(model, PROMPTS[0])
    if not bool(logits.isfinite().all()):
        raise Refused("random weights give values that are not finite")
    if logits.shape[-1] < WORDS[1]:
        raise Refused(f"{logits.shape[-1]} outputs are no vocabulary")
    return model


@torch.no_grad()
def plain(model: Any, prompt: list[int]) -> Tensor:
    """The model's own logits of one prompt without padding, mask or positions: (pos vocab)."""
    given = {"input_ids": torch.tensor([prompt])}
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:  # as training would shift the labels
            start = int(model.prepare_decoder_input_ids_from_labels(torch.full((1, 2), 3))[0, 0])
        given["decoder_input_ids"] = torch.tensor([[start]])
    return model(**given, **no_cache(model)).logits[0].float()


def no_cache(model: Any) -> dict[str, bool]:
    from hooks.trace_modules import forward_arguments

    return {"use_cache": False} if "use_cache" in forward_arguments(model) else {}


def near(found: Any, right: Any, what: str, tolerance: float = 1e-4) -> None:
    """Raises Wrong where the numbers differ by more than `tolerance` of the largest."""
    found, right = torch.as_tensor(found).double(), torch.as_tensor(right).double()
    if found.shape != right.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)}, right {tuple(right.shape)}")
    if not found.numel():
        return
    gap = float((found - right).abs().max() / right.abs().max().clamp(min=1e-30))
    if not gap <= tolerance:
        raise Wrong(f"{what}: off by {gap:.1e} of the largest")


class Trial:
    """One family on its way through the columns; what a column makes, later ones use."""

    def __init__(self, family: Family, model: Any, folder: Path) -> None:
        self.family, self.model, self.folder = family, model, folder

    def __getattr__(self, name: str) -> Any:
        if name in ("differences", "loaded", "edited"):
            raise NotMade
        raise AttributeError(name)

    def open(self) -> None:
        self.base = self.folder / "base"
        self.model.save_pretrained(self.base)
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(self.base)
        right = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        opened, _ = surgery.load(self.base, device="cpu")
        if type(opened) is not type(self.model):
            raise Wrong(f"opened as {type(opened).__name__}")
        for name, tensor in opened.state_dict().items():
            if name not in right or not torch.equal(tensor, right[name].to(tensor.dtype)):
                raise Wrong(f"{name} is not what was saved")
        self.model = opened
        plain(opened, PROMPTS[2])  # some families change or mark themselves when they first run
        self.before = state(opened)

    def next_word(self) -> None:
        from surgery.forward.next_token import next_words

        found = [next_words(self.model, [prompt], WORDS).probabilities[0] for prompt in PROMPTS]
        near(torch.tensor(found), self._words(), "P(word) of each prompt alone")

    def batched(self) -> None:
        from surgery.forward.next_token import next_words, token_losses

        near(next_words(self.model, PROMPTS, WORDS).probabilities, self._words(), "P(word) in a batch")
        right = []
        for prompt in PROMPTS:
            logits = plain(self.model, prompt)[:-1].log_softmax(-1)
            right.append(-logits.gather(1, torch.tensor(prompt[1:])[:, None]).sum())
        near(token_losses(self.model, PROMPTS)[0], torch.stack(right), "log-likelihoods in a batch")

    def capture(self) -> None:
        prompt = PROMPTS[2]
        right = [self._streams(block.name, prompt) for block in self._blocks()]
        sites = [f"{block.site}.hook_resid_{side}" for block in self._blocks() for side in ("pre", "post")]
        with torch.no_grad(), hooks.capture(self.model, sites) as store:
            self.model(**hooks.model_inputs(self.model, torch.tensor([prompt])), **no_cache(self.model))
        for block, (entering, leaving) in zip(self._blocks(), right, strict=True):
            near(store[f"{block.site}.hook_resid_pre"], entering, f"stream into {block.site}")
            near(store[f"{block.site}.hook_resid_post"], leaving, f"stream out of {block.site}")
        self._untouched()

    def bmi(self) -> None:
        blocks = anatomy.find(self.model).stacks[0].blocks
        found = hooks.bmi(self.model, None, PROMPTS).raw.scores
        right = torch.zeros(len(blocks), dtype=torch.float64)
        for prompt in PROMPTS:
            for number, block in enumerate(blocks):
                entering, leaving = (stream[0, -1].double() for stream in self._streams(block.name, prompt))
                right[number] += (1 - torch.cosine_similarity(entering, leaving, dim=0)) / len(PROMPTS)
        if float((torch.tensor(found) - right).abs().max()) > 1e-4:
            raise Wrong(f"BMI {found.round(4).tolist()}, right {right.numpy().round(4).tolist()}")
        self._untouched()

    def lens(self) -> str:
        found = hooks.lens(self.model, None, PROMPTS, WORDS)
        right = torch.stack([plain(self.model, prompt)[-1, list(WORDS)] for prompt in PROMPTS])
        near(float(found.difference), float((right[:, 0] - right[:, 1]).double().mean()), "logit difference", 1e-3)
        near(float(found.cumulative[-1]), float(found.difference), "the lens's last entry", 1e-3)
        self._untouched()
        return f"curve only: {found.missing['block']}" if "block" in found.missing else ""

    def edit(self) -> None:
        from surgery.edits.block import fine_tune, names_of
        from surgery.training import Plan

        try:
            block = len(anatomy.find(self.model).blocks) - 1
            names = names_of(self.model, [block])
        except (SurgeryError, HookError):  # what follows needs no block
            self._differences([name for name, _ in self.model.named_parameters()][-4:])
            raise
        if self.family.kind != "causal":  # block tuning reads the next word; any difference will do for what follows
            self._differences(names)
            return
        try:
            trained = fine_tune(self.model, PROMPTS, WORDS, Plan(1e-2, 1, 4), blocks=[block], seed=0)
        except (SurgeryError, HookError):
            self._differences(names)
            raise
        self._untouched()
        self.differences = trained.differences
        if set(self.differences) != set(names):
            raise Wrong(f"{len(self.differences)} tensors trained, the block has {len(names)}")
        if not any(bool(tensor.abs().max() > 0) for tensor in self.differences.values()):
            raise Wrong("nothing was trained")

    def delta(self) -> None:
        from surgery.delta import Delta
        from surgery.delta.extract import make

        made = make(self.differences, self.base, base="tiny", recipe="", seed=0)
        made.save(self.folder / "delta.safetensors")
        self.loaded = Delta.load(self.folder / "delta.safetensors")
        if sum(tensor.size for tensor in self.loaded.tensors.values()) != sum(
            tensor.numel() for tensor in self.differences.values()
        ):
            raise Wrong("the delta holds other numbers of differences")

    def apply(self) -> None:
        from surgery.apply import apply

        apply(self.loaded, self.base, self.folder / "edited")
        self.edited, _ = surgery.load(self.folder / "edited", device="cpu")
        own = dict(self.model.named_parameters())
        for name, parameter in self.edited.named_parameters():
            right = own[name].detach()
            if name in self.differences:
                right = right + self.differences[name]
            near(parameter.detach(), right, name, 1e-6)

    def live(self) -> None:
        with self.loaded.applied(self.model):
            for name, parameter in self.edited.named_parameters():
                if not torch.equal(parameter, dict(self.model.named_parameters())[name]):
                    raise Wrong(f"{name} differs from the edited checkpoint's")
        self._untouched()

    def undo(self) -> None:
        from surgery.apply import undo

        if not (self.folder / "edited").is_dir():
            raise NotMade
        undo(self.folder / "edited", self.folder / "original")
        for file in self.base.iterdir():
            if file.read_bytes() != (self.folder / "original" / file.name).read_bytes():
                raise Wrong(f"{file.name} is not as before")

    def _blocks(self) -> Any:
        return [block for stack in anatomy.find(self.model).stacks for block in stack.blocks]

    def _words(self) -> Tensor:
        rows = [plain(self.model, prompt)[-1].softmax(-1)[list(WORDS)] for prompt in PROMPTS]
        return torch.stack(rows)

    def _streams(self, block: str, prompt: list[int]) -> tuple[Tensor, Tensor]:
        """What a plain hook sees before and after a block in a pass over one prompt."""
        seen: list[Tensor] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, (tuple, list)) else output).detach().clone())

        module = self.model.get_submodule(block)
        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
        try:
            plain(self.model, prompt)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != 2:
            raise Wrong(f"{block} ran {len(seen) // 2} times in one pass")
        return seen[0], seen[1]

    def _differences(self, names: list[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        own = dict(self.model.named_parameters())
        self.differences = {n: 0.01 * torch.randn(own[n].shape, generator=generator) for n in names}

    def _untouched(self) -> None:
        now = state(self.model)
        changed = [key for key, value in self.before.items() if key != "random" and now[key] != value]
        if changed:
            raise Wrong(f"the model is not as before: {', '.join(changed)}")


def judge(family: Family) -> Row:
    """All cells of one family; a column that needs what a failed one makes is left out."""
    row = Row(family)
    try:
        model = built(family)
    except Exception as error:
        row.unbuilt = line(error).removeprefix("Refused: ")
        return row
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(family, model, Path(folder))
        for column in COLUMNS:
            if family.kind != "causal" and column in ("next word", "batched"):
                continue
            row.cells[column] = cell(getattr(trial, column.replace(" ", "_"))).replace(f"{folder}/", "")
            if column == "open" and row.cells[column] != "works":
                break
    return row


def cell(check: Callable[[], str | None]) -> str:
    try:
        note = check()
    except (SurgeryError, HookError, Refused) as error:
        return f"refused: {line(error)}"
    except NotMade:
        return "-"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"wrong: {line(error)}"
    return f"works, {note}" if note else "works"


def line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (SurgeryError, HookError, Refused)):
        return text[:300]
    return f"{type(error).__name__}: {text}"[:200]


def results(chosen: list[Family], log: Path | None = None) -> Iterator[Row]:
    """Rows as they come, also into `log` as JSON lines."""
    for family in chosen:
        row = judge(family)
        if log is not None:
            with log.open("a") as file:
                fields = {"kind": family.kind, "type": family.model_type, "class": family.name}
                file.write(json.dumps(fields | {"unbuilt": row.unbuilt, "cells": row.cells}) + "\n")
        yield row


def shard(number: int, count: int) -> list[Family]:
    """Every `count`-th family, from `number` on."""
    return families()[number % count :: count]


def main(arguments: list[str]) -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--shard", default="0/40", help="I/N: every N-th family from I on")
    parser.add_argument("--only", nargs="*", help="model types or class names")
    parser.add_argument("--log", type=Path, help="also as JSON lines, each as it comes")
    parser.add_argument("--markdown", type=Path, help="write the table of families here")
    parser.add_argument("--from-log", type=Path, help="take the rows of an earlier --log and run nothing")
    asked = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    number, count = map(int, asked.shard.split("/"))
    chosen = families() if asked.all or asked.only else shard(number, count)
    if asked.only:
        chosen = [family for family in chosen if {family.model_type, family.name} & set(asked.only)]
    rows = []
    for row in logged(asked.from_log) if asked.from_log else results(chosen, asked.log):
        rows.append(row)
        print(row.family.kind, row.family.name, row.unbuilt and f"not built: {row.unbuilt}", flush=True)
        for column, value in row.cells.items():
            if value != "works":
                print(f"    {column}: {value}", flush=True)
    if asked.markdown:
        asked.markdown.write_text(markdown(rows))
    wrong = sum(value.startswith("wrong") for row in rows for value in row.cells.values())
    print(f"{len(rows)} families, {sum(bool(row.unbuilt) for row in rows)} not built, {wrong} wrong cells")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
