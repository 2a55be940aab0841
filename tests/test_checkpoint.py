import contextlib
import json
import os
import resource
import shutil
import signal

import pytest
import torch
from expect import user_error
from safetensors.torch import save_file

from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.config import PretrainConfig
from localagg.models import create_encoder


def small_training(seed):
    encoder = create_encoder("resnet18_small", dim=8, width=4, blocks=(1,), seed=seed)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    return {"encoder": encoder, "optimizer": optimizer, "bank": MemoryBank(10, 8, seed=seed)}


@pytest.fixture
def parts(tmp_path):
    """Encoder, optimizer and bank after a step; the run folder is begun."""
    found = small_training(seed=0)
    found["encoder"](torch.rand(2, 3, 16, 16)).sum().backward()
    found["optimizer"].step()
    checkpoint.begin_run(tmp_path, PretrainConfig(), {"data": "digits"})
    return found


def save(run, step, parts, **progress):
    labels = {"labels": torch.zeros(1, 10, dtype=torch.int32)}
    return checkpoint.save(run, step, **parts, clusters=labels, progress=progress)


def test_a_checkpoint_restores_everything(tmp_path, parts):
    folder = save(tmp_path, 7, parts, summary=None)
    fresh = small_training(seed=1)
    clusters, progress = checkpoint.restore(folder, **fresh)
    assert progress == {"step": 7, "clustered": True, "summary": None}
    assert clusters["labels"].shape == (1, 10)
    assert torch.equal(fresh["bank"].rows, parts["bank"].rows)
    for name, tensor in parts["encoder"].state_dict().items():
        assert torch.equal(fresh["encoder"].state_dict()[name], tensor)
    pairs = zip(fresh["optimizer"].state.values(), parts["optimizer"].state.values(), strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    loaded = checkpoint.load_encoder(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), parts["encoder"].eval()(x))


def test_only_the_newest_stays_and_unfinished_ones_are_ignored(tmp_path, parts):
    save(tmp_path, 1, parts)
    save(tmp_path, 2, parts)
    (tmp_path / "checkpoints" / ".step-000000003.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-000000002"
    save(tmp_path, 3, parts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


@pytest.mark.parametrize("room", [0, 200, 1000, -1])
@pytest.mark.parametrize("step", [1, 2])
def test_on_a_full_disk_the_last_checkpoint_is_named_and_loads(tmp_path, parts, room, step):
    good = save(tmp_path, 1, parts)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if room == -1:  # one byte less than the largest file needs
        room = max(path.stat().st_size for path in good.iterdir()) - 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # bytes of a file
        if step == 1 and room:  # a few words about a step that was saved before
            save(tmp_path, step, parts)
        else:
            with user_error("environment", "File too large", good):
                save(tmp_path, step, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]
    assert [path.name for path in good.iterdir() if path.name.startswith(".")] == []
    checkpoint.restore(good, **parts)
    checkpoint.load_encoder(tmp_path)


class DiskEvents:
    """Note every write to the disk in order; kill the process before a chosen one."""

    def __init__(self, monkeypatch, kill_before=None):
        self.events, self.left = [], kill_before
        names = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink")]
        for module, name in (*names, (checkpoint, "save_tensors"), (shutil, "rmtree")):
            self.observe(monkeypatch, module, name)

    def observe(self, monkeypatch, module, name):
        original = getattr(module, name)

        def observed(first, *rest, **options):
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left = None if self.left is None else self.left - 1
            self.events.append((name, os.path.basename(path)))
            original(first, *rest, **options)
            self.events.append((f"{name} done", os.path.basename(path)))

        monkeypatch.setattr(module, name, observed)


def test_after_a_loss_of_power_a_name_never_stands_for_less_than_its_bytes(
    tmp_path, parts, monkeypatch
):
    save(tmp_path, 1, parts)
    seen = DiskEvents(monkeypatch).events
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
    """Step 2 follows step 1; step 1 is saved once more with another progress."""
    save(tmp_path, 1, parts, word="before")
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "first")
    rows, moments = parts["bank"].rows.clone(), 0
    while True:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                parts["bank"].rows += step - 1
                DiskEvents(monkeypatch, kill_before=moments)
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
    assert progress == {"step": step, "clustered": True, "word": "after"}
    assert moments > (3 if step == 1 else 15)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "bank-0-of-1.safetensors", "progress.json"]
)
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damage_names_the_checkpoint_in_one_line(tmp_path, parts, file, harm):
    folder = save(tmp_path, 1, parts)
    path = folder / file
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with user_error("damaged", folder) as caught:
        checkpoint.restore(folder, **parts)
    assert "\n" not in str(caught.value)


def test_files_of_other_programs_and_damaged_ones_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    with user_error("not-found", path):
        checkpoint.load_encoder(path)
    for metadata, code in ((None, "unsupported"), ({"localagg": "7"}, "damaged")):
        save_file({"x": torch.zeros(1)}, path, metadata)
        with user_error(code, path):
            checkpoint.load_encoder(path)
    path.write_bytes(b"noise")
    for read in (checkpoint.load_encoder, checkpoint.load_views):
        with user_error("damaged", path):
            read(path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"config": {"epoch": 1}}))
    with pytest.raises(checkpoint.UserError, match="epoch"):
        checkpoint.read_run(tmp_path)
    for text in ("{", "[]", "7"):
        config.write_text(text)
        with user_error("damaged", config):
            checkpoint.read_run(tmp_path)


@pytest.mark.parametrize("moved", [True, False])
def test_a_write_into_a_run_that_was_moved_names_the_move(tmp_path, moved):
    run = tmp_path / "run"
    if not moved:
        checkpoint.begin_run(run, PretrainConfig(), {"data": "digits"})
    code = "not-found" if moved else "environment"
    with user_error(code, run), checkpoint.convert_write_errors(run):
        (run / "checkpoints" / ".step-1.tmp" / "progress.json").write_text("{}")
