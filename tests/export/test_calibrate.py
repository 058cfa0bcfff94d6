"""Histograms and ranges against slow oracles."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import nn

import kdedge_export.calibration.calibrate as calibrate_module
from kdedge.errors import DataError, ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.histogram import BINS, SIDE, VALUES, Histogram, Tally, sample
from kdedge_export.calibration.ranges import CALIBRATORS, entropy, minmax, mse, percentile, quantize_weight, s8_mse
from kdedge_export.cpu.plan import make_plan
from kdedge_export.images import Held, Images
from kdedge_export.sessions import open_session
from kdedge_export.table import U8

from .conftest import SMALL, images

Exported = tuple[nn.Module, onnx.ModelProto]


def histogram(values: np.ndarray) -> Histogram:
    """In pieces that `sample` takes whole."""
    tally = Tally("values")
    for piece in np.array_split(values.astype(np.float32), -(-values.size // VALUES)):
        tally.add(piece)
    return tally.histogram()


def counted_at_once(values: np.ndarray, width: float) -> np.ndarray:
    """The oracle: one value at a time, all known beforehand."""
    counts = np.zeros(BINS, np.int64)
    for value in values.astype(np.float64):
        counts[SIDE - 1 + math.trunc(value / width)] += 1
    return counts


def counted_alike(one: Histogram, other: Histogram) -> bool:
    return (one.low, one.high, one.exponent) == (other.low, other.high, other.exponent) and np.array_equal(
        one.counts, other.counts
    )


def same(one: Histogram, other: Histogram) -> bool:
    """Of the same images, in any order."""
    return counted_alike(one, other) and np.array_equal(one.ends, other.ends)


def test_the_ends_of_images() -> None:
    """At either end the values of so many images are held as were asked for."""
    rng = np.random.default_rng(0)
    pieces = [(rng.normal(size=50) * size).astype(np.float32) for size in [*np.linspace(1, 2, 38), 70.0, 90.0]]
    tally = Tally("values")
    for place in rng.permutation(40):
        tally.add(pieces[place])
    found = tally.histogram()
    lows, highs = (sorted(float(end(piece)) for piece in pieces) for end in (np.min, np.max))
    assert found.of_images(1.0) == (found.low, found.high) == (lows[0], highs[-1])
    assert found.of_images(0.95) == (lows[2], highs[37]), "two of 40 reach beyond"
    assert found.of_images(0.96) == (lows[1], highs[38])
    assert found.of_images(1e-9) == (lows[-1], highs[0])
    clipped = found.within(-1.0, 2.0)
    assert clipped.of_images(1.0) == (-1.0, 2.0)
    assert (clipped.ends.min(), clipped.ends.max()) == (-1.0, 2.0)
    one = Tally("one")
    one.add(np.array([-3.0, 5.0], np.float32))
    assert one.histogram().of_images(0.9) == (-3.0, 5.0)


@pytest.mark.parametrize("low", [-1, 0])
def test_bins_double_without_a_trace(low: int) -> None:
    """Values of every size, from nothing to large, in any order: the grid that was wide from the start."""
    rng = np.random.default_rng(0)
    values = (rng.uniform(low, 1, 6000) * 10.0 ** rng.integers(-41, 5, 6000)).astype(np.float32)
    values[::7] = 0.0
    expected = None
    for order in (np.argsort(np.abs(values)), np.argsort(-np.abs(values)), rng.permutation(values.size)):
        tally = Tally("values")
        for piece in np.array_split(values[order], rng.integers(2, 60)):
            tally.add(piece)
        found = tally.histogram()
        expected = expected or found
        assert counted_alike(found, expected)
    assert expected is not None
    assert (expected.low, expected.high) == (values.min(), values.max())
    assert SIDE / 2 <= np.abs(values).max() / expected.width < SIDE
    np.testing.assert_array_equal(expected.counts, counted_at_once(values, expected.width))


@pytest.mark.parametrize(("low", "high"), [(-0.7, 1.3), (-9.0, 1.0), (0.0, 9.0), (0.0, 0.2), (-0.1, 0.0)])
def test_a_histogram_of_clipped_values(low: float, high: float) -> None:
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    found = histogram(values).within(low, high)
    clipped = np.clip(values, np.float32(low), np.float32(high))
    assert found.low == pytest.approx(clipped.min())
    assert found.high == pytest.approx(clipped.max())
    np.testing.assert_array_equal(found.counts, counted_at_once(clipped, found.width))
    for fraction in (0.05, 0.5, 0.95):
        assert found.quantile(fraction) == pytest.approx(np.quantile(clipped, fraction), abs=0.02)


def test_a_tensor_of_zeros_then_of_numbers() -> None:
    late, early = Tally("t"), Tally("t")
    for piece in (np.zeros(5), np.full(3, 1e-45), np.array([-3.0, 2.0])):
        late.add(piece.astype(np.float32))
    for piece in (np.array([-3.0, 2.0]), np.full(3, 1e-45), np.zeros(5)):
        early.add(piece.astype(np.float32))
    assert counted_alike(late.histogram(), early.histogram())
    assert late.histogram().counts[SIDE - 1] == 8
    assert late.histogram().centres[SIDE - 1] == 0.0


def test_histograms_are_those_of_the_values(mobilenet_v2: Exported) -> None:
    """The oracle keeps every value of a tensor, all images in one batch."""
    _, model = mobilenet_v2
    pixels = images(20)
    names = ["input", "Clip_1", make_plan(model).tensors[8]]
    found = calibrate(model, names, pixels, SMALL)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names[1:])
    batch = SMALL.normalize(pixels)
    values = [batch, *open_session(watched.SerializeToString()).run(names[1:], {"input": batch})]
    for name, each in zip(names, values, strict=True):
        assert found[name].low == pytest.approx(each.min(), abs=1e-6)
        assert found[name].high == pytest.approx(each.max(), abs=1e-6)
        assert found[name].counts.sum() == each.size
        expected = counted_at_once(each.ravel(), found[name].width)
        moved = np.abs(np.cumsum(found[name].counts - expected)).max()
        assert moved <= 0.001 * each.size, "values may cross a border between bins, no further"


def test_order_and_chunks_change_nothing(mobilenet_v2: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = mobilenet_v2
    names, pixels = make_plan(model).tensors[:12], images(21)
    expected = calibrate(model, names, pixels, SMALL)
    monkeypatch.setattr(calibrate_module, "CHUNK", 4)
    for order in (slice(None, None, -1), np.random.default_rng(1).permutation(21)):
        found = calibrate(model, names, pixels[order], SMALL)
        assert all(same(found[name], expected[name]) for name in names)


def test_large_tensors_are_sampled_evenly() -> None:
    """A picture that gets brighter from left to right, in channels of very different range."""
    ramp = np.tile(np.linspace(0, 1, 112, dtype=np.float32), (96, 112, 1)) * np.arange(1, 97).reshape(96, 1, 1)
    ramp = ramp.astype(np.float32).ravel()
    sampled = sample(ramp)
    assert VALUES / 2 <= len(sampled) <= 2 * VALUES
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert np.quantile(sampled, share) == pytest.approx(np.quantile(ramp, share), abs=0.5)
    np.testing.assert_array_equal(sample(ramp[:1024]), ramp[:1024])
    tally = Tally("ramp")
    ramp[1] = 1e3  # between two that are counted
    tally.add(ramp)
    assert (tally.histogram().high, tally.histogram().counts.sum()) == (1e3, len(sampled))


def test_no_images_and_no_numbers(mobilenet_v2: Exported) -> None:
    _, model = mobilenet_v2
    with pytest.raises(DataError, match="no images to calibrate on"):
        calibrate(model, ["input"], images(0), SMALL)
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    weight = broken.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full_like(onnx.numpy_helper.to_array(weight), np.nan), weight.name))
    with pytest.raises(ExportError, match="takes the values nan"):
        calibrate(broken, list(make_plan(model).tensors[1:3]), images(2), SMALL)


def test_images_of_one_colour_tell_nothing(mobilenet_v2: Exported) -> None:
    _, model = mobilenet_v2
    flat = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.array([10, 20, 30], np.uint8) + np.zeros(
        (5, 16, 16, 3), np.uint8
    )
    with pytest.raises(DataError, match="All 5 images to calibrate on are of one colour each"):
        calibrate(model, ["input"], flat, SMALL)
    flat[3, 4, 5, 1] ^= 1
    assert calibrate(model, ["input"], flat, SMALL)["input"].counts.sum() == flat.size


class Interrupted(Images):
    """Ctrl-C after a chunk, where one is left."""

    def __init__(self, pixels: np.ndarray, at: int) -> None:
        self.held, self.at, self.loaded = Held(pixels), at, 0

    def __len__(self) -> int:
        return len(self.held)

    @property
    def fingerprint(self) -> str:
        return self.held.fingerprint

    def chunks(self, preprocess: Preprocess, size: int, start: int = 0) -> Iterator[np.ndarray]:
        for place, chunk in enumerate(self.held.chunks(preprocess, size, start)):
            if place == self.at:
                raise KeyboardInterrupt
            self.loaded += len(chunk)
            yield chunk


def test_an_interrupted_calibration_goes_on(
    mobilenet_v2: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = mobilenet_v2
    monkeypatch.setattr(calibrate_module, "CHUNK", 4)
    monkeypatch.setattr(calibrate_module, "SAVE_EVERY_S", -1.0)
    monkeypatch.setattr(calibrate_module, "SAY_EVERY_S", 0.0)
    names, pixels, state = make_plan(model).tensors[:5], images(21), tmp_path / "calibration.npz"
    expected = calibrate(model, names, pixels, SMALL)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, names, Interrupted(pixels, at=2), SMALL, state=state)
    told: list[str] = []
    rest = Interrupted(pixels, at=-1)
    found = calibrate(model, names, rest, SMALL, say=told.append, state=state)
    assert rest.loaded == 21 - 8
    assert told[0] == "Calibration goes on after 8 images"
    assert re.fullmatch(r"Calibrating: 12 of 21 images, \d+ s left", told[1])
    assert all(same(found[name], expected[name]) for name in names)
    assert list(tmp_path.iterdir()) == [state]

    again = Interrupted(pixels, at=0)  # nothing is left to do, and nothing is loaded
    assert all(same(each, expected[name]) for name, each in calibrate(model, names, again, SMALL, state=state).items())
    other = pixels.copy()
    other[0, 0, 0, 0] ^= 1
    calibrate(model, names, other, SMALL, say=told.append, state=state)
    assert told[-6].endswith("is of another model, other images or another version; calibration starts over")


def test_a_damaged_state_is_left_alone(mobilenet_v2: Exported, tmp_path: Path) -> None:
    _, model = mobilenet_v2
    state = tmp_path / "calibration.npz"
    expected = calibrate(model, ["input"], images(3), SMALL, state=state)["input"]
    whole = state.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        state.write_bytes(content)
        told: list[str] = []
        assert same(calibrate(model, ["input"], images(3), SMALL, say=told.append, state=state)["input"], expected)
        assert "is damaged" in told[0]
        assert "calibration starts over" in told[0]
        assert state.read_bytes() == whole


def test_quantile() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    found = histogram(values)
    for fraction in (0.0001, 0.01, 0.5, 0.9, 0.9999, 1.0):
        below = (values <= found.quantile(fraction)).mean()
        assert below == pytest.approx(fraction, abs=3e-4), "off by part of a bin at most"
    assert found.quantile(0.0) == found.low


def test_ranges_hold_zero_exactly() -> None:
    for low, high in ((-1.0, 3.0), (0.0, 6.0), (0.5, 2.0), (-3.0, -1.0), (-1e-3, 1e3)):
        found = U8.over((low, high))
        assert found.apply(np.zeros(1))[0] == 0.0
        assert 0 <= found.zero_point <= 255
        inside = np.linspace(min(low, 0), max(high, 0), 1001)
        assert np.abs(found.apply(inside) - inside).max() <= found.scale * 1.0001, (
            "at the ends zero's place costs half a step"
        )
    assert U8.over((0.5, 2.0)) == U8.over((0.0, 2.0))
    assert U8.over((0.0, 0.0)) == U8(1.0, 0)
    assert U8.over((0.0, 6.0)).high == pytest.approx(6.0, rel=1e-6)


def test_calibrators() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=100_000), [40.0, -25.0]])
    found = histogram(values)
    assert minmax(found) == (-25.0, 40.0)
    low, high = percentile(found, 99.99)
    assert low == pytest.approx(-3.75, abs=0.3)
    assert high == pytest.approx(3.75, abs=0.3)
    errors = {
        name: np.mean((U8.over(each(found)).apply(values) - values) ** 2)
        for name, each in (("mse", mse), ("minmax", minmax))
    }
    assert errors["mse"] <= errors["minmax"]
    positive = histogram(np.maximum(values, 0))
    assert [each(positive)[0] for each in CALIBRATORS.values()] == [0.0] * 6
    constant = histogram(np.full(10, 3.0))
    assert [each(constant)[1] for each in CALIBRATORS.values()] == [3.0] * 6
    nothing = histogram(np.zeros(10))
    assert [each(nothing) for each in CALIBRATORS.values()] == [(0.0, 0.0)] * 6
    ends = [CALIBRATORS[f"percentile-{percent}"](found)[1] for percent in ("99.9", "99.99", "99.999")]
    assert ends == sorted(ends)


def slow_divergence(magnitudes: list[float], end: int, codes: int) -> float:
    """The text of Migacz's slides, bin by bin."""
    p = magnitudes[:end]
    p[-1] += sum(magnitudes[end:])
    q = [0.0] * end
    for code in range(codes):
        group = range(code * end // codes, (code + 1) * end // codes)
        filled = [k for k in group if p[k] > 0]
        for k in filled:
            q[k] = max(sum(magnitudes[j] for j in group), 1e-4) / len(filled)
    total_p, total_q = sum(p), sum(q)
    return sum(p[k] / total_p * math.log(p[k] / total_p * total_q / q[k]) for k in range(end) if p[k] > 0)


@pytest.mark.parametrize("two_sided", [True, False])
def test_entropy_against_its_definition(two_sided: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.laplace(size=50_000)
    values = np.append(values if two_sided else np.abs(values), [60.0])
    found = histogram(values)
    codes = 128 if two_sided else 256
    magnitudes = [0.0] * SIDE
    for index, count in enumerate(found.counts):
        magnitudes[abs(index - SIDE + 1)] += float(count)
    magnitudes[0] = magnitudes[1]
    last = max(k for k in range(SIDE) if magnitudes[k]) + 1
    half = next(k for k in range(SIDE) if sum(magnitudes[: k + 1]) >= sum(magnitudes) / 2) + 1
    ends = [*range(max(codes, half), last, 256), last]
    best = min(ends, key=lambda end: slow_divergence(magnitudes, end, codes))
    assert best < last, "an outlier is cut"
    low, high = entropy(found, stride=256)
    assert high == best * found.width
    assert low == (max(found.low, -high) if two_sided else found.low)


def test_mse_against_a_search_over_all_ends() -> None:
    values = np.random.default_rng(0).laplace(size=20_000)
    found = histogram(values)
    ends = mse(found)

    def error(low: float, high: float) -> float:
        return float(np.mean((U8.over((low, high)).apply(values) - values) ** 2))

    grid = np.linspace(0.2, 1.0, 25)
    best = min(error(a * found.low, b * found.high) for a in grid for b in grid)
    assert error(*ends) <= 1.02 * best


def test_symmetric_mse_against_a_search_over_all_ends() -> None:
    values = np.random.default_rng(0).laplace(size=20_000) + 0.5
    found = histogram(values)

    def error(end: float) -> float:
        scale = end / 127
        return float(np.mean((np.clip(np.rint(values / scale), -128, 127) * scale - values) ** 2))

    most = np.abs(values).max()
    low, high = s8_mse(found)
    assert max(-low, high) < most, "a tail is cut"
    assert error(max(-low, high)) <= 1.02 * min(error(share * most) for share in np.linspace(0.1, 1, 91))


def test_weights_are_symmetric_per_channel() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([1e-4, 0.1, 1, 10, 0, 1e-12]).reshape(6, 1, 1, 1)
    weight = (rng.normal(size=(6, 3, 3, 3)) * sizes).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    own = np.maximum(np.abs(weight).reshape(6, -1).max(1) / 127, 1e-30).astype(np.float32)
    codes, scales, integers = quantize_weight(weight, own, bias, input_scale=0.02)
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    assert (np.abs(codes[:4]).reshape(4, -1).max(1) == 127).all(), "each channel uses its whole range"
    restored = codes * scales.reshape(6, 1, 1, 1)
    assert (np.abs(restored - weight).reshape(6, -1).max(1) <= scales / 2 * 1.001).all()
    assert integers is not None
    unit = (np.float32(0.02) * scales).astype(np.float64)
    assert (np.abs(integers * unit - bias) <= unit / 2 + 1e-6).all()
    assert quantize_weight(weight, own, None, 0.02)[2] is None
