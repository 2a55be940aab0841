import contextlib
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.config import PretrainConfig
from localagg.errors import UserError
from localagg.models import create_encoder


@pytest.fixture
def parts():
    encoder = create_encoder("resnet18_small", dim=8, width=4, blocks=(1,), seed=0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    encoder(torch.rand(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    return {"encoder": encoder, "optimizer": optimizer, "bank": MemoryBank(10, 8, seed=0)}


def save(run, step, parts, **progress):
    labels = {"labels": torch.zeros(1, 10, dtype=torch.int32)}
    return checkpoint.save(run, step, **parts, clusters=labels, progress=progress)


def test_what_is_saved_comes_back(tmp_path, parts):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {"data": "digits"})
    folder = save(tmp_path, 7, parts, summary=None)
    fresh = create_encoder("resnet18_small", dim=8, width=4, blocks=(1,), seed=1)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    bank = MemoryBank(10, 8, seed=1)
    clusters, progress = checkpoint.restore(folder, encoder=fresh, optimizer=optimizer, bank=bank)
    assert progress == {"step": 7, "summary": None}
    assert clusters["labels"].shape == (1, 10)
    assert torch.equal(bank.rows, parts["bank"].rows)
    for name, tensor in parts["encoder"].state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    momenta = [state["momentum_buffer"] for state in parts["optimizer"].state.values()]
    for mine, theirs in zip(optimizer.state.values(), momenta, strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs)
    loaded = checkpoint.load_encoder(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), parts["encoder"].eval()(x))


def test_only_the_newest_stays_and_half_written_ones_are_never_seen(tmp_path, parts):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    save(tmp_path, 1, parts)
    save(tmp_path, 2, parts)
    (tmp_path / "checkpoints" / ".step-000000003.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-000000002"
    save(tmp_path, 3, parts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


@pytest.mark.parametrize("room", [0, 200, 1000, -1])
@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_loads(tmp_path, parts, room, step):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    good = save(tmp_path, 1, parts)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if room == -1:  # one byte less than the largest file needs
        room = max(path.stat().st_size for path in good.iterdir()) - 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # bytes of a file
        if step == 1 and room:  # a few words about a step that was saved before
            save(tmp_path, step, parts)
        else:
            with pytest.raises(UserError, match=r"\(File too large.*step-000000001', is whole"):
                save(tmp_path, step, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]
    assert [path.name for path in good.iterdir() if path.name.startswith(".")] == []
    checkpoint.restore(good, **parts)
    checkpoint.load_encoder(tmp_path)


class Cut:
    """What reaches the disk, in order; before a chosen event the process is killed."""

    def __init__(self, monkeypatch, at=None):
        self.events, self.at = [], at
        for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink")):
            self.watch(monkeypatch, module, name)
        self.watch(monkeypatch, checkpoint, "save_tensors")
        self.watch(monkeypatch, shutil, "rmtree")

    def watch(self, monkeypatch, module, name):
        original = getattr(module, name)

        def watched(first, *rest, **options):
            what = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            self.note(name, what)
            original(first, *rest, **options)
            self.note(f"{name} done", what)

        monkeypatch.setattr(module, name, watched)

    def note(self, name, what):
        if not name.endswith("done"):
            if self.at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.at = None if self.at is None else self.at - 1
        self.events.append((name, os.path.basename(what)))


def test_after_a_loss_of_power_a_name_never_stands_for_less_than_its_bytes(
    tmp_path, parts, monkeypatch
):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    save(tmp_path, 1, parts)
    seen = Cut(monkeypatch).events
    folder = save(tmp_path, 2, parts)
    named = seen.index(("rename done", ".step-000000002.tmp"))
    for path in folder.iterdir():
        written = ".progress.json.tmp" if path.name == "progress.json" else path.name
        assert ("fsync done", written) in seen[:named]
    assert ("fsync done", ".step-000000002.tmp") in seen[:named]
    removed = seen.index(("rmtree", "step-000000001"))
    assert ("fsync done", "checkpoints") in seen[named:removed]


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_at_any_moment_of_a_write_leaves_the_checkpoint_before_or_this_one(
    tmp_path, parts, monkeypatch, step
):
    """Step 2 follows step 1; step 1 once more has other words about it."""
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    save(tmp_path, 1, parts, word="before")
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "first")
    rows, moments = parts["bank"].rows.clone(), 0
    while True:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                parts["bank"].rows += step - 1
                Cut(monkeypatch, at=moments)
                save(tmp_path, step, parts, word="after")
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        folder = checkpoint.latest(tmp_path)
        _, progress = checkpoint.restore(folder, **parts)
        assert (progress["step"], progress["word"]) in {(1, "before"), (step, "after")}
        assert torch.equal(parts["bank"].rows, rows + (progress["step"] - 1))
        parts["bank"].rows.copy_(rows)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        shutil.rmtree(tmp_path / "checkpoints")
        shutil.copytree(tmp_path / "first", tmp_path / "checkpoints")
        moments += 1
    assert progress == {"step": step, "word": "after"}
    assert moments > (3 if step == 1 else 15)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "bank-0-of-1.safetensors", "progress.json"]
)
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damage_is_told_in_one_sentence(tmp_path, parts, file, harm):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    folder = save(tmp_path, 1, parts)
    path = folder / file
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged") as caught:
        checkpoint.restore(folder, **parts)
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled_from_an_optimizer_file(tmp_path, parts):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    folder = save(tmp_path, 1, parts)

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(Trap(), folder / "optimizer.pt")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.restore(folder, **parts)
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_not_ours_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="names no architecture"):
        checkpoint.load_encoder(tmp_path / "other.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(UserError, match="are damaged"):
        checkpoint.load_encoder(tmp_path / "noise.safetensors")
    with pytest.raises(UserError, match="There is no run folder or weights file"):
        checkpoint.load_encoder(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"epoch": 1}}))
    with pytest.raises(UserError, match="not an option"):
        checkpoint.read_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_run(tmp_path)
