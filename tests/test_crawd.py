"""The CrAWD recipe: what each method trains and leaves, numbers that are of the saved file, and what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import painted
from families import state

import surgery
from recipes import crawd
from recipes.crawd.settings import WEIGHTS
from surgery.data.texts import Example
from surgery.edits.debiased_methods import METHODS, Method
from surgery.edits.debiased_tuning import tune
from surgery.edits.supervised import Lora, encode_rows, evaluate
from surgery.errors import SurgeryError
from surgery.metrics import gas
from surgery.metrics.metric import from_dict
from surgery.modules import projection
from surgery.modules.cross_attention import reattached, switched_off
from surgery.modules.projection import Projection
from surgery.runs.folder import Folder
from surgery.training import Plan

QUICK: dict[str, Any] = {"lr": 3e-3, "epochs": 2, "suites": ["gas"], "samples": 1, "length": 4, "rows": 4, "rank": 4}
ROLES = {"nurse": "Female", "engineer": "Male", "guard": "Male", "teacher": "Female"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with forty biographies, of which each names its person by he or she."""
    folder = tmp_path_factory.mktemp("data") / "bias_in_bios"
    folder.mkdir()
    lines = ["hard_text,profession,gender"]
    for number in range(40):
        role, gender = list(ROLES.items())[number % 4]
        who = "she" if gender == "Female" else "he"
        lines.append(f'"{who} said that {who} is kind and the {role} {number} was here",{role},{gender}')
    (folder / "bios_28_professions.csv").write_text("\n".join(lines) + "\n")
    (folder / "accountant_complete.csv").write_text("\n".join([*lines[:3], "he is old,accountant,Male"]) + "\n")
    return folder.parent


def settings(checkpoint: Path, folder: Path, **more: Any) -> crawd.Settings:
    return crawd.Settings(**({"model": str(checkpoint), "data": str(folder)} | QUICK | more))


def learn(tiny: Any, checkpoint: Path, folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    more = {"controls": ["vanilla"]} | more
    neutral = out.parent / "neutral.txt"  # two sentences instead of two hundred
    neutral.write_text("The old key was here.\nThe guard found it.\n")
    ready = settings(checkpoint, folder, neutral=str(neutral), **more)
    return crawd.run(*tiny, ready, out=out).summary


@pytest.fixture(scope="module")
def rows(word_tokenizer: Any) -> Any:
    texts = ["The nurse said that she is kind.", "The engineer said that he is kind."] * 8
    return encode_rows(word_tokenizer, [Example("", text) for text in texts], max_length=32).rows


def method(name: str, **more: Any) -> Method:
    weight = WEIGHTS[name]
    return replace(Method(name, weight=weight, lora=Lora(4, 8)), **more)


# The training


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_leaves_the_model_alone(tiny: Any, rows: Any, name: str) -> None:
    model, tokenizer = tiny
    before = state(model)
    tuned = tune(model, tokenizer, rows, method(name), Plan(5e-3, 4, 8, "adamw", dropout=True), seed=0)
    assert state(model) == before
    assert tuned.losses[-1] < 0.9 * tuned.losses[0] and len(tuned.losses) == 8
    assert tuned.kind == {"crawd": "module", "deep_soft_debias": "dense"}.get(name, "lora")
    assert (tuned.module is not None) == (name == "crawd")
    embedded = [key for key in tuned.differences if "embed" in key]
    assert embedded == (["model.embed_tokens.weight"] if name == "deep_soft_debias" else [])


def test_the_same_seed_gives_the_same_numbers(tiny: Any, rows: Any) -> None:
    model, tokenizer = tiny
    plan = Plan(5e-3, 1, 8, "adamw", dropout=True)
    one, again, other = (tune(model, tokenizer, rows, method("crawd"), plan, seed=seed) for seed in (0, 0, 1))
    assert again.losses == one.losses != other.losses
    assert all(torch.equal(value, again.differences[key]) for key, value in one.differences.items())


def test_the_module_alone_trains_nothing_of_the_base(tiny: Any, rows: Any) -> None:
    model, tokenizer = tiny
    tuned = tune(model, tokenizer, rows, method("crawd", lora=None), Plan(5e-3, 4, 8), seed=0)
    assert tuned.differences == {} and tuned.module is not None
    assert tuned.parameters == sum(v.numel() for k, v in tuned.module.tensors.items() if k != "reference")
    assert tuned.losses[-1] < tuned.losses[0]


def test_the_module_has_a_learning_rate_of_its_own(tiny: Any, rows: Any) -> None:
    model, tokenizer = tiny
    moved = {}
    for rate in (1.0, 0.01):
        tuned = tune(model, tokenizer, rows, method("crawd", module_rate=rate), Plan(5e-3, 1, 16), seed=0)
        assert tuned.module is not None
        factor = next(value for key, value in tuned.differences.items() if key.endswith("lora_B"))
        moved[rate] = tuned.module.tensors["fusion.weight"].abs().max().item(), factor.abs().max().item()
    # One step of Adam moves every number by about its learning rate.
    assert moved[1.0][0] == pytest.approx(5e-3, rel=0.05) and moved[0.01][0] == pytest.approx(5e-5, rel=0.05)
    assert moved[1.0][1] == pytest.approx(moved[0.01][1], rel=1e-4)


def test_the_reference_states_follow_the_trained_weights(tiny: Any, rows: Any) -> None:
    """With LoRA the stored states are those of the trained model, not of the model before."""
    model, tokenizer = tiny
    alone = tune(model, tokenizer, rows, method("crawd", lora=None), Plan(5e-3, 1, 8), seed=0)
    both = tune(model, tokenizer, rows, method("crawd"), Plan(5e-3, 4, 8), seed=0)
    assert alone.module is not None and both.module is not None
    assert not torch.allclose(alone.module.tensors["reference"], both.module.tensors["reference"], atol=1e-3)


def test_a_module_can_be_stored_without_what_it_was_trained_with(tiny: Any, rows: Any) -> None:
    model, tokenizer = tiny
    plan = Plan(5e-3, 2, 8)
    whole, cross, off = (
        tune(model, tokenizer, rows, method("crawd", form=form), plan, seed=0).module
        for form in ("printed", "cross_off", "module_off")
    )
    assert whole and cross and off
    fusion, width = whole.tensors["fusion.weight"], len(whole.tensors["fusion.weight"])
    assert torch.equal(cross.tensors["fusion.weight"][:, :width], fusion[:, :width]) and fusion[:, width:].any()
    assert not cross.tensors["fusion.weight"][:, width:].any() and not off.tensors["fusion.weight"].any()
    assert torch.equal(cross.tensors["query.weight"], whole.tensors["query.weight"])
    with reattached(model, whole) as module:
        with pytest.raises(ZeroDivisionError), switched_off(model, "cross"):
            assert torch.equal(module.fusion.weight, cross.tensors["fusion.weight"])
            1 / 0  # noqa: B018
        assert torch.equal(module.fusion.weight, fusion)
        with pytest.raises(SurgeryError, match="got the part 'head'"), switched_off(model, "head"):
            pass
    with pytest.raises(SurgeryError, match="to switch off; attach one first"), switched_off(model):
        pass


def test_the_projection_takes_the_reference_words_off_the_stream(tiny: Any, rows: Any) -> None:
    """lambda 0: no hidden state says more of the words than of the mean token; nothing of the module learns."""
    model, tokenizer = tiny
    given = method("crawd", form="projection", module={"decay": 0.0})
    tuned = tune(model, tokenizer, rows, given, Plan(5e-3, 2, 8), seed=0)
    assert tuned.module is not None and tuned.parameters == sum(v.numel() for v in tuned.differences.values())
    words = tokenizer.convert_tokens_to_ids(["he", "she"])
    ids = torch.tensor([list(rows[0].ids[:4])])
    with torch.no_grad(), applied(model, tuned):
        logits = model(ids).logits[0].double()
    assert torch.allclose(logits[:, words], logits.mean(-1, keepdim=True).expand(-1, 2), atol=1e-4)
    half = tune(model, tokenizer, rows, replace(given, module={"decay": 0.5}), Plan(5e-3, 2, 8), seed=0).module
    assert half is not None
    torch.testing.assert_close(half.tensors["fusion.weight"], 0.5 * tuned.module.tensors["fusion.weight"])


def test_a_stored_projection_damps_the_words_about_their_mean(tiny: Any, rows: Any) -> None:
    """The factors are plain fine-tuning's; lambda 0: what a state says of the words never varies; 1: identity."""
    model, tokenizer = tiny
    plan = Plan(5e-3, 2, 8)
    plain = tune(model, tokenizer, rows, method("vanilla"), plan, seed=0)
    given = method("crawd", form="projected", module={"decay": 0.0})
    tuned = tune(model, tokenizer, rows, given, plan, seed=0)
    assert all(torch.equal(tensor, plain.differences[name]) for name, tensor in tuned.differences.items())
    words = tokenizer.convert_tokens_to_ids(["he", "she"])
    ids = torch.tensor([list(rows[0].ids), list(rows[1].ids)])

    def said(kept: Any) -> Any:
        with torch.no_grad(), applied(model, kept):
            logits = model(ids).logits.double()
        return logits[..., words] - logits.mean(-1, keepdim=True)

    free, damped = said(plain), said(tuned)
    assert free.std((0, 1)).min() > 100 * damped.std((0, 1)).max()
    torch.testing.assert_close(damped[0, 0], free.mean((0, 1)), atol=1e-4, rtol=1e-3)
    whole = tune(model, tokenizer, rows, replace(given, module={"decay": 1.0}), plan, seed=0)
    assert torch.equal(said(whole), free)


def test_a_wide_head_starts_at_random(tiny: Any, rows: Any) -> None:
    model, tokenizer = tiny
    tuned = tune(model, tokenizer, rows, method("crawd", form="wide_head"), Plan(1e-9, 1, 16), seed=0)
    assert tuned.module is not None
    whole = tuned.module.tensors["fusion.weight"].clone()
    whole[:, : len(whole)] += torch.eye(len(whole))
    assert whole.abs().max() <= (6 / (3 * len(whole))) ** 0.5 + 1e-6  # Glorot and Bengio's bound for d x 2d


def test_debias_tuning_says_the_words_less(tiny: Any, rows: Any) -> None:
    model, tokenizer = tiny
    ids = torch.tensor([list(rows[0].ids[:4])])  # "The nurse said that"
    words = tokenizer.convert_tokens_to_ids(["he", "she"])
    mass = {}
    for name, weight in (("vanilla", 0.0), ("debias_tuning", 4.0), ("crawd", 4.0)):
        tuned = tune(model, tokenizer, rows, method(name, weight=weight), Plan(3e-2, 20, 8), seed=0)
        with torch.no_grad(), applied(model, tuned):
            mass[name] = model(ids).logits[0, -1].softmax(-1)[words].sum().item()
    # A fifth of it at the optimum, 1 / (1 + weight); these few steps go most of the way.
    assert mass["vanilla"] > 0.3
    assert mass["debias_tuning"] < 0.65 * mass["vanilla"] and mass["crawd"] < 0.75 * mass["vanilla"]


def applied(model: Any, tuned: Any) -> Any:
    """The factors multiplied onto the model, and the module in it, without a file."""
    from contextlib import ExitStack, contextmanager

    from surgery.modules.cross_attention import reattached

    @contextmanager
    def inside() -> Any:
        named = dict(model.named_parameters())
        stems = [key.removesuffix(".lora_B") for key in tuned.differences if key.endswith(".lora_B")]
        kept = {stem: named[stem].detach().clone() for stem in stems}
        with ExitStack() as stack, torch.no_grad():
            for stem in stems:
                named[stem] += tuned.differences[f"{stem}.lora_B"] @ tuned.differences[f"{stem}.lora_A"]
            if isinstance(tuned.module, Projection):
                stack.enter_context(projection.attached(model, tuned.module))
            elif tuned.module is not None:
                stack.enter_context(reattached(model, tuned.module))
            yield
            for stem in stems:
                named[stem].copy_(kept[stem])

    return inside()


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("plain", {}, "got 'plain', expected one of crawd"),
        ("vanilla", {"weight": 1.0}, "vanilla adds nothing"),
        ("ibm", {"lora": None}, "only crawd trains its module alone"),
        ("deep_soft_debias", {"reference": ("he",)}, "expected pairs"),
        ("debias_tuning", {"reference": ("xyzzy",)}, "word 'xyzzy'"),
        ("crawd", {"reference": ()}, "reference"),
        ("crawd", {"module": {"heads": 5}}, "heads is 5"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny: Any, rows: Any, name: str, more: Any, message: str) -> None:
    before = state(tiny[0])
    with pytest.raises(SurgeryError, match=message):
        tune(
            *tiny,
            rows,
            replace(Method(name, weight=1.0 if name == "debias_tuning" else 0.0), **more),
            Plan(1e-3, 1, 8),
            seed=0,
        )
    assert state(tiny[0]) == before


# The recipe


def test_the_whole_run(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    before = state(tiny[0])
    own = ["lambda_1", "random_words", "module_off", "cross_off"]
    assert settings(checkpoint, data).controls == ["vanilla", *own]
    more = {"controls": ["vanilla", *own], "random_words": ["nurse", "guard"], "decay_stored": 0.5}
    with painted():
        summary = learn(tiny, checkpoint, data, tmp_path / "run", **more)
    assert state(tiny[0]) == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "recipe.toml", "delta.safetensors", "report.html", "log.jsonl", "plots"}
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(json.dumps(summary))
    # 40 biographies of which 8 are held out and 8 a development set; of the accountants' file one is new.
    assert summary["rows"]["trained"] == 24 + 1 and summary["rows"]["held_out"] == 8
    assert set(summary["controls"]) == {"vanilla", *own} and summary["delta"]["kind"] == "module"
    for scores in (summary["before"], summary["after"], *(each["after"] for each in summary["controls"].values())):
        assert set(scores) == {"gas", "held_out_perplexity", "perplexity"}
    assert summary["before"]["held_out_perplexity"]["value"] > 2 * summary["after"]["held_out_perplexity"]["value"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "plain fine-tuning reaches" in page
        and 'aria-label="cross attention"' in page
        and 'aria-label="sensitivity"' in page
        and "Continuations" in page
    )
    rankings = [summary["sensitivity"][when]["scores"] for when in ("before", "after")]
    assert len(rankings[0]) == len(rankings[1]) == 4 and rankings[0] != rankings[1]
    assert len(summary["cases"]) == 6 and set(summary["cases"][0]) == {"prompt", "before", "crawd", "vanilla", *own}
    edit = summary["edit"]
    assert (edit["decay"], edit["decay_stored"], edit["form"]) == (0.2, 0.5, "printed")
    assert "Trained with lambda 0.2, the module is stored with 0.5" in page and "Texts with a male word" in page
    assert edit["moved"]["after"] < edit["moved"]["before"] and "The objective fell by" in page
    assert "What the module does itself (control module_off): gas gas" in page
    # The same weights: what is off is the module of the saved file, so the parts differ and vanilla is another model.
    perplexity = {name: each["after"]["perplexity"]["value"] for name, each in summary["controls"].items()}
    assert len({*perplexity.values(), summary["after"]["perplexity"]["value"]}) == 6
    assert summary["differences"]["module_off"]["perplexity"]["value"] == pytest.approx(
        summary["after"]["perplexity"]["value"] - perplexity["module_off"]
    )


def test_the_numbers_are_those_of_the_saved_file(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Measured again on a model opened from the checkpoint, with the delta file as the checkpoint would store it."""
    summary = learn(tiny, checkpoint, data, tmp_path / "run", controls=[], rounding="nearest", lr=1e-2)
    assert summary["controls"] == {}
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    surgery.Delta.load(tmp_path / "run" / "delta.safetensors").apply(model, as_stored=True)
    sampling = gas.Sampling(4, samples=1)
    again = gas.evaluate(model, tokenizer, data, limit=4, sampling=sampling)
    assert from_dict(summary["after"]["gas"]["gas"]) == again["gas"]
    held = crawd.read(tokenizer, crawd.Settings(data=str(data), suites=[])).held_out
    encoded = encode_rows(tokenizer, [Example("", text) for text in held], max_length=128).rows
    counts = [len(row.ids) - 1 for row in encoded]
    nll = sum(loss * count for loss, count in zip(evaluate(model, encoded), counts, strict=True)) / sum(counts)
    value = summary["after"]["held_out_perplexity"]["value"]
    assert torch.tensor(nll).exp().item() == pytest.approx(value, rel=1e-5)


def test_a_run_that_stores_a_projection(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    usual = settings(checkpoint, data, form="projected")
    own = usual.controls
    assert own == ["vanilla", "random_words"] and usual.decay == 0.75
    given: Any = {"form": "projected", "decay": 0.2, "controls": own, "random_words": ["nurse", "guard"], "suites": []}
    summary = learn(tiny, checkpoint, data, tmp_path / "run", **given)
    assert summary["delta"]["kind"] == "module" and set(summary["controls"]) == set(own)
    value = {name: each["after"]["perplexity"]["value"] for name, each in summary["controls"].items()}
    assert len({*value.values(), summary["after"]["perplexity"]["value"]}) == 3
    assert "stored with a projection" in (tmp_path / "run" / "report.html").read_text()
    # The factors are those of plain fine-tuning, which is trained once for the three.
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {row["edit"] for row in logged if "edit" in row} == {"crawd"}
    assert summary["edit"]["objective"] == "token cross-entropy"
    assert all(each["edit"]["loss_last"] == summary["edit"]["loss_last"] for each in summary["controls"].values())


def test_no_held_out_text_is_trained_on(tiny: Any, data: Path) -> None:
    parts = {}
    for part in ("dev", "test"):
        given = crawd.read(tiny[1], crawd.Settings(data=str(data), suites=[], part=part))
        parts[part] = set(given.held_out)
        assert len(parts[part]) == 8 and not parts[part] & set(given.texts)
        assert len(given.texts) == len(set(given.texts)) == 25
    assert not parts["dev"] & parts["test"]


def test_copies_of_a_text_in_a_file_stand_in_one_part(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"The nurse said that she is {n % 10}.\n" for n in range(40)))
    given = crawd.read(tiny[1], crawd.Settings(file=str(file), suites=[], controls=[]))
    assert len(given.texts) == 24 and not set(given.texts) & set(given.held_out)


def test_a_file_of_one_s_own(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"The nurse said that she is {n}.\n" for n in range(20)))
    summary = learn(
        tiny, checkpoint, Path(), tmp_path / "run", data="", file=str(tmp_path / "texts.txt"), suites=[], controls=[]
    )
    assert summary["rows"]["trained"] == 12 and summary["rows"]["held_out"] == 4 and summary["cases"] == []
    assert set(summary["after"]) == {"held_out_perplexity", "perplexity"}


def test_an_interrupted_run_continues_to_the_same_delta(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(tiny, checkpoint, data, tmp_path / "whole", suites=[])
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)
    write = Folder.log

    def interrupt(folder: Any, row: dict[str, Any]) -> None:
        write(folder, row)
        if row.get("step") == 3 and row.get("method") == "vanilla":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("surgery.runs.folder.Folder.log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            learn(tiny, checkpoint, data, tmp_path / "cut", suites=[])
    ready = settings(checkpoint, data, suites=[], neutral=str(tmp_path / "neutral.txt"), controls=["vanilla"])
    rest = crawd.run(*tiny, ready, out=tmp_path / "cut", resume=True).summary
    assert rest | {"seconds": {}} == whole | {"seconds": {}}
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("method") == "crawd" for line in lines) == whole["edit"]["steps"]  # not trained twice


def test_settings_follow_method_and_profile() -> None:
    assert crawd.Settings().lr == 1e-5 and crawd.Settings().weight == 0.0
    assert crawd.Settings(method="debias_tuning").weight == 1.0
    assert crawd.Settings(method="debias_tuning", weight=3.0).weight == 3.0
    quick = crawd.Settings(profile="quick", epochs=4)
    assert quick.suites == ["gas", "weat"] and quick.epochs == 4 and quick.lr > 1e-5
    written = surgery.runs.recipe_files.dump("crawd", crawd.Settings(profile="small"))
    assert "lr = 0.0005" in written


@pytest.mark.parametrize(
    "given, message",
    [
        ({"data": ""}, "no data; name the directory"),
        ({"data": "nowhere"}, "data: 'nowhere' is no folder"),
        ({"suites": ["blimp"]}, "got 'blimp'"),
        ({"controls": ["crawd"]}, "controls: got 'crawd'"),
        ({"controls": ["cross_off"], "method": "vanilla"}, "got 'cross_off', but vanilla has no module"),
        ({"controls": ["random_words"], "random_words": ["kind"]}, "expected at least 2 that are no reference words"),
        ({"method": "vanilla", "form": "projection", "controls": []}, "got 'projection' for vanilla"),
        ({"form": "projected", "decay_stored": 0.5}, "decay_stored: the form projected"),
        ({"form": "projected", "controls": ["module_off"]}, "the form projected trains no module"),
        ({"reference": ["he", "he"]}, "named twice"),
        ({"four_bit": True}, "four_bit: this model is on cpu"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    before = state(tiny[0])
    with pytest.raises(SurgeryError, match=message):
        learn(tiny, checkpoint, data, tmp_path / "x", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["neutral.txt"] and state(tiny[0]) == before


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="SURGERY_DATA names no data directory")
def test_the_data_at_hand(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    data = Path(os.environ["SURGERY_DATA"])
    more = {"suites": ["gas", "bios"], "rows": 6, "limit": 16, "epochs": 1, "controls": [], "part": "dev"}
    summary = learn(tiny, checkpoint, data, tmp_path / "run", **more)
    # The tiny tokenizer lacks WEAT's names and StereoSet's start token.
    assert {"accuracy", "tpr_gap"} == set(summary["after"]["bios"]) and "gas" in summary["after"]
    # 168 of the 28 professions, and the thousand accountants less the rows that are in both files
    assert (
        summary["rows"]["trained"] == 16 and summary["rows"]["read"] > 1000 and 50 <= summary["rows"]["held_out"] <= 62
    )
