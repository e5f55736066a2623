"""The bucket benchmark measures kohya's way as that trainer goes it."""

import json
import re

import buckets
import machine
import pytest

from sdlora.data.buckets import choose_buckets


def test_kohya_measures_aspects_on_a_linear_scale():
    listed = buckets.kohya_list(512)
    # 9:16 = 0.5625 lies 0.0375 from 384x640 and 0.108 from 320x704
    assert buckets.kohya_bucket((900, 1600), listed) == (384, 640)
    # 3.5: 896x256 is 3.5 itself
    assert buckets.kohya_bucket((3500, 1000), listed) == (896, 256)
    # 0.525 lies 0.0705 from 320x704 and 0.075 from 384x640, whose ratio of aspects is the smaller
    assert buckets.kohya_bucket((525, 1000), listed) == (320, 704)
    assert choose_buckets([(525, 1000)], listed)[0] == (384, 640)


def test_kohya_keeps_a_picture_that_has_the_size_of_a_bucket():
    # 256x512 has the aspect of the first of these, and is itself the second
    assert buckets.kohya_bucket((512, 1024), [(256, 512), (512, 1024)]) == (512, 1024)
    assert buckets.kohya_bucket((510, 1020), [(256, 512), (512, 1024)]) == (256, 512)


def test_both_methods_are_measured_on_the_same_pictures():
    found = buckets.compare([(512, 512)] * 3 + [(600, 500)], 512)
    assert found["shapes"] == 17
    # of 600x500, which is 1.2, kohya's 576x448 keeps 1.2 / (9 / 7), the fitted 560x464 keeps 1.2 / (35 / 29)
    assert found["kohya"] == pytest.approx(
        {"crop": (1 - 1.2 / (9 / 7)) / 4, "most_cropped": 1 - 1.2 / (9 / 7), "area": (3 + 63 / 64) / 4, "used": 2}
    )
    assert found["ours"]["crop"] == pytest.approx((1 - 1.2 / (35 / 29)) / 4)
    assert found["ours_as_few"]["used"] == 2


def test_the_report_has_a_row_for_every_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "describe", lambda: {"versions": {}, **dict.fromkeys(_HEAD, "")})
    buckets.main(["--out", str(tmp_path), "--resolutions", "512"])
    result = json.loads((tmp_path / "buckets.json").read_text())
    text = (tmp_path / "buckets.md").read_text()
    assert text in capsys.readouterr().out
    assert len(result["runs"]) == text.count("\n| 512 |") == 10
    assert all(run["ours"]["crop"] < run["kohya"]["crop"] for run in result["runs"])
    halved = sum(run["ours"]["crop"] <= run["kohya"]["crop"] / 2 for run in result["runs"])
    assert re.search(rf"At most half of kohya's crop: in {halved} of 10 rows", text)


_HEAD = ("commit", "device", "cores", "python", "measured")
