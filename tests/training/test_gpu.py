"""Training and the engine on a GPU, against float64 and the CPU: ``make gpu`` runs these."""

from pathlib import Path

import naive
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_runs import QUICK, assert_same, state

from localagg import checkpoint
from localagg.config import override
from localagg.distributed.collectives import World
from localagg.engine.search import nearest
from localagg.objectives import instance_softmax, local_aggregation
from localagg.training.recorder import Recorder
from localagg.training.runs import pretrain, resume

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
HERE = override(QUICK, device=DEVICE)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draws), dim=1)


def stop_after(monkeypatch, steps: int) -> None:
    """Let a run end by an exception after some steps, as if it were killed after a checkpoint."""
    after = Recorder.after_step

    def stop(self, *arguments, **options):
        after(self, *arguments, **options)
        if self.learner.step == steps:
            self.checkpoint()
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "after_step", stop)


@pytest.mark.parametrize("size", [5_000, 200_000])
def test_nearest_rows_are_those_of_float64(size):
    queries, bank = unit(128, 128).to(DEVICE), unit(size, 128, seed=1).to(DEVICE)
    rows, sim = nearest(queries, bank, 1024)
    exact = queries.double() @ bank.double().T
    kth = exact.topk(1024, dim=1).values[:, -1:]
    assert bool((exact.gather(1, rows.long()) >= kth - 1e-6).all())
    assert torch.allclose(sim.double(), exact.gather(1, rows.long()), atol=1e-6)
    assert all(len(row.unique()) == 1024 for row in rows)


def test_losses_and_gradients_are_those_of_float64():
    v, bank = unit(6, 16), unit(300, 16, seed=1)
    index, labels = torch.arange(6) * 7, (torch.arange(600).view(2, 300) % 11).int()
    here = v.clone().to(DEVICE).requires_grad_()
    rows, own = bank.to(DEVICE), index.to(DEVICE)
    arrays = v.double().numpy(), bank.double().numpy()
    pairs = [
        (
            local_aggregation(here, rows, labels.to(DEVICE), own, neighbors=64),
            naive.local_aggregation(*arrays, labels.numpy(), index.numpy(), 64, 0.07),
        ),
        (
            instance_softmax(here, rows, own),
            naive.instance_softmax(*arrays, index.numpy(), 0.07),
        ),
    ]
    for loss, (wanted, gradient) in pairs:
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        found = torch.autograd.grad(loss, here)[0].cpu().double()
        assert torch.allclose(found, torch.from_numpy(gradient), atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_repeats_itself_bit_by_bit(tmp_path, precision):
    for name in ("a", "b"):
        pretrain(override(HERE, precision=precision), "digits", tmp_path / name)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_bfloat16_learns_what_float32_learns(tmp_path):
    config = override(HERE, epochs=8, ir_epochs=6, width=16)
    found = {
        precision: pretrain(override(config, precision=precision), "digits", tmp_path / precision)
        for precision in ("32-true", "bf16-mixed")
    }
    accuracy = [result["final"]["knn1"] for result in found.values()]
    assert min(accuracy) > 0.35  # ten classes
    assert abs(accuracy[0] - accuracy[1]) < 0.15


def test_a_run_begins_on_the_cpu_goes_on_here_and_ends_there(tmp_path, monkeypatch):
    pretrain(QUICK, "digits", tmp_path / "whole")
    run = tmp_path / "moved"
    for steps, device in ((10, "cpu"), (20, DEVICE), (None, "cpu")):
        with monkeypatch.context() as patch:
            if steps:
                stop_after(patch, steps)
            try:
                if steps == 10:
                    pretrain(QUICK, "digits", run)
                else:
                    resume(run, override(QUICK, device=device), typed=["device"])
            except KeyboardInterrupt:
                assert checkpoint.read_progress(checkpoint.latest(run))["step"] == steps
    one, other = (state(tmp_path / name) for name in ("whole", "moved"))
    rows = "bank-0-of-1/rows"
    assert one.keys() == other.keys()
    assert (one[rows] * other[rows]).sum(dim=1).mean() > 0.9  # float32 sums differ in their order


def test_a_killed_run_ends_as_if_never_killed(tmp_path, monkeypatch):
    pretrain(HERE, "digits", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 17)
        with pytest.raises(KeyboardInterrupt):
            pretrain(HERE, "digits", tmp_path / "killed")
    resume(tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_compiled_network_learns_what_the_plain_one_learns(tmp_path):
    for name, compiled in (("plain", False), ("compiled", True)):
        pretrain(override(HERE, epochs=1, compile=compiled), "digits", tmp_path / name)
    one, other = (state(tmp_path / name)["bank-0-of-1/rows"] for name in ("plain", "compiled"))
    assert (one * other).sum(dim=1).mean() > 0.99


def test_collectives_over_nccl_with_one_process(tmp_path: Path):
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
    )
    try:
        world = World.current()
        given = unit(8, 4).to(DEVICE)
        summed, gathered = given.clone(), torch.empty_like(given)
        world._all_reduce(summed, dist.ReduceOp.SUM)
        world._all_gather(gathered, given)
        assert torch.equal(summed, given)
        assert torch.equal(gathered, given)
        world._reduce_scatter(gathered.zero_(), given)
        assert torch.equal(gathered, given)
    finally:
        dist.destroy_process_group()
