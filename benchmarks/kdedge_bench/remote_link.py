"""A board at the end of ssh: requests to the program of remote_agent.py, over one connection, which may break.

Plain OpenSSH with the user's own keys, configuration and known_hosts. Host keys are always checked, nothing ever asks
for a password. The command that the board is given is the same whatever is asked, so no name needs quoting.
"""

import contextlib
import json
import os
import secrets
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kdedge.errors import DeviceError
from kdedge_bench import remote_agent
from kdedge_bench.remote_place import Place, shown
from kdedge_bench.remote_told import explained

__all__ = ["ConnectionLost", "Link", "Say"]

Say = Callable[[str], None]
Reply = dict[str, Any]

# Python 3.0 can read it. It does not go on below 3.8, and then tells what the board is: JetPack 4 has Python 3.6.
BOOTSTRAP = (
    "python3 -c 'import sys,os;"
    'p="/etc/nv_tegra_release";'
    'sys.version_info<(3,8) and sys.exit("kdedge-python "+sys.version.split()[0]+" "'
    '+(open(p).readline() if os.path.exists(p) else ""));'
    "i=sys.stdin.buffer;"
    'exec(compile(i.read(int(i.readline())),"kdedge","exec"))\''
)
OPTIONS = {
    "BatchMode": "yes",  # no question is asked, for a password least of all
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",  # a board that lost its power is noticed within 15 s
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
    # The user's configuration may have these for logging in by hand; here they only get in the way.
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
}
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # before each new try to reach a board that was reached before
ENDS_S = 30.0  # for ssh, once it has closed its output
MOST_BYTES = 64 << 20  # of an answer


class ConnectionLost(DeviceError):
    """A board that was reached, and no longer is."""

    exit_code = 1


class _Broken(Exception):
    """ssh ended without an answer. `error`: what to tell; `again`: whether another try may do."""

    def __init__(self, error: DeviceError, again: bool) -> None:
        super().__init__(str(error))
        self.error, self.again = error, again


class Link:
    """A context manager around one board. `stopped` set, in whatever thread, ends what waits with KeyboardInterrupt."""

    def __init__(self, place: Place, say: Say, stopped: threading.Event | None = None) -> None:
        self.place, self.say = place, say
        self._stopped = stopped or threading.Event()
        # As GIT_SSH_COMMAND: another ssh, or options such as -F.
        self._ssh = shlex.split(os.environ.get("KDEDGE_SSH") or "ssh")
        self._source = Path(remote_agent.__file__).read_bytes()
        self._sockets: Path | None = None  # of our shared connection; None where the user has one
        self._settings: dict[str, str] = {}  # what `ssh -G` says of the board: its real name, port...
        self._reached = False

    def __enter__(self) -> "Link":
        if not self._shares():
            self._sockets = Path(tempfile.mkdtemp(prefix="kdedge-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sockets is not None:
            command = [*self._ssh, *self._options(), "-O", "exit", *self.place.arguments]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=10, check=False, start_new_session=True)
            shutil.rmtree(self._sockets, ignore_errors=True)

    def ask(self, do: str, content: bytes = b"", heed: bool = True, heard: Say | None = None, **request: Any) -> Reply:
        """The board's answer. Every request may be asked twice, so one whose answer was lost is asked again.

        `heard` is told the lines that come before the answer. With `heed` False `stopped` does not end it, and it is
        asked once. DeviceError where the board cannot be reached or refuses, ConnectionLost where it was reached before
        and is gone.
        """
        request |= {"do": do, "mark": secrets.token_hex(16)}
        pauses = iter(PAUSES_S)
        while True:
            asked_s = time.monotonic()
            try:
                reply = self._once(request, content, heed, heard)
            except _Broken as broken:
                lost = self._reached and broken.again
                if time.monotonic() - asked_s > sum(PAUSES_S):  # it had been back for long
                    pauses = iter(PAUSES_S)
                pause_s = next(pauses, None) if lost and heed else None
                if pause_s is None:
                    raise self._lost(broken) if lost else broken.error from None
                self.say(f"{self.place.name}: the connection was lost; trying again in {pause_s:g} s")
                if self._stopped.wait(pause_s):
                    raise KeyboardInterrupt from None
                continue
            self._reached = True
            if "error" in reply:
                raise DeviceError(_refused(self.place, reply["error"]))
            return reply

    def _lost(self, broken: _Broken) -> ConnectionLost:
        return ConnectionLost(
            f"The connection to {self.place.name} was lost and did not come back ({broken}) "
            "A measurement that was begun goes on there; the same command picks it up."
        )

    def _shares(self) -> bool:
        """Whether the user's own configuration shares connections to this host; DeviceError where ssh is missing."""
        command = [*self._ssh, "-G", *self.place.arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceError(
                f"{self._ssh[0]} cannot be started ({error}). --on ssh://... needs OpenSSH's client; "
                "on Debian and Ubuntu: sudo apt install openssh-client"
            ) from None
        if done.returncode:
            raise DeviceError(f"ssh refuses {self.place.name}: {shown(done.stderr)}. Look at your ssh configuration.")
        found = (line.partition(" ") for line in done.stdout.splitlines())
        self._settings = {name: value.strip() for name, _, value in found}
        return self._settings.get("controlpath", "none") != "none"

    def _options(self) -> list[str]:
        options = dict(OPTIONS)
        if self._sockets is not None:
            # Seconds until it ends by itself, should this process be killed.
            options |= {"ControlMaster": "auto", "ControlPersist": "60", "ControlPath": f"{self._sockets}/socket"}
        return ["-T", *(f"-o{name}={value}" for name, value in options.items())]

    def _once(self, request: Reply, content: bytes, heed: bool, heard: Say | None) -> Reply:
        command = [*self._ssh, *self._options(), *self.place.arguments, BOOTSTRAP]
        # Not a pipe: a shared connection's process would keep it open. A session of its own: Ctrl-C in the terminal
        # must not break the connection, over which the board is yet to be stopped.
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env=os.environ | {"SSH_ASKPASS_REQUIRE": "never"},  # a host on the way could open a window
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    line = json.dumps(request).encode()
                    process.stdin.write(b"%d\n%s%s\n%s" % (len(self._source), self._source, line, content))
                    process.stdin.flush()
                reply = self._read(process.stdout, request, heed, heard)
                if reply is not None:
                    return reply
                code = self._ended(process)
                errors.seek(0)
                told = errors.read().decode(errors="replace")
                raise _Broken(*explained(self.place, code, told, self._settings))
            finally:
                process.kill()
                process.wait()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                process.stdout.close()

    def _ended(self, process: "subprocess.Popen[bytes]") -> int:
        try:
            return process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            error = DeviceError(
                f"ssh to {self.place.name} gives no answer and does not end. Does this work? {self.place.by_hand}"
            )
            raise _Broken(error, again=True) from None

    def _read(self, output: IO[bytes], request: Reply, heed: bool, heard: Say | None) -> Reply | None:
        """The answer in what the board prints, whatever its shell prints before it; None where it ends without one."""
        found = b""
        while True:
            if heed and self._stopped.is_set():
                raise KeyboardInterrupt
            if not select.select([output], [], [], 0.2)[0]:
                continue
            piece = os.read(output.fileno(), 1 << 16)
            if not piece:
                return None
            found += piece
            if len(found) > MOST_BYTES:
                raise DeviceError(f"{self.place.name} answers more than {MOST_BYTES >> 20} MiB. That is no kdedge.")
            try:
                found, replies = _replies(found, f"\nkdedge-{request['mark']} ".encode())
            except (ValueError, RecursionError) as error:
                raise DeviceError(f"{self.place.name} answers what is no JSON ({shown(str(error))}).") from None
            for reply in replies:
                if "progress" not in reply:
                    return reply
                request["seen"] = reply["seen"]  # asked again, it does not repeat itself
                for line in reply["progress"].splitlines():
                    if heard is not None and line.strip():
                        heard(shown(line))


def _replies(found: bytes, begin: bytes) -> tuple[bytes, list[Reply]]:
    """The whole answers in `found`, each behind a line that starts with `begin`, and what is left behind them."""
    replies: list[Reply] = []
    while True:
        _, mark, rest = found.partition(begin)
        length, newline, rest = rest.partition(b"\n")
        if not (mark and newline and length.isdigit() and len(rest) >= int(length)):
            return found, replies
        replies.append(json.loads(rest[: int(length)]))
        found = rest[int(length) :]


def _refused(place: Place, error: Reply) -> str:
    """An error of the board's system as a sentence."""
    path = f" ({shown(error['path'])})" if error["path"] else ""
    if error["full"]:
        return f"The disk of {place.name} is full{path}. Free some space there, ~/.cache/kdedge first."
    return (
        f"{place.name} cannot keep files: {shown(error['text'])}{path}. "
        "Make ~/.cache writable there, or its folder for temporary files."
    )
