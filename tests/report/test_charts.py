import re

from localagg.report.charts import draw_curves, learning_curves


def line(epoch, **values):
    return {"step": epoch, "epoch": epoch, "spread": 0.5, "effective_rank": 9.0, **values}


def test_every_measure_is_a_figure_and_warnings_are_listed():
    found = learning_curves(
        {
            "IR": [line(1, staleness=0.625, loss=7.0), {"step": 3, "epoch": 2, "knn1": 0.5}],
            "<b>": [line(2, churn=0.875, warnings=["churn"]), line(3, largest_cluster=41.5)],
        },
        {"IR": 1},
    )
    titles = re.findall("<figcaption>(.*?)</figcaption>", found)
    assert titles[:4] == ["loss", "knn1", "spread", "effective rank"]
    assert {"staleness of the bank", "largest cluster / mean", "churn of clusters"} < {*titles}
    assert "without a close neighbor" not in titles
    for shown in ("at the end 0.625", "at the end 0.875", "at the end 41.5"):
        assert shown in found
    assert "<li><bdi>&lt;b&gt;</bdi>, epoch 2: churn" in found
    assert "<b>" not in found
    assert "class=warnings" not in learning_curves({"IR": [line(1)]})


def test_points_lie_where_their_values_are():
    """Against the scale of the ticks."""
    found = draw_curves({"a": [(0, 0.0), (5, 2.0), (10, 10.0)]}, marks=[5], bound=9.0)
    (path,) = re.findall(r"class='s0' d='M(.*?)h", found)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    ticks = re.findall(r"y=([\d.]+) text-anchor=end>([\d.]+)<", found)
    (y0, v0), (y1, v1) = [(float(y) - 4, float(value)) for y, value in (ticks[0], ticks[-1])]
    for (_, y), value in zip(points, (0, 2, 10), strict=True):
        assert abs(y0 + (value - v0) / (v1 - v0) * (y1 - y0) - y) < 0.2
    assert points[1][0] - points[0][0] == points[2][0] - points[1][0]
    assert f"class=mark d='M{points[1][0]:.1f} " in found
    assert found.count("class=mark") == 2
    for flat in ([(1, 3.0)], [(1, 0.0), (2, 0.0)], [(1, -1e-9), (2, 1e9)]):
        assert "nan" not in draw_curves({"a": flat}, bound=5.0)
