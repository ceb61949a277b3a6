"""tools/measure_start.py: both sides draw the whole of a small network, and mistakes end in one line."""

import pytest

from cfpretrain.base.console import UserError
from tests.test_config import TINY
from tools import measure_start


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rates_are_of_what_one_rank_holds(num_ranks, capsys) -> None:
    found = measure_start.measure(str(TINY), ["model.depth=1"], num_ranks)
    assert found["num_values"] == pytest.approx(NUM_VALUES / num_ranks, rel=0.01)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ours", "plain", "ratio"]


def test_a_wrong_config_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.dept: unknown key"):
        measure_start.measure(str(TINY), ["model.dept=1"], 1)


# Of tiny.yaml with one block: embedders, head and the block.
NUM_VALUES = 58_240 + 772 + 198_016
