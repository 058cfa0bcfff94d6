"""The search on made-up files: what each prefix of the order would lose and how fast it would be is known."""

import math
from collections.abc import Callable, Sequence

import pytest

from kdedge_export.judging.fallback import Search, search
from kdedge_export.judging.gate import Agreement
from kdedge_export.judging.latency import Speedup

LAYERS = tuple(f"layer{i}" for i in range(40))
BUDGET = 1.0


def of(drop: float | None) -> Agreement:
    ends = None if drop is None else (0.0, 9.0)
    return Agreement(0 if drop is None else 1000, drop, ends, drop, ends, 0, None, None, 0.1)


class World:
    """`drop(n)` and `speedup(n)` of the file with the first n layers in float; counts what is asked of it."""

    def __init__(self, drop: Callable[[int], float | None], speedup: Callable[[int], float]) -> None:
        self.drop, self.speedup = drop, speedup
        self.compared: list[int] = []
        self.timed: list[int] = []
        self.ordered = 0

    def order(self) -> Sequence[str]:
        self.ordered += 1
        return LAYERS

    def make(self, leave_float: frozenset[str]) -> int:
        assert leave_float == set(LAYERS[: len(leave_float)]), "always a prefix of the order"
        return len(leave_float)

    def accuracy(self, file: int) -> Agreement:
        self.compared.append(file)
        drop = self.drop(file)
        return of(drop)

    def speed(self, file: int) -> Speedup:
        self.timed.append(file)
        value = self.speedup(file)
        return Speedup(value, 0.98 * value, 1.02 * value, 6)

    def run(self, timed: bool = True, say: Callable[[str], None] = lambda sentence: None) -> Search[int]:
        return search(self.order, self.make, self.accuracy, self.speed if timed else None, BUDGET, say)


def accurate_from(count: int) -> Callable[[int], float]:
    return lambda file: 0.5 if file >= count else 3.0 - file / 40


def test_nothing_goes_back_where_both_hold() -> None:
    world = World(accurate_from(0), lambda file: 1.5)
    found = world.run()
    assert (found.candidate, found.left_float, found.held) == (0, (), True)
    assert (world.compared, world.timed, world.ordered) == ([0], [0], 0), "sensitivity is not even measured"


@pytest.mark.parametrize("needed", range(1, 40))
def test_the_fewest_layers_that_are_needed_go_back(needed: int) -> None:
    world = World(accurate_from(needed), lambda file: 1.5)
    found = world.run()
    assert (found.candidate, found.left_float, found.held) == (needed, LAYERS[:needed], True)
    assert found.agreement.drop_points == 0.5
    assert world.timed == [needed], "only what is accurate enough is timed"
    assert len(world.compared) == len(set(world.compared)) <= 12
    assert world.ordered == 1


def test_accuracy_only_where_speed_is_gone() -> None:
    world = World(accurate_from(16), lambda file: 1.4 - 0.03 * file)
    found = world.run()
    assert (found.candidate, found.held) == (16, False)
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(0.92)
    assert found.why == (
        "The budget of 1 points holds only where the file is no faster than FP32: with 16 of 40 layers in float it "
        "loses 0.50 points at 0.92 times the speed of FP32."
    )


def test_layers_that_are_slow_in_8_bits_go_back_too() -> None:
    """As in EfficientNet: accurate at once, but slower than FP32 until some layers are in float."""
    world = World(accurate_from(0), lambda file: 0.9 + 0.02 * file)
    found = world.run()
    assert (found.candidate, found.held) == (7, True)
    assert world.timed == [0, 1, 3, 7]


def test_it_does_not_go_on_where_it_only_gets_slower() -> None:
    world = World(accurate_from(4), lambda file: 0.95 - 0.01 * file)
    assert (world.run().candidate, world.timed) == (4, [4, 8])


def test_a_budget_that_no_file_keeps() -> None:
    world = World(lambda file: 5.0 - file / 20, lambda file: 1.5)
    found = world.run()
    assert (found.candidate, found.held, found.speedup) == (39, False, None), "the most accurate one is written"
    assert "No choice of layers in float keeps the budget of 1 points" in found.why
    assert "with 39 of 40 in float, loses 3.05" in found.why
    assert world.timed == []


def test_accuracy_that_jumps_still_ends_at_a_file_that_holds() -> None:
    world = World(lambda file: 0.5 if file in (3, 8, 9, 12, 16) else 2.0, lambda file: 1.5)
    found = world.run()
    assert found.held
    assert found.candidate in (3, 8)


def test_without_speed_or_images() -> None:
    world = World(accurate_from(5), lambda file: 0.1)
    found = world.run(timed=False)
    assert (found.candidate, found.held, found.speedup) == (5, True, None)
    blind = World(lambda file: None, lambda file: 1.0).run()
    assert (blind.candidate, blind.held, len(blind.tries)) == (0, False, 1)
    assert "no gate images" in blind.why


def test_the_way_is_recorded_and_told() -> None:
    told: list[str] = []
    found = World(accurate_from(3), lambda file: 1.25).run(say=told.append)
    document = found.to_json()
    assert [each["left_float"] for each in document["tries"]] == [0, 1, 2, 4, 3]
    assert [each["speedup"] for each in document["tries"]] == [None, None, None, None, 1.25]
    assert document["left_float"] == list(LAYERS[:3])
    assert document["tries"][-1]["speedup_interval"] == pytest.approx([1.225, 1.275])
    assert told[0] == "INT8 with no layers left in float is expected to lose 3.00 points, 1 allowed"
    assert told[-1] == "It runs at 1.25 times the speed of FP32 (1.23 to 1.27)"


def test_one_layer_or_none() -> None:
    for layers in (LAYERS[:1], ()):
        found = search(
            lambda layers=layers: layers,  # type: ignore[misc]
            len,
            lambda file: of(5.0),
            None,
            BUDGET,
        )
        assert (found.candidate, found.held) == (0, False)


def test_a_machine_that_is_gone_leaves_accuracy_alone_to_decide() -> None:
    world = World(accurate_from(5), lambda file: 0.5)
    found = search(world.order, world.make, world.accuracy, lambda file: None, BUDGET)
    assert (found.candidate, found.held, found.speedup) == (5, True, None)
    world = World(accurate_from(0), lambda file: 0.9)
    speeds = iter([world.speed(0), None])
    found = search(world.order, world.make, world.accuracy, lambda file: next(speeds), BUDGET)
    assert (found.candidate, found.held) == (0, False), "what was slow before it was gone is not called fast"
    assert "could not be measured any more" in found.why


def test_few_files_are_timed_whatever_happens() -> None:
    for needed in (0, 1, 7):
        world = World(accurate_from(needed), lambda file: 0.5 + 0.01 * file)
        world.run()
        assert len(world.timed) <= 1 + math.log2(1 + len(LAYERS) / 2)
