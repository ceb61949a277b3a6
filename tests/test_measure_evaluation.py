"""tools/measure.py evaluation: what it measures is printed in words, and as JSON."""

import json

import pytest

from tools import measure as command


def test_scale(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["evaluation", "scale", "--num-images", "500", "--num-features", "16"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found["sum_seconds_a_thousand_images"]) == ["250", "500"]
    assert found["frechet"] > 0
    assert found["precision_recall_seconds"] > 0
    for name in ("sums of a set", "Frechet distance", "precision and recall", "memory at its highest"):
        assert any(line.startswith(f"{name} ") for line in lines)


def test_too_few_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["evaluation", "scale", "--num-images", "499"])
    assert "--num-images: expected at least 500, got 499" in capsys.readouterr().err
