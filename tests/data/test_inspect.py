import shutil

from localagg.data.inspect import inspect, summary_rows


def test_everything_is_counted_and_the_unreadable_are_named(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "temple" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (data / "train" / "flower" / "02.jpg").write_bytes(b"")
    expected = [
        {"name": "flower/02.jpg", "reason": "empty file"},
        {"name": "temple/05.jpg", "reason": "truncated"},
    ]
    for workers in (0, 2):
        result = inspect(str(data), workers=workers)
        facts = result["splits"]["train"]
        assert facts["images"] == 48
        assert facts["classes"] == {"flower": 24, "temple": 24}
        assert facts["formats"] == {"JPEG": 34, "PNG": 12}
        assert facts["height"] == [48, 64, 64]  # 23 images each: the upper median
        told = facts["unreadable"]
        assert [bad["name"] for bad in told] == [bad["name"] for bad in expected]
        for bad, wanted in zip(told, expected, strict=True):
            assert wanted["reason"] in bad["reason"].lower()  # Pillow's words vary
        assert result["splits"]["val"]["images"] == 12
        assert result["splits"]["val"]["unreadable"] == []
    rows = dict(summary_rows(facts))
    assert rows["unreadable"] == "2"
    assert rows["classes"] == "2 of 24 to 24 images"
    assert rows["  flower/02.jpg"] == "empty file"


def test_many_unreadable_are_counted_and_few_printed(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    facts = inspect(str(tmp_path))["splits"]["train"]
    assert len(facts["unreadable"]) == 9
    assert facts["height"] is None
    rows = summary_rows(facts)
    assert rows[-1] == ["  and 4 more", "all are in --json FILE"]
