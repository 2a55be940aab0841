import contextlib
import os
import signal
import time

import pytest

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.errors import UserError
from localagg.io.run_lock import lock_run
from localagg.recipes.builtin import recipe
from localagg.training.loop import pretrain, resume


def holder(run, *, worker=False):
    """A process that holds a run's lock until it is killed, perhaps with a worker of its own."""
    ready, told = os.pipe()
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException), lock_run(run):
            child = os.fork() if worker else 0
            if worker and child == 0:
                time.sleep(60)
            os.write(told, f"{child}\n".encode())
            time.sleep(60)
        os._exit(1)
    os.close(told)
    with os.fdopen(ready) as pipe:
        child = int(pipe.readline())
    return process, child


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_run_that_is_being_written_is_refused_by_name(tmp_path):
    config = override(recipe("digits").config, epochs=1, ir_epochs=1, device="cpu")
    checkpoint.begin_run(tmp_path / "run", config, {"data": "digits", **facts()})
    process, _ = holder(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=rf"Another process \({process} on .*run'; wait"):
            resume(tmp_path / "run")
        (tmp_path / "new").mkdir()
        other, _ = holder(tmp_path / "new")
        with pytest.raises(UserError, match=rf"Another process \({other} on .*new'; wait"):
            pretrain(config, "digits", tmp_path / "new")
        kill(other)
    finally:
        kill(process)


def facts():
    from localagg.data.sources.open import open_images

    source = open_images("digits")
    return {"fingerprint": source.fingerprint(), "size": len(source)}


def test_the_lock_of_a_killed_process_holds_nothing_though_its_worker_lives(tmp_path):
    process, worker = holder(tmp_path, worker=True)
    kill(process)
    os.kill(worker, 0)  # it lives
    try:
        with lock_run(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_lock_ends_with_its_block_and_leaves_a_folder_that_is_new(tmp_path):
    for _ in range(2):
        with lock_run(tmp_path / "run"):
            pass
    checkpoint.check_new(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    checkpoint.check_new(tmp_path / "run")
    checkpoint.begin_run(tmp_path / "run", PretrainConfig(), {})
    with pytest.raises(UserError, match="another run"):
        checkpoint.check_new(tmp_path / "run")
