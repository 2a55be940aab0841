"""Runs go on: for more epochs, after LA, and on images that changed since."""

import os
import shutil

import numpy as np
import pytest
import torch
from expect import user_error
from small_runs import assert_same, state

from localagg import checkpoint, pretrain, resume
from localagg.config import PretrainConfig, override
from localagg.data.inspect.image_contents import content_digests, match_contents
from localagg.data.sources.open import open_images
from localagg.embeddings.embed import embed
from localagg.io.metrics_log import read_metrics
from localagg.training.continue_run import prolong

SMALL = override(
    PretrainConfig(),
    model="resnet18_small", width=8, blocks=(1,), image_size=16, epochs=3, ir_epochs=1,
    batch_size=12, workers=0, device="cpu", precision="32-true", drops=(2.0, 4.0),
)  # fmt: skip
LONGER = override(SMALL, epochs=5)
TYPED = frozenset({"epochs", "drops"})


def assert_same_state(one, other):
    """Weights, bank and clusters, bit for bit. The log also has the last step of the first end."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def train(pictures):
    return pictures / "train"


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """IR for an epoch, LA for two."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(SMALL, str(train), run)
    return run


@pytest.fixture(scope="module")
def longer(train, tmp_path_factory):
    """The same run, five epochs without a stop."""
    run = tmp_path_factory.mktemp("runs") / "longer"
    pretrain(LONGER, str(train), run)
    return run


def test_a_prolonged_run_is_one_that_never_stopped(finished, longer, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    summary = resume(tmp_path / "run", LONGER, typed=TYPED)
    assert summary["epochs"] == 5
    assert_same_state(tmp_path / "run", longer)
    assert resume(tmp_path / "run")["epochs"] == 5  # it has finished its new epochs


def test_growing_by_nothing_is_going_on(finished, longer, train, tmp_path):
    """The options of the run are kept, though the configuration names none of them."""
    config = override(PretrainConfig(), epochs=5, drops=(2.0, 4.0))
    pretrain(config, str(train), tmp_path / "run", start=finished)
    assert_same_state(tmp_path / "run", longer)


def test_a_prolonged_run_states_the_drops_of_its_new_end(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    resume(tmp_path / "run", override(SMALL, epochs=4), typed={"epochs"})
    assert checkpoint.read_run(tmp_path / "run")[0].drops == (3.2, 3.74)


def killed_after(monkeypatch, steps):
    """Kill a run after some steps, without a last checkpoint."""
    from localagg.training import loop

    left, take_step = [steps], loop.take_step

    def counted(*arguments, **options):
        if not left[0]:
            raise RuntimeError("killed")
        left[0] -= 1
        return take_step(*arguments, **options)

    monkeypatch.setattr(loop, "take_step", counted)


@pytest.mark.parametrize("steps", [0, 3, 6])
def test_killed_in_the_middle_a_prolonged_run_resumes_bit_exactly(
    finished, longer, tmp_path, monkeypatch, steps
):
    shutil.copytree(finished, tmp_path / "run")
    with monkeypatch.context() as patch:
        killed_after(patch, steps)
        with pytest.raises(RuntimeError, match="killed"):
            resume(tmp_path / "run", LONGER, typed=TYPED)
    resume(tmp_path / "run")
    assert_same_state(tmp_path / "run", longer)


@pytest.fixture(scope="module")
def grown_folder(train, pictures, tmp_path_factory):
    """A photo renamed, one removed, four new."""
    folder = tmp_path_factory.mktemp("grown") / "train"
    shutil.copytree(train, folder)
    os.rename(folder / "flower" / "01.jpg", folder / "flower" / "zz.jpg")
    (folder / "flower" / "02.jpg").unlink()
    for i in range(4):
        shutil.copy(pictures / "val" / "temple" / f"{i:02d}.{'png' if i == 0 else 'jpg'}",
                    folder / "temple" / f"new{i}{'.png' if i == 0 else '.jpg'}")  # fmt: skip
    return folder


def test_known_images_keep_their_rows_and_new_ones_are_embedded(
    finished, train, grown_folder, tmp_path, monkeypatch, capfd
):
    from localagg.training import runs

    first = {}
    monkeypatch.setattr(runs, "train", lambda run, feed, features, learner, *_: first.update(
        rows=learner.bank.rows.clone(), step=learner.step, learner=learner
    ) or {})  # fmt: skip
    pretrain(PretrainConfig(), str(grown_folder), tmp_path / "run", start=finished)
    old, new = open_images(str(train)), open_images(str(grown_folder))
    bytes_of = {old[i].image: i for i in range(len(old))}
    bank, learner = checkpoint.load_bank(finished), first["learner"]
    embedded = embed(checkpoint.load_encoder(finished), new, learner.config.views).rows
    known = 0
    for i in range(len(new)):
        if (row := bytes_of.get(new[i].image)) is not None:
            assert torch.equal(first["rows"][i], bank[row])
            known += 1
        else:
            torch.testing.assert_close(first["rows"][i], embedded[i], atol=1e-5, rtol=0)
    assert (known, len(new)) == (47, 51)
    assert first["step"] == 3 * (51 // 12)
    assert learner.config.epochs == 4
    assert learner.config.drops == (3.8, 3.94)  # within the new epoch, at the full rate before
    assert learner.config.encoder == checkpoint.read_run(finished)[0].encoder
    message = " ".join(capfd.readouterr().err.split())
    for count in ("51 images", "47 are known", "4 are new", "1 of"):
        assert count in message


def test_a_grown_run_learns_and_resumes_bit_exactly(finished, grown_folder, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    config = override(PretrainConfig(), epochs=5)
    pretrain(config, str(grown_folder), one, start=finished)
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(config, str(grown_folder), other, start=finished)
    resume(other)
    assert_same(one, other)
    grown = checkpoint.read_run(one)[0]
    assert (grown.ir_epochs, grown.epochs, grown.drops) == (4, 5, (4.6, 4.87))
    assert [line["phase"] for line in read_metrics(one) if "phase" in line][-1] == "LA"


def test_contents_match_whatever_the_names_and_identical_images_in_order(train, grown_folder):
    a, b, c, none = (letter * 16 for letter in (b"a", b"b", b"c", b""))
    new, known = np.array([b, a, a, a, c, none], "S16"), np.array([a, none, b, a], "S16")
    assert match_contents(new, known).tolist() == [2, 0, 3, 3, -1, -1]
    digests = content_digests(open_images(str(train)))
    assert len(set(digests.tolist())) == 48
    assert (match_contents(content_digests(open_images(str(grown_folder))), digests) < 0).sum() == 4
    pixels = content_digests(open_images("digits"))
    assert pixels.tolist() == content_digests(open_images("digits")).tolist()


def test_a_run_without_noted_contents_uses_its_images(finished, train, grown_folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    (old / "contents.npy").unlink()
    config = override(PretrainConfig(), epochs=4)
    pretrain(config, str(grown_folder), tmp_path / "run", start=old)
    text = (old / "config.json").read_text()
    (old / "config.json").write_text(text.replace(f'"{train}"', '"digits"'))
    with user_error("mismatch", old, "digits"):
        pretrain(config, str(grown_folder), tmp_path / "other", start=old)


def test_what_cannot_go_on_gives_one_sentence(finished, train, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with user_error("option-invalid", "--epochs 2", "3"):
        resume(tmp_path / "run", override(SMALL, epochs=2), typed={"epochs"})
    with user_error("mismatch", "--drops"):
        resume(tmp_path / "run", override(SMALL, drops=(1.0,)), typed={"drops"})
    with user_error("option-invalid", "--epochs 3"):
        pretrain(SMALL, str(train), tmp_path / "new", start=finished)
    with user_error("mismatch", finished):
        pretrain(override(LONGER, width=16), str(train), tmp_path / "new", start=finished)
    assert not (tmp_path / "new").exists()
    ir = tmp_path / "ir"
    pretrain(override(SMALL, epochs=1), str(train), ir)
    with user_error("unsupported", ir, "--start"):
        resume(ir, override(SMALL, epochs=2), typed={"epochs"})
    head = override(SMALL, feature_views=2)  # --start refuses such a run, so it is no advice
    with user_error("unsupported", "run", f"adapt --weights {finished} --epochs 9"):
        prolong(head, 9, None, open_images(str(train)), finished)


def test_callbacks_get_each_epoch_and_each_line_of_metrics(train, tmp_path):
    epochs, lines = [], []
    callbacks = {
        "on_epoch": lambda epoch, metrics: epochs.append((epoch, metrics)),
        "on_metrics": lambda step, values: lines.append({"step": step, **values}),
    }
    pretrain(SMALL, str(train), tmp_path / "run", **callbacks)
    assert [epoch for epoch, _ in epochs] == [1, 2, 3]
    assert all("spread" in metrics for _, metrics in epochs)
    assert lines == read_metrics(tmp_path / "run")
    resume(tmp_path / "run", override(SMALL, epochs=4), typed={"epochs"}, **callbacks)
    assert [epoch for epoch, _ in epochs] == [1, 2, 3, 4]


@pytest.mark.parametrize("batch", [6, 24])
def test_a_run_that_goes_on_in_other_batches_learns_the_epochs_that_are_left(
    finished, train, tmp_path, batch
):
    config = override(SMALL, batch_size=batch, epochs=5)
    typed = {"batch_size", "epochs"}
    pretrain(config, str(train), tmp_path / "run", start=finished, typed=typed)
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    last = 5 * (48 // batch)
    assert max(steps) == last
    assert min(steps) > 3 * (48 // batch)


def test_a_run_killed_while_it_noted_its_images_notes_them_when_it_begins_anew(
    train, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("localagg.training.runs.save_contents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(override(SMALL, epochs=1), str(train), tmp_path / "run")
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "contents.npy").exists()
