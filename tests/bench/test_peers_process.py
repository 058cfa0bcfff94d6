"""Peers that follow the protocol, and peers that do anything else: each failure is a sentence, none stops the table."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge_bench import int8_peers, peers_make
from kdedge_bench.peers_make import HERE, Limits, Peer, Way, make_all
from kdedge_bench.peers_process import PeerFailed, Served, measured
from kdedge_device.preprocess import Preprocess

PREPROCESS = Preprocess(4, 4, 3, "squash", (0.5,) * 3, (0.25,) * 3)
LIMITS = Limits(20.0, 4096.0)

FOLLOWS = f"""
import sys, time, json
sys.path.insert(0, {str(HERE)!r})
import numpy as np
from peer import Peer, Runner, main

def quantize(model, images, out, method):
    print("libraries talk")
    out.with_suffix(".weights").write_bytes(b"1234")
    file = out.with_suffix(".own")
    file.write_text(method)
    return file

def open_file(file):
    print("runtimes too")
    return Runner(lambda image: image, lambda image: np.array([[image.sum(), MORE, 0.0]], np.float32))

main(Peer(quantize, lambda: "fake 1", ("default", "float"), lambda: "fakert 2", open_file))
"""


def _adapter(folder: Path, text: str) -> Peer:
    file = folder / "adapter.py"
    file.write_text(text)
    return Peer(sys.executable, str(file))


def _following(folder: Path) -> Peer:
    return _adapter(folder, FOLLOWS.replace("MORE", "1.0"))


@dataclass(frozen=True)
class _Part:
    pixels: Any

    @property
    def fingerprint(self) -> str:
        return "0123456789abcdef0123"

    @property
    def labels(self) -> Any:
        return np.zeros(len(self.pixels), np.int64)

    def load(self, _: Preprocess, chosen: slice = slice(None)) -> Any:
        return self.pixels[chosen]

    def chunks(self, _: Preprocess, size: int) -> Any:
        return (self.pixels[i : i + size] for i in range(0, len(self.pixels), size))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose own export has happened already, in tmp_path/ways."""
    part = _Part(np.random.default_rng(0).integers(0, 255, (5, 4, 4, 3)).astype(np.uint8))
    images = type("Images", (), {"calibration": part, "gate": part, "test": part})()
    loaded = type("Loaded", (), {"preprocess": PREPROCESS})()
    for module in (peers_make, int8_peers):
        monkeypatch.setattr(module, "open_run_images", lambda run: images)
        monkeypatch.setattr(module, "load_model", lambda path: loaded)
    (tmp_path / "ways" / "kdedge").mkdir(parents=True)
    (tmp_path / "ways" / "kdedge" / "model.onnx").write_bytes(b"fp32")
    ours = Way(seconds=1.0, peak_mib=1.0, bytes=4, file="kdedge/model.onnx")
    monkeypatch.setattr(peers_make, "_ours", lambda *_: ours)
    return tmp_path


def _made(run: Path, peer: Peer, limits: Limits = LIMITS) -> Way:
    return make_all(run, run / "ways", {"x": peer}, limits, qat=False)["x"]


def test_a_peer_that_follows_is_measured_and_its_fp32_is_made_too(run: Path) -> None:
    made = make_all(run, run / "ways", {"x": _following(run)}, LIMITS, qat=False)
    assert set(made) == {"fp32", "kdedge", "FP32 in fakert", "x"}
    way = made["x"]
    assert (way.version, way.runtime, way.file, way.base) == (
        "fake 1",
        "fakert 2",
        "x/model.int8.own",
        "FP32 in fakert",
    )
    assert way.bytes == len("default") + 4, "what lies beside the file belongs to it"
    assert way.seconds is not None
    assert way.peak_mib is not None
    assert 5 < way.peak_mib < 200, "its own, not that of this process, which has torch in it"
    assert (run / "ways" / "FP32 in fakert" / "model.int8.own").read_text() == "float"
    assert not (run / "ways" / "calibration.npy").exists()


def test_what_was_made_is_not_made_again(run: Path) -> None:
    first = _made(run, _following(run))
    assert _made(run, _adapter(run, "raise SystemExit('again')")) == first


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("raise SystemExit('no such runtime')", "exit code 1: no such runtime"),
        ("import os; os.abort()", "exit code -6: no message"),
        ("print('hello')", "its last line is no JSON with seconds and version: 'hello'"),
        ("print('[1]')", "its last line is no JSON with seconds and version: '[1]'"),
        ("print('{\"seconds\": 1}')", "its last line is no JSON with seconds and version"),
        ("", "its last line is no JSON with seconds and version: ''"),
        ('print(\'{"seconds": 1, "version": "x"}\')', "it ended well, but wrote no model.int8.onnx"),
        (
            'print(\'{"seconds": 1, "version": "x", "file": "../../../etc/passwd"}\')',
            "it ended well, but wrote no passwd",
        ),
    ],
)
def test_a_peer_that_does_not_is_a_row_that_says_how(run: Path, text: str, failure: str) -> None:
    found = _made(run, _adapter(run, text)).failure
    assert found is not None
    assert found.startswith(failure)


def test_a_peer_that_is_not_there_is_a_row_that_says_so(run: Path) -> None:
    found = _made(run, Peer(str(run / "venv" / "bin" / "python"), "x.py")).failure
    assert found is not None
    assert "No such file or directory" in found


def test_a_peer_that_hangs_or_eats_memory_is_killed_with_what_it_started(run: Path) -> None:
    child = run / "child"
    hangs = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\ntime.sleep(60)"
    )
    assert _made(run, _adapter(run, hangs), Limits(1.0, 4096.0)).failure == "not done within 1 s"
    status = Path(f"/proc/{child.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()
    eats = "import time; held = b'x' * (400 << 20); time.sleep(60)"
    done = measured([sys.executable, "-c", eats], limit_s=20.0, limit_mib=256.0)
    assert done.failure == "needs more than 0 GiB"
    assert done.peak_mib > 256


def test_logits_come_from_the_peers_own_runtime(run: Path) -> None:
    peers = {"x": _following(run)}
    made = make_all(run, run / "ways", peers, LIMITS, qat=False)
    way = made["x"]
    with int8_peers._served(way, run / "ways", peers, LIMITS) as runtime:
        images = _Part(np.full((3, 4, 4, 3), 255, np.uint8))
        found = int8_peers._answers(runtime, images, PREPROCESS)  # type: ignore[arg-type]
        assert found.tolist() == [[96.0, 1.0, 0.0]] * 3, "(1 - 0.5) / 0.25 = 2, of 48 numbers"
        np.save(run / "b.npy", np.zeros((2, 3, 4, 4), np.float32))
        assert runtime.times_ms(run / "b.npy", 7).shape == (7,)
    with pytest.raises(PeerFailed, match="--peer x="):
        int8_peers._served(way, run / "ways", {}, LIMITS)


SERVES = """
import json, sys, time
import numpy as np
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
"""


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("raise SystemExit('no such delegate')", "ended with exit code 1: no such delegate"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
        ("print('not JSON')", "answered b'not JSON'; a JSON object was expected"),
        ("print('{}')", "did not say that it is ready"),
        (f"{SERVES}    raise SystemExit(4)", "ended with exit code 4"),
        (f"{SERVES}    print('{{}}', flush=True)", "its logits cannot be read"),
        (f"{SERVES}    np.save(asked['out'], np.zeros((1, 3))); print('{{}}', flush=True)", r"\[1, 3\] for 2 images"),
        (f"{SERVES}    np.save(asked['out'], np.full((2, 3), np.nan)); print('{{}}', flush=True)", "no finite numbers"),
        (f"{SERVES}    np.save(asked['out'], np.array(['a', 'b'])); print('{{}}', flush=True)", "one row each"),
    ],
)
def test_a_runtime_that_answers_otherwise_is_told_apart(tmp_path: Path, text: str, failure: str) -> None:
    peer = _adapter(tmp_path, text)
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 4, 4), np.float32))
    limit_s = 1.0 if "sleep" in text else 20.0
    with (
        pytest.raises(PeerFailed, match=failure),
        Served(peer.python, peer.adapter, tmp_path / "f", limit_s) as runtime,
    ):
        runtime.logits(tmp_path / "images.npy", tmp_path / "out.npy")


@pytest.mark.parametrize("answer", [{}, {"ms": "soon"}, {"ms": [1.0]}, {"ms": [1.0, -2.0]}, {"ms": [1.0, None]}])
def test_times_that_are_none_are_refused(tmp_path: Path, answer: dict[str, Any]) -> None:
    peer = _adapter(tmp_path, f"{SERVES}    print({json.dumps(answer)!r}, flush=True)")
    with (
        Served(peer.python, peer.adapter, tmp_path / "f", 20.0) as runtime,
        pytest.raises(PeerFailed, match="no 2 times"),
    ):
        runtime.times_ms(tmp_path / "images.npy", 2)


def test_a_file_of_another_shape_fails_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 gives 3 classes, `good` too, `wide` 4: the row of the last says so, and the others are told."""
    logits = {"fp32": 3, "good": 3, "wide": 4}
    monkeypatch.setattr(
        _Part, "logits", lambda self, files, _: [np.ones((5, logits[files[0].name]), np.float32)], raising=False
    )
    made = {way: Way(bytes=1, file=way) for way in logits}
    found, told = int8_peers._logits(made, run, {}, _Part(np.zeros((5, 4, 4, 3), np.uint8)), PREPROCESS, LIMITS)  # type: ignore[arg-type]
    assert set(found) == {"fp32", "good"}
    assert told["wide"].failure is not None
    assert "[5, 4]" in told["wide"].failure
    assert told["good"] == made["good"]
    logits["good"] = 9
    again, _ = int8_peers._logits(made, run, {}, _Part(np.zeros((5, 4, 4, 3), np.uint8)), PREPROCESS, LIMITS)  # type: ignore[arg-type]
    assert np.array_equal(again["good"], found["good"]), "a file that is kept is not asked twice"


def test_own_speed_is_beside_fp32_of_the_same_runtime(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latency = {"a": 6.0, "base": 3.0, "x": 2.0}
    monkeypatch.setattr(int8_peers, "SETTLE_S", 0.0)
    monkeypatch.setattr(int8_peers, "_timer", lambda way, *_: lambda queries: [latency[way.file]] * queries)
    made = {
        "fp32": Way(file="a"),
        "FP32 in r": Way(file="base", runtime="r 1", peer="x"),
        "x": Way(file="x", runtime="r 1", peer="x", base="FP32 in r"),
    }
    options = argparse.Namespace(rounds=6, queries=2)
    found = int8_peers._speeds(made, run, {}, np.zeros((1, 3, 4, 4), np.float32), options, LIMITS)
    assert found["fp32"] == {"latency_ms": 6.0}
    assert found["FP32 in r"]["speedup"]["median"] == 2.0
    assert "own_speedup" not in found["FP32 in r"]
    assert (found["x"]["speedup"]["median"], found["x"]["own_speedup"]["median"]) == (3.0, 1.5)
