"""Does the benchmark run? What it finds is not judged here: times are no tests."""

from xml.etree import ElementTree

import pytest

from tests.bench.case import BARE, HOOKS, PROGRAM, TRACE, Bench, Options
from tests.bench.check import Different, largest_difference
from tests.bench.figure import Figure
from tests.bench.report import replace_between
from tests.bench.t1 import run


@pytest.mark.bench
def test_t1_runs_quickly() -> None:
    bench = Bench(Options(quick=True, nnsight=False))
    tables = list(run(bench))
    assert [row.name for _, row in bench.rows] == ["empty trace", "1 save", "12 saves", "12 in-place edits"]
    assert set(bench.rows[1][1].times) == {BARE, HOOKS, TRACE, PROGRAM}
    assert all(difference == 0.0 for _, row in bench.rows for difference in row.differences.values())
    assert all("× (" in cell for row in tables[0].rows for cell in row[2:] if cell)


def test_a_contender_that_is_wrong_is_not_timed() -> None:
    import torch

    one = torch.ones(2)
    with pytest.raises(Different, match=r"x differs from hooks by 1\.2e-07"):
        largest_difference("x", [one.nextafter(one + 1)], [one], close=False)
    with pytest.raises(Different, match=r"x returns \['float32\[2\]'\], hooks \[\]"):
        largest_difference("x", [one], [], close=True)


def test_only_the_marked_part_of_the_page_is_exchanged() -> None:
    page = "a\n<!-- t1 -->\nold\n<!-- end t1 -->\nb"
    assert replace_between(page, "t1", "new") == "a\n<!-- t1 -->\n\nnew\n\n<!-- end t1 -->\nb"
    with pytest.raises(ValueError, match="lacks <!-- t2 -->"):
        replace_between(page, "t2", "new")


def test_a_figure_has_its_lines_and_the_powers_of_ten() -> None:
    drawn = Figure("f", "Time <of> a cell", "cells", "ms", {"a": [(10, 0.5), (1000, 20.0)], "b": [(10, 3.0)]}).svg()
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts == ["Time <of> a cell", "cells", "ms", "10", "1000", "0.1", "1", "10", "100", "a", "b"]
    assert drawn.count("<circle") == 3
