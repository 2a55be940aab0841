import pytest
from expect import user_error
from hypothesis import given
from hypothesis import strategies as st

from localagg.config import PretrainConfig, override
from localagg.recipes.builtin import recipe
from localagg.recipes.schedule import Schedule, check_aggregates


def schedule(images=1000, **options):
    base = {"epochs": 6, "ir_epochs": 2, "batch_size": 100, "drops": (4.0, 5.5)}
    return Schedule(override(PretrainConfig(), **{**base, **options}), images)


def walk(s: Schedule) -> list[tuple[int, int, bool]]:
    """Every step of a run, as the training loop takes them."""
    seen, step = [], 0
    while step < s.total_steps:
        for batch in range(
            s.position(step).batch, s.position(step).batch + s.end_of_epoch(step) - step
        ):
            seen.append((s.position(step).epoch, batch, s.position(step).aggregating))
            step += 1
    assert step == s.total_steps
    return seen


def test_one_batch_size_is_plain_epochs():
    expected = [(epoch, batch, epoch >= 2) for epoch in range(6) for batch in range(10)]
    assert walk(schedule()) == expected


@given(
    images=st.integers(64, 400),
    batch=st.integers(1, 64),
    ir_batch=st.integers(1, 64),
    ir_epochs=st.integers(0, 4),
    more=st.integers(0, 4),
)
def test_every_step_has_one_position(images, batch, ir_batch, ir_epochs, more):
    s = schedule(
        images, batch_size=batch, ir_batch_size=ir_batch, ir_epochs=ir_epochs,
        epochs=max(1, ir_epochs + more),
    )  # fmt: skip
    seen = walk(s)
    assert len(seen) == len(set(seen)) == s.total_steps
    assert sum(not aggregating for _, _, aggregating in seen) == s.la_start
    for _, batch_number, aggregating in seen:
        assert 0 <= batch_number < (s.la_steps if aggregating else s.ir_steps)
    assert s.images_seen == s.la_start * ir_batch + (s.total_steps - s.la_start) * batch


def test_the_rate_drops_on_the_step_after_the_boundary():
    s = schedule(learning_rate=1.0)
    rates = [s.learning_rate(step) for step in (0, 40, 41, 55, 56)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    s = schedule(learning_rate=1.0, drop_steps=(7,))
    assert [s.learning_rate(step) for step in (7, 8, 59)] == pytest.approx([1, 0.1, 0.1])


def test_a_cosine_replaces_the_drops():
    s = schedule(learning_rate=2.0, rate_schedule="cosine")
    assert s.boundaries == []
    rates = [s.learning_rate(step) for step in (0, 15, 30, 45, 59)]
    assert rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0.00137], abs=1e-5)


def test_the_bank_is_clustered_when_la_starts_and_at_each_epoch():
    s = schedule()
    asked = [step for step in range(s.total_steps) if s.should_cluster(step, has_labels=step > 20)]
    assert asked == [20, 30, 40, 50]
    s = schedule(images=1020, ir_batch_size=60, ir_epochs=1)  # IR ends at step 17
    asked = [step for step in range(s.total_steps) if s.should_cluster(step, has_labels=step > 17)]
    assert asked == [17, 20, 30, 40, 50]


def test_the_references_vgg_switches_inside_an_epoch_of_its_larger_batch():
    s = Schedule(recipe("vggnet_LA").config, 1_281_167)
    assert (s.ir_steps, s.la_steps, s.la_start, s.total_steps) == (10_009, 5_004, 100_090, 890_712)
    assert s.position(100_089) == (9, 10_008, False)
    assert s.position(100_090) == (20, 10, True)
    assert s.boundaries == [680_681, 790_791]


def test_ir_in_smaller_batches_that_takes_all_steps_is_refused():
    base = {"epochs": 50, "ir_epochs": 30, "batch_size": 128, "drops": (40.0,)}
    config = override(PretrainConfig(), **base, ir_batch_size=64)
    assert Schedule(config, 1400).la_start == 630
    with user_error("option-conflict", "630", "--ir-batch-size"):
        check_aggregates(config, 1400)
    check_aggregates(override(config, ir_batch_size=128), 1400)
    check_aggregates(override(config, ir_epochs=50), 1400)  # IR alone, as asked
