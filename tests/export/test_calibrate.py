"""Histograms and ranges against slow oracles."""

import numpy as np
import onnx
import pytest
from torch import nn

from kdedge.errors import DataError, ExportError
from kdedge_export.calibrate import BINS, VALUES, Histogram, _sample, calibrate
from kdedge_export.plan import make_plan
from kdedge_export.ranges import minmax, mse, percentile, quantize_weight
from kdedge_export.sessions import open_session
from kdedge_export.table import U8

from .conftest import SMALL, images

Exported = tuple[nn.Module, onnx.ModelProto]


def histogram(values: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, BINS, (values.min(), values.max()))
    return Histogram(float(values.min()), float(values.max()), counts)


def test_histograms_are_those_of_the_values(mobilenet_v2: Exported) -> None:
    """The oracle keeps every value of a tensor, all images in one batch."""
    _, model = mobilenet_v2
    pixels = images(20)
    names = ["input", "Clip_1", make_plan(model).tensors[8]]
    found = calibrate(model, names, pixels, SMALL, batch_bytes=1)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names[1:])
    batch = SMALL.normalize(pixels)
    values = [batch, *open_session(watched.SerializeToString()).run(names[1:], {"input": batch})]
    for name, each in zip(names, values, strict=True):
        assert found[name].low == pytest.approx(each.min(), abs=1e-6)
        assert found[name].high == pytest.approx(each.max(), abs=1e-6)
        expected, _ = np.histogram(each, BINS, (each.min(), each.max()))
        assert found[name].counts.sum() == each.size
        moved = np.abs(np.cumsum(found[name].counts - expected)).max()
        assert moved <= 0.01 * each.size, "values may cross a border between bins, no further"


def test_the_result_does_not_depend_on_the_batch_size(mobilenet_v2: Exported) -> None:
    _, model = mobilenet_v2
    names = make_plan(model).tensors[:6]
    one, many = (calibrate(model, names, images(21), SMALL, batch_bytes=size) for size in (1, 1 << 30))
    for name in names:
        assert one[name].low == pytest.approx(many[name].low, abs=1e-6)
        assert one[name].high == pytest.approx(many[name].high, abs=1e-6)
        assert np.abs(np.cumsum(one[name].counts - many[name].counts)).max() <= 0.001 * one[name].counts.sum()


def test_large_tensors_are_sampled_evenly() -> None:
    """A picture that gets brighter from left to right, in channels of very different range."""
    ramp = np.tile(np.linspace(0, 1, 112, dtype=np.float32), (1, 96, 112, 1)) * np.arange(1, 97).reshape(1, 96, 1, 1)
    ramp = np.repeat(ramp.astype(np.float32), 3, axis=0)
    sampled = _sample(ramp.reshape(3, -1))
    assert VALUES / 2 <= len(sampled) / 3 <= 2 * VALUES
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert np.quantile(sampled, share) == pytest.approx(np.quantile(ramp, share), abs=0.5)
    one = _sample(ramp[:1].reshape(1, -1))
    np.testing.assert_array_equal(np.tile(one, 3), sampled, "the same values whatever the batch")
    small = np.arange(2048, dtype=np.float32).reshape(2, 1024)
    np.testing.assert_array_equal(_sample(small), small.ravel())


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
    low, high = percentile(found)
    assert (low, high) == (pytest.approx(-3.75, abs=0.3), pytest.approx(3.75, abs=0.3))
    errors = {
        name: np.mean((U8.over(each(found)).apply(values) - values) ** 2)
        for name, each in (("mse", mse), ("minmax", minmax))
    }
    assert errors["mse"] <= errors["minmax"]
    positive = histogram(np.maximum(values, 0))
    assert [each(positive)[0] for each in (minmax, percentile, mse)] == [0.0, 0.0, 0.0]
    constant = histogram(np.full(10, 3.0))
    assert minmax(constant)[1] == 3.0


def test_mse_against_a_search_over_all_ends() -> None:
    values = np.random.default_rng(0).laplace(size=20_000)
    found = histogram(values)
    ends = mse(found)

    def error(low: float, high: float) -> float:
        return float(np.mean((U8.over((low, high)).apply(values) - values) ** 2))

    grid = np.linspace(0.2, 1.0, 25)
    best = min(error(a * found.low, b * found.high) for a in grid for b in grid)
    assert error(*ends) <= 1.02 * best


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
