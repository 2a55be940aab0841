"""Learning rates and reclustering of the reference, for all of its sixteen configurations."""

import json

import pytest

from localagg.config import PretrainConfig, override
from localagg.evaluation.readouts.readout_inputs import general_options
from localagg.recipes.builtin import READOUT_RECIPES, RECIPES, REFERENCE
from localagg.recipes.paper import IMAGENET, PLACES
from localagg.recipes.schedule import Schedule

pytestmark = pytest.mark.reference
# The step at which the reference's read-outs load the weights, and from which they count on.
LOADED = {"alexnet": 1_601_440, "vggnet": 890_712, "res18": 2_001_800, "res50": 2_001_800}


@pytest.fixture
def recorded(fixtures):
    return json.loads((fixtures / "schedule" / "schedule.json").read_text())


def test_rates_of_the_sixteen(recorded):
    names = {name.split(":")[1]: values for name, values in recorded["learning_rate"].items()}
    assert sorted(names) == sorted(REFERENCE)
    for name, values in names.items():
        if name in RECIPES:
            schedule, begin = Schedule(RECIPES[name].config, IMAGENET), 0
        else:
            images = PLACES if name.startswith("plc") else IMAGENET
            schedule = Schedule(general_options(READOUT_RECIPES[name].config), images)
            begin = LOADED[name.split("_")[-2]]
        for step, rate in zip(values["steps"], values["lr"], strict=True):
            if step >= begin:
                assert schedule.learning_rate(step - begin) == pytest.approx(rate, rel=1e-6)
        if name.endswith("_LA") and name in RECIPES:
            assert schedule.total_steps == values["steps"][-1]


def test_reclustering(recorded):
    for case in recorded["reclustering"]:
        config = override(
            PretrainConfig(), epochs=10**6, ir_epochs=0, batch_size=case["batch_size"], drops=()
        )
        schedule = Schedule(config, case["data_len"])
        assert schedule.la_steps == case["steps_per_epoch"]
        first = case["start_global_step"]
        steps = range(first, first + case["num_steps"])
        found = [s for s in steps if schedule.should_cluster(s, has_labels=s > first)]
        assert found == case["recompute_at_global_step"]
