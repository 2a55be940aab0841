"""Late labels: when they take effect, and that a run with them does not depend on their speed."""

import threading
import time

import pytest
import torch
from small_runs import QUICK, assert_same, state

from localagg.clustering import cluster
from localagg.config import override
from localagg.errors import UserError
from localagg.training import late as module
from localagg.training import learner as learner_module
from localagg.training.late import LateLabels
from localagg.training.loop import pretrain, resume


def test_they_are_computed_meanwhile_and_waited_for():
    go = threading.Event()

    def compute() -> torch.Tensor:
        assert go.wait(10)
        return torch.ones(2, 3)

    labels = LateLabels.begin(compute, due=7)  # returns although compute has not
    assert labels.due == 7
    go.set()
    assert torch.equal(labels.wait(), torch.ones(2, 3))
    again = LateLabels.from_tensors(labels.tensors(), "cpu")
    assert again is not None
    assert again.due == 7
    assert torch.equal(again.wait(), labels.wait())
    assert LateLabels.from_tensors({"labels": torch.ones(1)}, "cpu") is None


def test_what_fails_in_the_thread_is_raised_where_it_is_waited_for():
    def compute() -> torch.Tensor:
        raise UserError("TODO", "no")

    with pytest.raises(UserError, match="no"):
        LateLabels.begin(compute, due=1).wait()


LATE = override(QUICK, epochs=4, recluster_delay=5, warm_clusters=True, kmeans="lloyd")


def test_the_labels_are_those_of_the_bank_at_the_start_and_take_effect_at_their_step(
    tmp_path, monkeypatch
):
    banks, seen = [], []
    begin, take = LateLabels.begin, learner_module.Learner.take_labels

    def watch_begin(compute, due):
        banks.append((due, compute.args[0].clone()))
        time.sleep(0.05)
        return begin(compute, due)

    def watch_take(self):
        take(self)
        seen.append((self.step, self.labels))

    monkeypatch.setattr(module.LateLabels, "begin", watch_begin)
    monkeypatch.setattr(learner_module.Learner, "take_labels", watch_take)
    pretrain(override(LATE, warm_clusters=False), "digits", tmp_path / "run")
    # 14 steps an epoch; LA begins with labels at step 14, the others come 5 steps after 28 and 42.
    assert [due for due, _ in banks] == [33, 47]
    assert [step for step, _ in seen] == [33, 47]
    for (_, bank), (_, labels) in zip(banks, seen, strict=True):
        expected = cluster(bank, QUICK.objective.clusters or (), iterations=5, engine="lloyd")
        assert torch.equal(labels, expected)
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("late") / "whole"
    pretrain(LATE, "digits", run)
    return run


@pytest.mark.parametrize("stop", [30, 33, 34])
def test_a_run_stopped_inside_the_delay_ends_as_if_it_never_was(tmp_path, monkeypatch, whole, stop):
    from localagg.training import recorder as record

    after = record.Recorder.after_step

    class Stop(Exception):
        pass

    def interrupt(self, *arguments, **options):
        after(self, *arguments, **options)
        if self.learner.step == stop:
            self.checkpoint()
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(record.Recorder, "after_step", interrupt)
        with pytest.raises(Stop):
            pretrain(LATE, "digits", tmp_path / "run")
    late = "clusters/late-labels" in state(tmp_path / "run")
    assert late == (28 < stop <= 33)
    resume(tmp_path / "run")
    assert_same(whole, tmp_path / "run")


def test_a_delay_longer_than_an_epoch_ends_with_it(tmp_path):
    for name, delay in (("a", 14), ("b", 99), ("c", 0)):
        pretrain(override(LATE, recluster_delay=delay), "digits", tmp_path / name)
    found = {name: state(tmp_path / name) for name in "abc"}
    for tensor in ("bank-0-of-1/rows", "clusters/labels"):
        assert torch.equal(found["a"][tensor], found["b"][tensor])
        assert not torch.equal(found["a"][tensor], found["c"][tensor])
