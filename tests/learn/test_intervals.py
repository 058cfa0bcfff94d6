"""Wilson's interval, by its definition."""

import pytest

from kdedge.intervals import wilson


@pytest.mark.parametrize("z", [1.959964, 3.0])
@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 1000), (5, 500), (500, 1000), (10, 10), (2.5, 7)])
def test_the_ends_are_z_standard_errors_of_their_own_from_the_share(count: float, total: int, z: float) -> None:
    low, high = wilson(count / total, total, z)
    assert 0 <= low <= count / total <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (end - count / total) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, rel=1e-6)


def test_the_ends_are_exact() -> None:
    assert wilson(0, 50)[0] == 0.0 < wilson(0, 50)[1]
    assert wilson(1, 50)[1] == 1.0 > wilson(1, 50)[0]
