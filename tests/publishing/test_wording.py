import pytest

from hf_ntp.publishing.wording import interval, markdown_table, percent


def test_percent():
    assert [percent(share) for share in (0.255, -0.4, 1.2, None)] == ["26 %", "-40 %", "120 %", ""]
    assert percent(None, "nothing") == "nothing"


@pytest.mark.parametrize("bounds", [(None, None), (0.1, None), (float("nan"), float("nan"))])
def test_one_seed_gives_no_interval(bounds):
    assert interval([-0.25, 0.1]) == "[-0.250, +0.100]"
    assert interval([-0.25, 0.1], digits=1) == "[-0.2, +0.1]"
    assert (interval(bounds), interval(bounds, "one seed")) == ("", "one seed")


def test_a_table_in_markdown():
    table = markdown_table([["a", "b", "c"], ["x", "1", "y"], ["", "2", ""]], text=(0, 2))
    assert table == "| a | b | c |\n| --- | ---: | --- |\n| x | 1 | y |\n|  | 2 |  |"
