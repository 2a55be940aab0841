from localagg.report.charts import curves, health_curves


def line(epoch, **values):
    return {"step": epoch, "epoch": epoch, "spread": 0.5, "effective_rank": 9.0, **values}


def test_every_measure_of_health_is_a_curve_and_warnings_are_listed():
    found = health_curves(
        {
            "IR": [line(1, staleness=0.625), {"step": 3, "epoch": 2, "loss": 1.0}],
            "<b>": [line(2, churn=0.875, warnings=["churn"]), line(3, largest_cluster=41.5)],
        }
    )
    for shown in ("0.625", "0.875", "41.5", "churn of clusters"):
        assert shown in found
    assert "<li>&lt;b&gt;, epoch 2: churn" in found
    assert "<b>, epoch" not in found
    assert "epoch 3" not in found
    assert "<li>" not in health_curves({"IR": [line(1)]})


def test_curves_hold_every_measurement_of_every_run():
    lines = [
        {"step": 1, "epoch": 1, "loss": 7.0},
        {"step": 2, "epoch": 2, "loss": 6.0},
        {"step": 2, "epoch": 2, "knn1": 0.5},
    ]
    found = curves({"IR": lines, "LA": lines}, switch=1)
    assert found.count('"name":"IR"') == found.count('"name":"LA"') == 2
    assert "knn1" in found
