"""A board: a real sshd on the loopback interface with keys, home and programs of its own, all in a temporary folder."""

import contextlib
import hashlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdedge_bench.remote import Place

# Stands for run.pyz: says what it is called with, and does what behaviour.json in its home says.
PROGRAM = """
import json, os, subprocess, sys, time
home = os.environ["BOARD"]  # its real home, also where HOME is elsewhere
with open(home + "/calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
with open(home + "/behaviour.json") as file:
    does = json.load(file)
if sys.argv[1] == "info":
    print(json.dumps(does["info"]))
    sys.exit()
print("measuring fp32", file=sys.stderr, flush=True)
open(os.environ["TMPDIR"] + "/left", "w").close()
if does.get("stray"):  # as the process that samples the power: in a session of its own
    stray = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(home + "/stray", "w") as file:
        file.write(str(stray.pid))
with open(home + "/begun", "w") as file:
    file.write(os.environ["XDG_CACHE_HOME"])
try:
    while os.path.exists(home + "/hold"):
        time.sleep(0.01)
    print("[clocks as before]", file=sys.stderr)
except KeyboardInterrupt:
    open(home + "/interrupted", "w").close()
    sys.exit(130)
if does.get("signal"):
    os.kill(os.getpid(), does["signal"])
print(does["stdout"] if "stdout" in does else json.dumps(does["document"]))
sys.exit(does.get("exit_code", 0))
"""
MODEL = "NVIDIA Jetson Orin Nano Developer Kit"


def record(artifact: str, machine: str = MODEL) -> dict[str, Any]:
    spread = {"p50": 1.0, "p90": 1.1, "p99": None, "min": 0.9, "max": 2.0, "mean": 1.0, "std": 0.1, "count": 100}
    return {
        "schema": 1,
        "machine": {"name": "orin", "model": machine, "cpu": None, "cores": 6, "architecture": "aarch64"},
        "conditions": {"threads": 1, "batch": 1, "effort": "quick"},
        "artifact": {"name": artifact, "sha256": "a" * 64, "precision": artifact, "runtime": "tensorrt"},
        "latency_ms": {"compute": spread, "with_copies": None, "end_to_end": None},
        "flags": {"throttled": None, "unstable": False},
        "started_at": "2026-01-02T03:04:05Z",
    }


def able(**changes: Any) -> dict[str, Any]:
    """What `run.pyz info` says of a board that can do everything."""
    can = dict.fromkeys(("check", "build", "bench", "eval", "predict"))
    runtimes = {"numpy": "1.26.4", "onnxruntime": None, "tensorrt": "10.3.0"}
    return {"schema": 1, "can": can, "runtimes": runtimes, "board": {"l4t": "36.4.3"}, "problems": {}} | changes


Boards = Callable[..., "Board"]


class Board:
    """One sshd, and what is on the other side of it."""

    def __init__(self, folder: Path, name: str, sshd: str) -> None:
        self._sshd = sshd
        self.folder, self.home, self.programs = folder / name, folder / name / "home", folder / name / "bin"
        self.home.mkdir(parents=True)
        self.programs.mkdir()
        self.temporary = folder / name / "tmp"
        self.temporary.mkdir()
        (self.programs / "sleep").symlink_to(shutil.which("sleep") or "/bin/sleep")
        self.python()
        self.does()
        self.port = _free_port()
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"ssh://{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1:{self.port}"

    @property
    def place(self) -> Place:
        return Place.parse(self.address)

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "kdedge"

    def python(self, first: str = "", site: bool = False) -> None:
        """`python3` of the board. `first`: statements before what it is told to do; with `site` it has its packages."""
        (self.programs / "first.py").write_text(f"{first}\nimport sys\nexec(sys.argv[1])\n")
        start = f'"{sys.executable}"' if site else f'"{sys.executable}" -S'
        told = f'[ "$1" = -c ] && exec {start} "{self.programs}/first.py" "$2"\n' if first else ""
        self.command("python3", f'{told}exec {start} "$@"')

    def command(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def does(self, **behaviour: Any) -> None:
        document = {"schema": 1, "records": [record("fp32"), record("int8")], "failed": {}}
        (self.home / "behaviour.json").write_text(json.dumps({"info": able(), "document": document} | behaviour))

    def hold(self) -> Path:
        """Measurements do not end as long as this file is there."""
        path = self.home / "hold"
        path.touch()
        return path

    def calls(self) -> list[str]:
        path = self.home / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def measured(self) -> int:
        return sum(not call.startswith("info") for call in self.calls())

    def connections(self) -> int:
        return (self.folder / "sshd.log").read_text().count("Accepted publickey")

    def started(self) -> None:
        _until(lambda: (self.home / "begun").exists())

    def start(self, home: Path | None = None) -> None:
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder.parent}/id.pub\nStrictModes no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nPermitUserRC no\nUseDNS no\n"
            f"SetEnv HOME={home or self.home} BOARD={self.home} PATH={self.programs} XDG_CACHE_HOME= "
            f"TMPDIR={self.temporary}\n"
        )
        with (self.folder / "sshd.log").open("ab") as log:
            self._server = subprocess.Popen([self._sshd, "-D", "-e", "-f", str(config)], stderr=log, stdout=log)
        _until(self._answers)

    def _answers(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, (self.folder / "sshd.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def cut(self) -> None:
        """The connections end, as when a network breaks; what runs detached goes on."""
        assert self._server is not None
        for pid in _children(self._server.pid):
            for child in _children(pid):
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """The board is off."""
        if self._server is not None:
            self.cut()
            self._server.kill()
            self._server.wait()
            self._server = None


@pytest.fixture(scope="session")
def host_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key for the user and one for boards, made once."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("id", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    return folder


@pytest.fixture
def boards(
    sshd: str, tmp_path: Path, host_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Board]]:
    """Makes boards that ssh knows; with `known=False` it does not. They are off after the test, and nothing runs on."""
    network = tmp_path / "network"
    network.mkdir()
    for name in ("id", "id.pub"):
        shutil.copy(host_keys / name, network / name)
    (network / "config").write_text(
        f"Host *\nIdentityFile {network}/id\nIdentitiesOnly yes\nIdentityAgent none\n"
        f"UserKnownHostsFile {network}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
    )
    monkeypatch.setenv("KDEDGE_SSH", f"ssh -F '{network}/config'")
    monkeypatch.setattr("kdedge_bench.remote_link.PAUSES_S", (0.1, 0.2, 0.4))
    privileged = Path("/run/sshd")
    made = os.getuid() == 0 and not privileged.exists()
    if made:
        privileged.mkdir(mode=0o755)
    found: list[Board] = []

    def make(known: bool = True, start: bool = True) -> Board:
        board = Board(network, f"board{len(found)}", sshd)
        for name in ("host_key", "host_key.pub"):
            shutil.copy(host_keys / name, board.folder / name)
        if known:
            with (network / "known_hosts").open("a") as file:
                file.write(f"[127.0.0.1]:{board.port} {(host_keys / 'host_key.pub').read_text()}")
        if start:
            board.start()
        found.append(board)
        return board

    yield make
    for board in found:
        board.stop()
        _end_jobs(board)
    if made:
        privileged.rmdir()
    assert not list(_mentioning(str(network)))


@pytest.fixture
def board(boards: Callable[..., Board]) -> Board:
    return boards()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle in a run whose program is PROGRAM."""
    folder = tmp_path / "runs" / "tiny-digits-40-s0" / "bundle"
    folder.mkdir(parents=True)
    (folder.parent / "manifest.json").write_text('{"schema": 1, "status": "finished"}')
    write_bundle(folder)
    return folder


def write_bundle(folder: Path, **models: bytes) -> None:
    """Write or change its models; the manifest says what lies there."""
    contents = {"model.onnx": b"float" * 1000, "model.int8.onnx": b"int8" * 400, "run.pyz": PROGRAM.encode()}
    contents |= {f"{name}.onnx": content for name, content in models.items()}
    listed = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        listed[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    artifacts = {
        name: {"file": file, "precision": name, "runtime": "onnxruntime", "golden_tolerance": 0.1, **listed.pop(file)}
        for name, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx"))
    }
    document = {
        "schema": 1, "artifacts": artifacts, "files": listed, "classes": ["a", "b"], "shipped": "int8",
        "input": {"name": "input", "shape": ["batch", 1, 8, 8], "dtype": "float32", "layout": "NCHW"},
        "preprocess": {"height": 8, "width": 8, "channels": 1, "resize": "short-side-crop", "mean": [0.5],
                       "std": [0.5]},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(document))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "nothing happened for 20 s"
        time.sleep(0.01)


until = _until


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def _mentioning(text: str) -> Iterator[int]:
    """Processes with `text` in their command line or environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            if text.encode() in said and int(folder.name) != os.getpid():
                yield int(folder.name)


mentioning = _mentioning


def _end_jobs(board: Board) -> None:
    """Of a test that failed midway."""
    (board.home / "hold").unlink(missing_ok=True)
    for pid in _mentioning(f"BOARD={board.home}"):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _until(lambda: not list(_mentioning(str(board.home))))
