"""Undo gives the original back byte for byte, and kills and full disks leave either nothing or everything."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import deltakit as kit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery import SurgeryError
from surgery.apply import apply, engine, undo
from surgery.files.safetensors_io import header_bytes, read_header

# The suite kills a few times; the long run is SURGERY_KILLS=100 python -m pytest tests/test_undo.py -k kill
KILLS = int(os.environ.get("SURGERY_KILLS", "5"))


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    how=st.sampled_from(["nearest", "stochastic"]),
    mode=st.sampled_from(["record", "reference"]),
    shards=st.integers(1, 4),
    size=st.sampled_from([1e-5, 1e-2, 3.0]),
    seed=st.integers(0, 100),
)
def test_apply_then_undo_is_the_identity(tmp_path_factory, dtype, how, mode, shards, size, seed):
    tmp = tmp_path_factory.mktemp("undo")
    source = {name: value.to(dtype) for name, value in kit.weights(seed=seed).items()}
    base = kit.save(tmp / "base", source, shards=shards)
    (base / "model-card").mkdir()
    (base / "model-card" / "a.txt").write_text("a")
    report = apply(kit.edit(base, (kit.DOWN, kit.NORM, kit.EMBED), size), base, tmp / "out", rounding=how, undo=mode)
    assert report.changed > 0 or size < 1e-3
    back = undo(tmp / "out", tmp / "back")
    assert kit.hashes(tmp / "back") == kit.hashes(base)
    assert set(back.tensors) == {kit.DOWN, kit.NORM, kit.EMBED} and back.settings["rounding"] == how
    assert sorted(p.name for p in tmp.iterdir()) == ["back", "base", "out"]


@pytest.fixture
def base(tmp_path):
    return kit.save(tmp_path / "base", kit.weights())


def test_two_edits_are_undone_one_by_one(base, tmp_path):
    apply(kit.edit(base, seed=1), base, tmp_path / "1")
    apply(kit.edit(base, seed=2), tmp_path / "1", tmp_path / "2")
    assert (tmp_path / "2" / "undo-2.surgery").exists()
    undo(tmp_path / "2", tmp_path / "1again")
    assert kit.hashes(tmp_path / "1again") == kit.hashes(tmp_path / "1")
    undo(tmp_path / "1again", tmp_path / "0again")
    assert kit.hashes(tmp_path / "0again") == kit.hashes(base)
    with pytest.raises(SurgeryError, match=r"holds no undo.surgery"):
        undo(tmp_path / "0again", tmp_path / "x")


def test_linked_result_is_undone_without_touching_the_source(tmp_path):
    base = kit.save(tmp_path / "base", kit.weights(), shards=3)
    before = kit.hashes(base)
    apply(kit.edit(base), base, tmp_path / "out", link=True)
    undo(tmp_path / "out", tmp_path / "back")
    assert kit.hashes(tmp_path / "back") == before == kit.hashes(base)


def test_read_only_files(base, tmp_path):
    for path in base.iterdir():
        path.chmod(0o444)
    apply(kit.edit(base), base, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o444
    undo(tmp_path / "out", tmp_path / "back")
    assert kit.hashes(tmp_path / "back") == kit.hashes(base)


def patch(path, name, value):
    """Change the first byte of one tensor in a file."""
    with open(path, "r+b") as file:
        file.seek(read_header(path).tensors[name].begin)
        file.write(bytes([value]))


@pytest.mark.parametrize("mode", ["record", "reference"])
def test_changed_bytes_are_refused_by_name(base, tmp_path, mode):
    apply(kit.edit(base), base, tmp_path / "out", undo=mode)
    patch(tmp_path / "out" / "model.safetensors", kit.DOWN, 0x77)
    with pytest.raises(SurgeryError, match=r"down_proj.weight' was changed after the edit"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_changes_elsewhere_are_kept(base, tmp_path):
    apply(kit.edit(base), base, tmp_path / "out")
    patch(tmp_path / "out" / "model.safetensors", kit.Q, 0x77)
    undo(tmp_path / "out", tmp_path / "back")
    assert torch.equal(kit.load(tmp_path / "back")[kit.DOWN], kit.load(base)[kit.DOWN])
    assert not torch.equal(kit.load(tmp_path / "back")[kit.Q], kit.load(base)[kit.Q])


def test_reference_to_a_changed_or_missing_original(base, tmp_path):
    apply(kit.edit(base), base, tmp_path / "out", undo="reference")
    patch(base / "model.safetensors", kit.DOWN, 0x77)
    with pytest.raises(SurgeryError, match=r"down_proj.weight' is not the original any more"):
        undo(tmp_path / "out", tmp_path / "back")
    shutil.rmtree(base)
    with pytest.raises(SurgeryError, match=r"no such checkpoint directory"):
        undo(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_broken_records_leave_nothing(base, tmp_path):
    apply(kit.edit(base), base, tmp_path / "out")
    path = tmp_path / "out" / "undo.surgery"
    good = path.read_bytes()
    entry = read_header(path).tensors[kit.DOWN]
    middle = (entry.begin + entry.end) // 2
    broken = bytearray(good)
    broken[middle] ^= 0xFF
    header = read_header(path)
    content = json.loads(header.metadata["surgery_undo"])
    cases = [bytes(broken), good[:100], b"", good[:-1]]
    for change in (
        {"format": 2},
        {"tensors": {"../x": {}}},
        {"tensors": {kit.DOWN: content["tensors"][kit.DOWN] | {"elements": 2**60}}},
        {"tensors": {kit.DOWN: content["tensors"][kit.DOWN] | {"before": "0" * 64}}},
        {"mode": "reference", "source": "a\0b"},
        {"mode": "reference", "source": str(tmp_path / "absent")},
    ):
        spec = {name: (e.dtype, e.shape) for name, e in header.tensors.items()}
        head, order = header_bytes(spec, {"surgery_undo": json.dumps(content | change)})
        blobs = b"".join(good[header.tensors[name].begin : header.tensors[name].end] for name in order)
        cases.append(head + blobs)
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(SurgeryError):
            undo(tmp_path / "out", tmp_path / "back")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_source_that_changes_after_the_check_is_noticed(base, tmp_path, monkeypatch):
    planned = engine.make_plan

    def plan_then_change(*arguments, **options):
        plan = planned(*arguments, **options)
        patch(base / "model.safetensors", kit.DOWN, 0x77)
        return plan

    monkeypatch.setattr(engine, "make_plan", plan_then_change)
    with pytest.raises(SurgeryError, match=r"down_proj.weight' changed while it was being copied"):
        apply(kit.edit(base), base, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_stale_temporaries_are_swept_and_live_ones_are_not(base, tmp_path):
    (tmp_path / ".dead.0123.surgery-part").mkdir()
    (tmp_path / ".dead.0123.surgery-part" / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".dead.4567.surgery-part").write_bytes(b"x")
    (tmp_path / ".other").mkdir()
    alive = tmp_path / ".alive.89ab.surgery-part"
    code = """if True:
        import fcntl, os, sys
        os.mkdir(sys.argv[1])
        fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
        print("locked", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(alive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        apply(kit.edit(base), base, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, ".other", "base", "out"]
        other.stdin.close()
    undo(tmp_path / "out", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other", "back", "base", "out"]


CHILD = """if True:
    import resource, sys
    from surgery import SurgeryError
    from surgery.apply import apply, engine, undo
    delta, base, out, limit = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    print("go", flush=True)
    try:
        apply(delta, base, out, rounding="stochastic") if delta else undo(base, out)
    except SurgeryError as error:
        sys.exit(str(error))
    print("done", flush=True)
"""


def child(delta, base, out, limit=0):
    command = [sys.executable, "-c", CHILD, str(delta), str(base), str(out), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def big(tmp_path):
    """A checkpoint of a few MB in two shards, so that a kill falls into every phase."""
    shape = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64}
    return kit.save(tmp_path / "base", kit.weights(**shape), shards=2, **shape)


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_kill_leaves_nothing_or_everything(tmp_path, verb):
    base = big(tmp_path)
    names = (kit.DOWN, kit.DOWN.replace("1", "0"), kit.EMBED)
    kit.edit(base, names).save(tmp_path / "d.safetensors")
    delta = tmp_path / "d.safetensors"
    apply(delta, base, tmp_path / "edited", rounding="stochastic")
    source, wanted = (base, tmp_path / "edited") if verb == "apply" else (tmp_path / "edited", base)
    before, complete = kit.hashes(source), kit.hashes(wanted)
    spans = []
    for number in range(3):  # how long an undisturbed run takes
        with child(delta if verb == "apply" else "", source, tmp_path / f"timing{number}") as run:
            run.stdout.readline()
            start = time.monotonic()
            assert run.stdout.readline() == "done\n", run.stderr.read()
            spans.append(time.monotonic() - start)
        assert kit.hashes(tmp_path / f"timing{number}") == complete
        shutil.rmtree(tmp_path / f"timing{number}")
    out, choose, seen = tmp_path / "out", random.Random(0), {"nothing": 0, "everything": 0}
    for _ in range(KILLS):
        with child(delta if verb == "apply" else "", source, out) as run:
            run.stdout.readline()
            time.sleep(choose.uniform(0, 1.1 * sorted(spans)[1]))
            run.send_signal(signal.SIGKILL)
        assert kit.hashes(source) == before
        if out.exists():
            assert kit.hashes(out) == complete
            shutil.rmtree(out)
            seen["everything"] += 1
        else:
            seen["nothing"] += 1
    print(verb, seen, f"of {KILLS} kills within {1.1 * sorted(spans)[1]:.3f} s")
    # What the killed runs left is gone after the next one.
    if verb == "apply":
        apply(delta, base, out, rounding="stochastic")
    else:
        undo(source, out)
    assert kit.hashes(out) == complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "d.safetensors", "edited", "out"]


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_file_size_limit(tmp_path, verb):
    base = big(tmp_path)
    kit.edit(base).save(tmp_path / "d.safetensors")
    apply(tmp_path / "d.safetensors", base, tmp_path / "edited")
    source = base if verb == "apply" else tmp_path / "edited"
    before = kit.hashes(source)
    for limit in (10, 100_000, 3_000_000):
        with child(tmp_path / "d.safetensors" if verb == "apply" else "", source, tmp_path / "out", limit) as run:
            message = run.stderr.read()
        assert run.returncode == 1 and "writing failed (File too large" in message and len(message.splitlines()) == 1
        assert kit.hashes(source) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "d.safetensors", "edited"]


def test_full_disk(tmp_path):
    base = big(tmp_path)
    delta = kit.edit(base)
    apply(delta, base, tmp_path / "edited")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs of 2 MB")
    try:
        before = kit.hashes(base)
        for verb in (
            lambda: apply(delta, base, small / "out"),
            lambda: undo(tmp_path / "edited", small / "out"),
        ):
            with pytest.raises(SurgeryError, match=r"No space left on device.*nothing was left behind"):
                verb()
            assert list(small.iterdir()) == [] and kit.hashes(base) == before
        large = kit.edit(base, tuple(kit.load(base)))
        with pytest.raises(SurgeryError, match=r"No space left on device"):
            large.save(small / "d.safetensors")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
