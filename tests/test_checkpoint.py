import json

import pytest
import torch
from safetensors.torch import save_file

from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.config import PretrainConfig, UserError
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


def test_a_failed_write_leaves_the_last_good_one(tmp_path, parts, monkeypatch):
    checkpoint.begin_run(tmp_path, PretrainConfig(), {})
    good = save(tmp_path, 1, parts)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, parts)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == good
    checkpoint.load_encoder(tmp_path)


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
