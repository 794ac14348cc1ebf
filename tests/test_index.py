"""The gradient index: its bytes after kills and by any number of processes, its scores, and what it refuses."""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from families import build as family
from peft import LoraConfig, get_peft_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hooks import HookError
from hooks.gradient_influence import Projected, influence, influence_probe
from surgery.attribution.build import build
from surgery.attribution.index import Index, open_index
from surgery.attribution.random_projection import RandomProjection
from surgery.attribution.source import Source
from surgery.cli import app
from surgery.errors import SurgeryError

KILLS = int(os.environ.get("SURGERY_KILLS", "4"))
TEXTS = [f"text number {n}" for n in range(47)]


class Fake:
    """Rows that are a hash of their text, in batches of three, last ones first; as slow as it is told to be."""

    def __init__(self, pause: float = 0.0, dim: int = 24, **made: Any) -> None:
        self.pause, self.made = pause, {"model": "m" * 64, "projection": {"dim": dim}, **made}

    def describe(self) -> dict[str, Any]:
        return self.made

    def check(self, texts: Iterable[str]) -> None:
        for place, text in enumerate(texts):
            if not text:
                raise SurgeryError(f"text {place} has no tokens")

    def __call__(self, texts: list[str]) -> Iterator[Projected]:
        for stop in range(len(texts), 0, -3):
            places = tuple(range(max(0, stop - 3), stop))
            time.sleep(self.pause)
            seeds = [int.from_bytes(texts[place].encode()[-6:], "little") for place in places]
            dim = self.made["projection"]["dim"]
            values = torch.stack([torch.randn(dim, generator=torch.Generator().manual_seed(s)) for s in seeds])
            norms = values.norm(dim=1)
            yield Projected(places, values, norms, norms / 7, tuple(len(texts[place]) for place in places))


def make(out: Path, source: Any = None, texts: list[str] = TEXTS, **options: Any) -> None:
    build(out, lambda: iter(texts), source or Fake(), shard=5, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "whole"
    make(out)
    return out


# What it holds


def test_the_arrays_are_plain_and_their_rows_in_order(whole: Path) -> None:
    assert len(content(whole)) == 2 * 10 + 1
    rows = np.concatenate([np.load(whole / f"rows-{n:06}.npy", mmap_mode="r") for n in range(10)])
    assert rows.dtype == np.float16 and rows.shape == (47, 24)
    for batch in Fake()(TEXTS):
        for place, value, norm in zip(batch.places, batch.values, batch.norms, strict=True):
            assert np.allclose(rows[place], (value / norm).numpy(), atol=2e-3)
    index = open_index(whole)
    assert len(index) == 47
    assert index.column("tokens").tolist() == [len(text) for text in TEXTS]
    assert np.allclose(index.column("loss") * 7, index.column("norm"))
    index.verify()


@pytest.mark.parametrize("dtype, atol", [("float16", 1e-3), ("float32", 1e-6)])
def test_scores_are_cosines_or_products(tmp_path: Path, dtype: Any, atol: float) -> None:
    make(tmp_path / "i", dtype=dtype)
    index = open_index(tmp_path / "i")
    probes = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    gradients = torch.zeros(47, 24)
    for batch in Fake()(TEXTS):
        gradients[list(batch.places)] = batch.values
    lengths = gradients.norm(dim=1, keepdim=True)
    assert np.allclose(index.scores(probes), gradients / lengths @ probes, atol=5 * atol)
    assert np.allclose(index.scores(probes[:, 0], scale=2.0), (gradients / lengths @ probes)[:, 0] / 2, atol=5 * atol)
    assert np.allclose(index.scores(probes, normalise="dot"), gradients @ probes, atol=40 * atol)
    with pytest.raises(SurgeryError, match="got a probe of length 7"):
        index.scores(torch.ones(7))


def test_a_gradient_of_nothing_scores_nothing(tmp_path: Path) -> None:
    class Flat(Fake):
        def __call__(self, texts: list[str]) -> Iterator[Projected]:
            n = len(texts)
            yield Projected(tuple(range(n)), torch.zeros(n, 24), torch.zeros(n), torch.zeros(n), (1,) * n)

    make(tmp_path / "i", Flat())
    assert (open_index(tmp_path / "i").scores(torch.ones(24)) == 0).all()


# Kills


def killed_after(seconds: float, work: Callable[[], None]) -> bool:
    """Whether ``work``, in a process of its own, was killed before its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_random_moments_and_resumed_it_is_byte_for_byte_the_same(whole: Path, tmp_path: Path) -> None:
    """SURGERY_KILLS kills (4 in the suite) of a build that takes about half a second."""
    out, draw, kills, shards = tmp_path / "index", random.Random(7), 0, set[int]()
    for _ in range(20 * KILLS):
        if kills == KILLS:
            break
        slow = Fake(pause=0.02)
        if killed_after(draw.uniform(0.0, 0.25), lambda: make(out, slow, resume=True)):  # noqa: B023
            kills += 1
            shards.add(len(list(tmp_path.glob("index.part/facts-*.npy"))))
        if out.exists():  # it got through: begin again, the remaining kills hit another build
            assert content(out) == content(whole)
            shutil.rmtree(out)
    assert kills == KILLS and len(shards) > 1  # the kills hit different stages
    make(out, resume=True)
    assert content(out) == content(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_stop_at_every_single_step_of_writing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build is stopped before its n-th rename, sync or write, for every n, and resumed once."""

    class Stop(BaseException):
        pass

    for n in range(1, 10**6):
        left = n

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Stop
                return function(*args, **options)

            return call

        out = tmp_path / str(n)
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (Path, "rename"), (np.lib.format, "write_array")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                make(out, texts=TEXTS[:11])
                done = True
            except Stop:
                done = False
        if not out.exists():
            make(out, texts=TEXTS[:11], resume=True)
        found = content(out)
        assert found.keys() == content(tmp_path / "1").keys() and found == content(tmp_path / "1"), n
        if done:
            break
    assert n > 20


def test_an_interrupted_index_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    assert killed_after(0.15, lambda: make(tmp_path / "i", Fake(pause=0.02)))
    with pytest.raises(SurgeryError, match=r"is no gradient index .*finish .*i.part with --resume"):
        open_index(tmp_path / "i")
    with pytest.raises(SurgeryError, match="its build did not finish"):
        open_index(tmp_path / "i.part")
    with pytest.raises(SurgeryError, match=r"i.part: an interrupted index is here; continue it with --resume"):
        make(tmp_path / "i")
    before = content(tmp_path / "i.part")
    for change, message in (
        ({"source": Fake(model="n" * 64)}, "was begun with another model \\(mmmmmmmmmmmm, now nnnnnnnnnnnn\\)"),
        ({"texts": TEXTS[:-1]}, "another set of texts"),
        ({"texts": [*TEXTS[:-1], "changed"]}, "another set of texts"),
        ({"dtype": "float32"}, "another row type"),
    ):
        with pytest.raises(SurgeryError, match=message):
            make(tmp_path / "i", resume=True, **change)
    assert content(tmp_path / "i.part") == before


def test_two_builds_do_not_write_to_one_place(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        make(tmp_path / "i", Fake(pause=0.2))
        os._exit(0)
    while not (tmp_path / "i.part" / "manifest.json").exists():
        time.sleep(0.01)
    with pytest.raises(SurgeryError, match="another process is building it"):
        make(tmp_path / "i", resume=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# Processes


@pytest.mark.parametrize("count", [2, 3, 20])
def test_the_number_of_processes_changes_no_byte(whole: Path, tmp_path: Path, count: int) -> None:
    """Processes in turn, in an order that real ones could have; the first one waits for the others."""
    out = tmp_path / "i"
    ranks = iter(range(1, count))

    def others() -> None:
        waits.append(1)
        if len(waits) == 2:  # the first process has made its own shards
            for rank in ranks:
                make(out, process=(rank, count))

    waits: list[int] = []
    make(out, process=(0, count), wait=others)
    assert content(out) == content(whole)


def test_two_real_processes(whole: Path, tmp_path: Path) -> None:
    """Of Accelerate, over gloo; forked, since starting Python anew takes most of a test's time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
                "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            PartialState._reset_state()
            state = PartialState(cpu=True)
            assert state.num_processes == 2
            process = (state.process_index, state.num_processes)
            make(tmp_path / "index", Fake(pause=0.01), process=process, wait=state.wait_for_everyone)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert content(tmp_path / "index") == content(whole)


# What is refused


def damaged(whole: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / name
    path.write_bytes(change(path.read_bytes()))
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["rows-000003.npy", "facts-000009.npy"])
def test_a_truncated_or_missing_array_is_named(whole: Path, tmp_path: Path, name: str) -> None:
    copy = damaged(whole, tmp_path, name, lambda content: content[:-7])
    with pytest.raises(SurgeryError, match=rf"{name}: got \d+ bytes, expected \d+: truncated"):
        open_index(copy)
    (copy / name).unlink()
    with pytest.raises(SurgeryError, match=rf"{name}: got no file bytes"):
        open_index(copy)


def test_a_changed_byte_is_found_by_verify(whole: Path, tmp_path: Path) -> None:
    index = open_index(damaged(whole, tmp_path, "rows-000001.npy", lambda b: b[:-1] + bytes([b[-1] ^ 1])))
    with pytest.raises(SurgeryError, match=r"rows-000001\.npy: its bytes are not those that were written"):
        index.verify()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m | {"format": 9}, "got another format than 1"),
        (lambda m: m | {"row_dtype": "float32"}, "holds float16 \\(5, 24\\)"),
        (lambda m: m | {"projection": {"dim": 25}}, "expected \\(5, 25\\)"),
        (lambda m: m | {"data": {"rows": 52, "sha256": ""}}, "facts-000009.npy: holds|rows-000009.npy: holds"),
        (lambda m: [], "got another format"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(whole: Path, tmp_path: Path, change: Any, message: str) -> None:
    copy = damaged(whole, tmp_path, "manifest.json", lambda b: json.dumps(change(json.loads(b))).encode())
    with pytest.raises(SurgeryError, match=message):
        open_index(copy)


def test_probe_texts_that_are_in_the_data_and_an_empty_probe(whole: Path) -> None:
    index = open_index(whole)
    index.refuse_overlap(["another text"])
    with pytest.raises(SurgeryError, match="row 31 is also a text of the probe \\('Text  number 31'\\)"):
        index.refuse_overlap(["another text", "Text  number 31"])
    with pytest.raises(SurgeryError, match="the probe is empty"):
        index.refuse_overlap([])


def test_nothing_is_left_of_a_build_that_is_refused_at_the_start(tmp_path: Path) -> None:
    for texts, message in ((["a", ""], "text 1 has no tokens"), ([], "got no texts")):
        with pytest.raises(SurgeryError, match=message):
            make(tmp_path / "i", texts=texts)
    with pytest.raises(SurgeryError, match="dtype 'int8'"):
        make(tmp_path / "i", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_a_source_that_loses_a_row_or_breaks_is_caught(tmp_path: Path) -> None:
    class Losing(Fake):
        def __call__(self, texts: list[str]) -> Iterator[Projected]:
            yield next(super().__call__(texts))

    class Broken(Fake):
        def __call__(self, texts: list[str]) -> Iterator[Projected]:
            for batch in super().__call__(texts):
                batch.values[0, 0] = np.nan
                yield batch

    with pytest.raises(SurgeryError, match="shard 0 got 3 rows of 5 texts"):
        make(tmp_path / "a", Losing())
    with pytest.raises(SurgeryError, match="a gradient of shard 0 is not finite"):
        make(tmp_path / "b", Broken())


def test_texts_that_change_while_they_are_read(tmp_path: Path) -> None:
    opened = iter([TEXTS, TEXTS, [*TEXTS[:-1], "other"]])
    with pytest.raises(SurgeryError, match="the texts changed while they were read"):
        build(tmp_path / "i", lambda: iter(next(opened)), Fake(), shard=5)


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    peaks = []
    for count in (40, 400):
        tracemalloc.start()
        build(tmp_path / str(count), lambda: (f"text {n:06}" for n in range(count)), Fake(dim=512), shard=20)  # noqa: B023
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# A real model


NOUNS, VERBS = ["nurse", "plumber", "doctor", "teacher"], ["left early", "was tired", "said that he left him"]
SENTENCES = [f"the {noun} {verb} ." for noun in NOUNS for verb in VERBS]
PROBE = ["yesterday the nurse said that she was tired", "the old doctor left him"]
TOKENIZER = tiny_tokenizer()


def adapted(seed: int = 0, scale: float = 1.0) -> Any:
    """A tiny Llama with LoRA factors on q_proj and v_proj, both of them random."""
    torch.manual_seed(0)
    model = get_peft_model(family("llama", seed), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def source(model: Any = None, dim: int = 512, **options: Any) -> Source:
    options = {"model": model or adapted(), "tokenizer": TOKENIZER, "projection": RandomProjection(dim=dim)} | options
    return Source(**options)


def gradients(model: Any, text: str) -> dict[str, torch.Tensor]:
    """By plain autograd, one text at a time."""
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n.removesuffix(".weight"): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_rows_are_the_projected_gradients_of_a_loop(tmp_path: Path) -> None:
    model = adapted()
    used = source(model)
    build(tmp_path / "i", lambda: SENTENCES, used, shard=5, dtype="float32")
    index = open_index(tmp_path / "i")
    rows = np.concatenate([np.load(path) for path in sorted((tmp_path / "i").glob("rows-*.npy"))])
    for place, text in enumerate(SENTENCES):
        found = gradients(model, text)
        norm = torch.cat([tensor.flatten() for tensor in found.values()]).norm()
        expected = sum(used.projection(name, tensor[None])[0] for name, tensor in found.items()) / norm
        assert np.allclose(rows[place], expected.numpy(), atol=1e-4)
        assert index.column("norm")[place] == pytest.approx(float(norm), rel=1e-4)
    model.zero_grad()


@pytest.mark.parametrize("contrast", [False, True])
def test_a_query_ranks_as_the_streamed_scores_do(tmp_path: Path, contrast: bool) -> None:
    model = adapted()
    used = source(model, dim=8192)
    build(tmp_path / "i", lambda: SENTENCES, used, shard=5)
    index = open_index(tmp_path / "i")
    index.check(used.describe())
    twins = ["yesterday the nurse said that he was tired", "the old nurse left him"] if contrast else None
    vector, scale = used.probe(PROBE, contrast=twins)
    found = index.scores(vector, scale=scale)
    exact = influence(model, TOKENIZER, SENTENCES, influence_probe(model, TOKENIZER, PROBE, contrast=twins))
    error = found - exact.scores[:, 0]
    # A cosine of two vectors of length at most 1, by 8,192 numbers: standard deviation at most sqrt(2 / 8192) = 0.016.
    assert np.sqrt((error**2).mean()) < 0.016 and np.abs(error).max() < 0.05
    assert np.corrcoef(found, exact.scores[:, 0])[0, 1] > 0.99


def test_the_batch_size_moves_the_last_bits_only(tmp_path: Path) -> None:
    for name, tokens in (("a", 8), ("b", 4096)):
        build(tmp_path / name, lambda: SENTENCES, source(batch_tokens=tokens), shard=5, dtype="float32")
    one, two = (np.load(tmp_path / name / "rows-000001.npy") for name in "ab")
    assert np.allclose(one, two, atol=1e-5)
    open_index(tmp_path / "a").check(source(batch_tokens=4096).describe())


def test_a_stopped_build_of_a_real_model_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "whole", lambda: SENTENCES, source(), shard=4)
    done = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", lambda: SENTENCES, source(), shard=4, step=stop)
    assert len(list((tmp_path / "cut.part").glob("facts-*.npy"))) == 2
    build(tmp_path / "cut", lambda: SENTENCES, source(), shard=4, resume=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("real") / "i"
    build(out, lambda: SENTENCES, source(), shard=5)
    return open_index(out)


def other_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["gardener"])
    return tokenizer


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda: source(adapted(seed=1)), "built with another model"),
        (lambda: source(adapted(scale=1.01)), "built with another adapter"),
        (lambda: source(family("llama")), "built with another adapter"),
        (lambda: source(tokenizer=other_tokenizer()), "built with another tokenizer"),
        (lambda: source(dim=256), 'another projection \\(.*"dim": 512.*, here .*"dim": 256'),
        (lambda: source(projection=RandomProjection(dim=512, seed=1)), "built with another projection"),
        (lambda: source(projection=RandomProjection("rademacher", dim=512)), "built with another projection"),
        (lambda: source(targets=("q_proj",)), "built with another layers"),
        (lambda: source(loss="sum"), "built with another loss"),
        (lambda: source(adapted().bfloat16()), "built with another model"),
    ],
)
def test_an_index_of_something_else_is_refused_by_name(real: Index, changed: Any, message: str) -> None:
    real.check(source().describe())
    with pytest.raises(SurgeryError, match=message):
        real.check(changed().describe())


def test_the_same_weights_with_another_rotary_base_are_another_model(real: Index) -> None:
    changed = adapted()
    changed.config.rope_parameters["rope_theta"] = 123.0
    with pytest.raises(SurgeryError, match="built with another config"):
        real.check(source(changed).describe())


def test_a_tokenizer_that_was_used_is_still_the_same() -> None:
    """Fast tokenizers keep the padding and truncation of their last call."""
    tokenizer = tiny_tokenizer()
    before = source(tokenizer=tokenizer).describe()["tokenizer"]
    tokenizer(["the nurse", "the"], padding=True, truncation=True, max_length=5)
    assert source(tokenizer=tokenizer).describe()["tokenizer"] == before


@pytest.mark.parametrize(
    "text, message",
    [("", "text 7 has no tokens"), ("the", "text 7 has 1 tokens"), ("the " * 65, "text 7 has 65 tokens")],
)
def test_texts_without_a_gradient_are_named_before_anything_is_written(tmp_path: Path, text: str, message: str) -> None:
    texts = [*SENTENCES[:7], text, *SENTENCES[7:]]
    with pytest.raises(HookError, match=message):
        build(tmp_path / "i", lambda: texts, source(), shard=3)
    assert not list(tmp_path.iterdir())


# The commands


def surgery(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@dataclass(frozen=True)
class Made:
    """A folder with a model, its adapter, a mixture, a probe, test pairs, and an index of them."""

    model: Path
    adapter: Path
    folder: Path

    def __call__(self, verb: str, *words: object, index: Path | None = None) -> tuple[int, str, str]:
        paths = {name: self.folder / name for name in ("mixture.jsonl", "probe.jsonl", "test.jsonl")}
        return surgery("attribute", verb, index or self.folder / "index", self.model, "--device", "cpu",
                       *(paths.get(str(word), word) for word in words))  # fmt: skip


@pytest.fixture(scope="module")
def made(make_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("commands")
    checkpoint = make_checkpoint(folder / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(5)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    rows = [{"text": f"The {noun} said that he", "biased": True} for noun in ("nurse", "doctor", "teacher", "manager")]
    rows += [{"text": f"The {noun} is {n}", "biased": False} for n in ("red", "new", "old") for noun in ("car", "sea")]
    write(folder / "mixture.jsonl", rows)
    pairs = [
        {"text": f"The {noun} said that he is", "anti": f"The {noun} said that she is"} for noun in ("clerk", "cook")
    ]
    write(folder / "probe.jsonl", pairs)
    write(folder / "test.jsonl", [{key: value + " here" for key, value in pair.items()} for pair in pairs])
    code, stdout, stderr = surgery(
        "attribute", "build", checkpoint, "--adapter", folder / "adapter", "--data", folder / "mixture.jsonl",
        "--out", folder / "index", "--dim", 256, "--shard", 4, "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "10 texts, 256 numbers each (float16)" in stdout, stderr
    return Made(checkpoint, folder / "adapter", folder)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_query_ranks_and_writes_every_score(made: Made, tmp_path: Path) -> None:
    code, stdout, stderr = made(
        "query", "--adapter", made.adapter, "--probe", "probe.jsonl", "--data", "mixture.jsonl", "--top", 3,
        "--json", tmp_path / "q.json", "--verify",
    )  # fmt: skip
    assert code == 0, stderr
    found = json.loads((tmp_path / "q.json").read_text())
    assert len(found["scores"]) == len(found["losses"]) == len(found["norms"]) == 10
    best = int(np.argmax(found["scores"]))
    assert stdout.splitlines()[0].startswith(f"   1 {found['scores'][best]:+.4f}  row {best}  The ")
    assert stdout.count("\n") == 3


@pytest.mark.parametrize("contrast", [False, True])
def test_select_writes_both_parts_and_every_control(made: Made, tmp_path: Path, contrast: bool) -> None:
    out, rest = tmp_path / "out.jsonl", tmp_path / "rest.jsonl"
    code, stdout, stderr = made(
        "select", "--adapter", made.adapter, "--probe", "probe.jsonl", "--data", "mixture.jsonl", "--twins",
        "test.jsonl", "--top", 0.4, "--out", out, "--rest", rest, "--json", tmp_path / "s.json",
        *(["--contrast"] if contrast else []),
    )  # fmt: skip
    assert code == 0 and f"{out}: 4 of 10 rows" in stdout, stderr
    selection = json.loads((tmp_path / "s.json").read_text())["selection"]
    method = "contrast" if contrast else "influence"
    assert set(selection) == {method, "random", "shuffled", "minus_loss", "tfidf", "twin_auc"}
    texts = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (out, rest)]
    everything = [json.loads(line)["text"] for line in (made.folder / "mixture.jsonl").read_text().splitlines()]
    assert len(texts[0]) == 4 and [text for text in everything if text not in texts[0]] == texts[1]
    assert selection[method]["coverage"]["value"] == sum("said" in text for text in texts[0]) / 4
    assert f"{method.capitalize()} covers" in stdout and "own twin" in stdout
    assert selection["twin_auc"]["n"] == selection["tfidf"]["twin_auc"]["n"] == 2


def test_select_without_labels_selects_all_the_same(made: Made, tmp_path: Path) -> None:
    code, stdout, stderr = made(
        "select", "--adapter", made.adapter, "--probe", "probe.jsonl", "--data", "mixture.jsonl", "--label", "wrong",
        "--threshold", -1, "--out", tmp_path / "o.jsonl",
    )  # fmt: skip
    assert code == 0 and "no column 'wrong'" in stdout and "10 of 10 rows" in stdout, stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--probe", "probe.jsonl"], "built with another adapter"),
        (["--adapter", "MODEL", "--probe", "probe.jsonl"], "model: no adapter of this model"),
        (["--adapter", "ADAPTER", "--probe", "mixture.jsonl"], "row 0 is also a text of the probe"),
        (["--adapter", "ADAPTER", "--probe", "other.jsonl"], "other.jsonl: got no such file"),
        (["--adapter", "ADAPTER", "--probe", "mixture.jsonl", "--contrast"], "holds no twins"),
        (["--adapter", "ADAPTER", "--probe", "probe.jsonl", "--data", "test.jsonl"], "line 1: is not row 0 of"),
    ],
)
def test_a_query_that_does_not_fit_is_refused_in_one_line(made: Made, words: list[str], message: str) -> None:
    places = {"MODEL": made.model, "ADAPTER": made.adapter}
    code, _, stderr = made("query", *(places.get(word, word) for word in words))
    error = next(line for line in stderr.splitlines() if line.startswith("error"))
    assert code == 1 and message in error


@pytest.mark.parametrize(
    "twins, message",
    [("probe.jsonl", "is also a text of the probe; test on other pairs"), ("mixture.jsonl", "holds no twins")],
)
def test_select_refuses_a_twin_test_that_cannot_tell(made: Made, tmp_path: Path, twins: str, message: str) -> None:
    code, _, stderr = made(
        "select", "--adapter", made.adapter, "--probe", "probe.jsonl", "--data", "mixture.jsonl", "--twins", twins,
        "--top", 0.4, "--out", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert code == 1 and message in stderr and not list(tmp_path.iterdir())


def test_build_refuses_in_one_line_and_leaves_nothing(made: Made, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", [{"text": "The nurse said that"}, {"text": "The"}])
    for words, message in (
        (["--data", tmp_path / "bad.jsonl"], "text 1 has 1 tokens and none to predict"),
        (["--data", tmp_path / "none.jsonl"], "got no such file"),
        (["--data", made.folder / "mixture.jsonl", "--targets", "c_attn"], "targets: no linear layer of a block"),
        (["--data", made.folder / "mixture.jsonl", "--projection", "pca"], "projection: got 'pca'"),
    ):
        code, _, stderr = surgery(
            "attribute", "build", made.model, "--out", tmp_path / "i", "--device", "cpu", "--quiet", *words
        )
        assert code == 1 and message in stderr, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("verb", ["build", "query", "select"])
def test_help_ends_in_examples(verb: str) -> None:
    code, stdout, _ = surgery("attribute", verb, "--help")
    assert code == 0 and f"surgery attribute {verb}" in stdout[stdout.index("Examples:") :]
