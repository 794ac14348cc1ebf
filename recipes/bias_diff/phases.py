"""The phases of BIAS DIFF: the warm-up (2.2), the scores of the texts (2.3), and what is done about them (2.4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.gradient_influence import TokenInfluence
from recipes.bias_diff.dataset import Material, encoded
from recipes.bias_diff.measuring import measure
from recipes.bias_diff.settings import Settings
from recipes.bias_diff.variants import Variant
from surgery.attribution.scoring import InfluenceConfig, Probes, combined, scores_at, tokens_at
from surgery.checkpoints import tensors_of
from surgery.data import mixtures
from surgery.delta import Delta, check_edit
from surgery.edits.block import Trained
from surgery.edits.forgetting import Forgetting, forget, likelihoods, steps_to_forget
from surgery.edits.supervised import Lora, Row, fine_tune, target_names
from surgery.edits.warmup import added, low_rank, merged, read_epoch, warm_up
from surgery.operation import Edit, Made, Operation, Outcome, Tracking
from surgery.training import Plan, steps_of

ASKED = 200  # texts that were not selected, of which the likelihood before and after an unlearning is reported


@dataclass(frozen=True)
class Phases:
    """What all phases of one run share; each phase is done once, also over interruptions."""

    op: Operation
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    lora: Lora
    material: Material

    @cached_property
    def _coded(self) -> tuple[list[Row], int]:
        length = min(self.settings.max_length, self._context)
        return encoded(self.tokenizer, self.material.texts, max_length=length, what=self.material.name)

    @property
    def _context(self) -> int:
        return context_limit(self.op.model) or 2**20

    @property
    def rows(self) -> list[Row]:
        """The training texts as tokens, in their order."""
        return self._coded[0]

    def _pairs(self, pairs: Sequence[mixtures.Pair], what: str) -> Probes:
        # In full: a pair that is cut may lose the words in which its sentences differ.
        encode_all = partial(encoded, self.tokenizer, max_length=self._context, what=what)
        if not pairs:
            return Probes((), ())
        twins = encode_all([pair.anti for pair in pairs])[0] if all(pair.anti for pair in pairs) else []
        return Probes(encode_all([pair.text for pair in pairs])[0], twins)

    @cached_property
    def probes(self) -> Probes:
        """The probe as tokens."""
        return self._pairs(self.material.probe, "probe text")

    @cached_property
    def note(self) -> str:
        """What the data are, in a sentence."""
        labelled = "no labels" if self.material.biased is None else f"{int(self.material.biased.sum())} of them biased"
        return (
            f"{len(self.rows)} texts of {self.material.name} ({labelled}), {self._coded[1]} cut to "
            f"{self.settings.max_length} tokens; {len(self.material.probe)} probe "
            f"{'pairs' if self.material.twinned else 'sentences'}, {len(self.material.test)} test pairs"
        )

    @property
    def plan(self) -> Plan:
        """Of the warm-up and, but for its epochs, of retraining."""
        return self.settings.plan(dropout=self.settings.lora_dropout > 0)

    @property
    def way(self) -> InfluenceConfig:
        """Which gradients are compared."""
        s = self.settings
        return InfluenceConfig(s.attribute_at, tuple(s.attribute_targets), s.attribute_optimizer, s.normalise, s.layers)

    def measure(self, when: str, prompt: str = "") -> dict[str, Any]:
        """``recipes.bias_diff.measuring.measure`` of the model as it is."""
        s = self.settings
        return measure(
            self.op.model,
            self.tokenizer,
            self.material,
            scorer=s.scorer,
            neutral=s.neutral,
            suites=s.suites,
            data=s.data,
            limit=s.test_rows,
            seed=s.seed,
            prompt=prompt,
            progress=self.op.progress,
            when=when,
        )

    @property
    def _trains(self) -> list[str]:
        return [f"{name}.weight" for name in target_names(self.op.model, self.lora.targets)]

    @property
    def _warm_file(self) -> Path:
        return self.op.folder.path / "warmed.safetensors"

    @property
    def _warm_directory(self) -> Path:
        return self.op.folder.state("warmed")

    def warm(self) -> Outcome:
        """Train the warm-up, write ``warmed.safetensors``, and measure the checkpoint that it gives."""
        made, found = self.op.once("warmed-trained", self._warm), self.op.once("warmed-measured", self._warmed)
        return Outcome(Edit.from_dict(made["edit"]), found, made["delta"])

    def _warm(self) -> dict[str, Any]:
        check_edit(self.op.model, self._trains, self.op.directory, out=self.op.folder.path)
        with self.op.tracking("warm-up", steps_of(len(self.rows), self.plan)) as track:
            trained = warm_up(
                self.op.model,
                self.rows,
                self.plan,
                self.lora,
                seed=self.settings.seed,
                folder=self.op.folder.state("warmup"),
                log=track["log"],
                step_done=track["step_done"],
            )
        edit = Edit.of(trained, blocks="all", part="warm-up")
        made = Made(trained.differences, edit, "lora")
        return {"edit": edit.to_dict(), "delta": self.op.delta(made).record(self._warm_file)}

    def _warmed(self) -> dict[str, Any]:
        self.op.apply(self._warm_file, self._warm_directory)
        with tensors_of(self.op.model, Delta.load(self._warm_file), self._warm_directory):
            return self.measure("warmed up")

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Every score of the texts and of the twins, summed over the epochs by learning rate; and each epoch's."""
        settings = self.settings
        numbers = range(1, settings.epochs + 1) if settings.checkpoints == "all" else [settings.epochs]
        twins = self._pairs(self.material.told, "test text")
        columns, rates = [], []
        for number in numbers:
            epoch = read_epoch(self.op.folder.state("warmup"), number)
            with self.op.progress.work(f"influence after epoch {number}", len(self.rows)) as step:
                one = self.op.once(
                    f"scores-{number}",
                    partial(
                        scores_at,
                        self.op.model,
                        self.tokenizer,
                        self.rows,
                        self.probes,
                        twins,
                        self.lora,
                        epoch,
                        self.way,
                        seed=settings.seed,
                    ),
                )
                step(len(self.rows))
            columns.append(one)
            rates.append(epoch.rate)
        found = combined(columns, rates)
        return found | {"epochs": {number: one["rows"] for number, one in zip(numbers, columns, strict=True)}}

    def carry_out(self, case: Variant, chosen: Bool[np.ndarray, " texts"], *, keep: bool) -> Outcome:
        """Do ``case`` with the rows ``chosen``; with ``keep`` the two deltas are left in the folder."""
        selected = [row for row, take in zip(self.rows, chosen, strict=True) if take]
        left = [row for row, take in zip(self.rows, chosen, strict=True) if not take]
        retrain, scaled = case.mitigation == "retrain", case.mitigation == "scaled"
        plan = self._retraining if retrain else self._forgetting
        steps = steps_of(len(left), plan) if retrain else 0 if scaled else steps_to_forget(len(selected), plan)
        return self.op.carry_out(
            case.name,
            partial(self._mitigate, case, selected, left, keep),
            partial(self.measure, case.name),
            trains=self._trains,
            steps=steps,
            keep=keep,
        )

    @property
    def _retraining(self) -> Plan:
        return replace(self.plan, epochs=self.settings.retrain_epochs or self.settings.epochs)

    @property
    def _forgetting(self) -> Plan:
        return replace(self.plan, lr=self.settings.unlearn_lr, epochs=self.settings.unlearn_epochs, dropout=False)

    def _mitigate(
        self, case: Variant, selected: Sequence[Row], left: Sequence[Row], keep: bool, track: Tracking
    ) -> Made:
        settings, model = self.settings, self.op.model
        epoch = read_epoch(self.op.folder.state("warmup"), settings.epochs)
        warm = low_rank(model, self.lora, epoch, seed=settings.seed)
        options: Any = {"seed": settings.seed, "lora": self.lora, **track}
        about: Any = {"blocks": "all", "part": case.name, "rows": len(selected)}
        if case.mitigation == "scaled":
            from_base, from_warmed = added([(settings.scale, warm)]), added([(settings.scale - 1, warm)])
            edit = Edit.from_dict(about | {"rows": 0, "scale": settings.scale})
        elif case.mitigation == "retrain":
            trained = fine_tune(model, left, self._retraining, **options)
            from_base, from_warmed = trained.differences, added([(1.0, trained.differences), (-1.0, warm)])
            edit = Edit.of(trained, **about)
        else:
            trained, found = self._unlearn(case, selected, left, options)
            from_base, from_warmed = added([(1.0, warm), (1.0, trained.differences)]), trained.differences
            edit = Edit.of(trained, **about | found)
        if keep:
            name, where = f"{settings.model} after the warm-up", self._warm_directory
            other = self.op.delta(Made(from_warmed, edit, "lora"), directory=where, base=name)
            self.op.once("from-warmed", lambda: other.record(self.op.folder.path / "delta_from_warmed.safetensors"))
        return Made(from_base, edit, "lora")

    def _unlearn(
        self, case: Variant, selected: Sequence[Row], left: Sequence[Row], options: dict[str, Any]
    ) -> tuple[Trained, dict[str, Any]]:
        """Factors beside the warmed-up model, which is NPO's reference; and what is said of how far it went."""
        settings, model = self.settings, self.op.model
        how = Forgetting(case.mitigation, settings.npo_form, settings.beta, settings.retain, settings.retain_by)
        twins: list[Row] = []
        if case.mitigation == "margin":
            known = dict(zip(self.rows, self.material.texts, strict=True))
            pairs = {row: self.material.twin_of[known[row]] for row in selected if known[row] in self.material.twin_of}
            selected = list(pairs)
            twins = encoded(self.tokenizer, list(pairs.values()), max_length=settings.max_length, what="twin")[0]
        original = likelihoods(model, selected, twins)
        warm = tensors_of(model, Delta.load(self._warm_file), self._warm_directory)
        with warm:
            reached, some = likelihoods(model, selected, twins), left[:ASKED]
            kept = [likelihoods(model, some)]
            until = original if settings.unlearn_until == "original" or twins else None
            trained = forget(model, selected, left, self._forgetting, how, twins=twins, original=until, **options)
            with merged(model, trained.differences):
                kept.append(likelihoods(model, some))
        most = steps_to_forget(len(selected), self._forgetting)
        return trained, {
            "likelihood_original": float(original.mean()),
            "likelihood_warmed": float(reached.mean()),
            "kept_warmed": float(kept[0].mean()),
            "kept_after": float(kept[1].mean()),
            "stopped": len(trained.losses) < most,
        }

    def prompted(self) -> dict[str, Any]:
        """The prompt baseline: the warmed-up model with the preamble before each sentence; no weight changes."""
        with tensors_of(self.op.model, Delta.load(self._warm_file), self.op.folder.state("warmed")):
            return self.measure("prompt", self.settings.preamble) | {"edit": {"part": "prompt", "parameters": 0}}

    def strongest(self, places: Sequence[int], method: str) -> list[TokenInfluence]:
        """The texts at ``places`` with what each token adds to their score after the last epoch."""
        if not places:
            return []
        found = tokens_at(
            self.op.model,
            self.tokenizer,
            [self.rows[place] for place in places],
            self.probes,
            self.lora,
            read_epoch(self.op.folder.state("warmup"), self.settings.epochs),
            self.way,
            method=method,
            seed=self.settings.seed,
        )
        return [replace(one, place=int(place)) for place, one in zip(places, found, strict=True)]
