"""What is let through to ssh, and what the answers of ssh are told as. No network."""

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import DeviceError
from kdedge_bench import remote_agent
from kdedge_bench.remote_place import Place, shown
from kdedge_bench.remote_told import explained, lacking

PLACE = Place("orin", "me", 2222)


@pytest.mark.parametrize(
    ("text", "place", "arguments"),
    [
        ("ssh://orin", Place("orin"), ["--", "orin"]),
        ("ssh://me@192.168.1.20/", Place("192.168.1.20", "me"), ["-l", "me", "--", "192.168.1.20"]),
        ("SSH://me@orin.local:2222", Place("orin.local", "me", 2222), ["-p", "2222", "-l", "me", "--", "orin.local"]),
        ("ssh://me@corp@orin", Place("orin", "me@corp"), ["-l", "me@corp", "--", "orin"]),
        ("ssh://[fe80::1%eth0]:22", Place("fe80::1%eth0", None, 22), ["-p", "22", "--", "fe80::1%eth0"]),
    ],
)
def test_places(text: str, place: Place, arguments: list[str]) -> None:
    assert Place.parse(text) == place
    assert place.arguments == arguments
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("orin", "is no place to measure on"),
        ("me@orin", "Did you mean 'ssh://me@orin'?"),
        ("http://orin", "is no place to measure on"),
        ("ssh://", "The host ''"),
        ("ssh://-oProxyCommand=touch hacked", "The host '-oProxyCommand=touch hacked'"),
        ("ssh://-oProxyCommand@orin", "The user '-oProxyCommand'"),
        ("ssh://$(touch hacked)@orin", r"The user '$(touch hacked)'"),
        ("ssh://me@orin;touch hacked", "The host 'orin;touch hacked'"),
        ("ssh://me@orin\n-oX", "The host 'orin -oX'"),
        ("ssh://me@ori\x1b[31mn", "The host"),
        ("ssh://me@orín", "The host"),
        ("ssh://me@orin/home/me", "The host 'orin/home/me'"),
        ("ssh://@orin", "The user ''"),
        ("ssh://[::1", "The host"),
        ("ssh://[orin]", "The host 'orin'"),
        ("ssh://orin:", "The port ''"),
        ("ssh://orin:0", "The port '0'"),
        ("ssh://orin:65536", "The port '65536'"),
        ("ssh://orin:22x", "The port '22x'"),
        ("ssh://orin:٢٢", "The port '٢٢'"),
    ],
)
def test_what_is_no_place(text: str, words: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(words)) as caught:
        Place.parse(text)
    assert str(caught.value).isprintable()


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(DeviceError, match="A password has no place") as caught:
        Place.parse("ssh://me:secret@orin")
    assert "secret" not in str(caught.value)


def test_text_of_strangers_does_not_reach_the_terminal() -> None:
    assert shown("a\x1b]0;title\x07b\r\n\tc\u202e") == "a ]0;title b c"
    assert shown("x" * 1000) == "..." + "x" * 400


@pytest.mark.parametrize(
    ("code", "told", "words", "again"),
    [
        (255, "ssh: Could not resolve hostname orin: Name or service not known", "cannot be reached: ssh: Could", True),
        (255, "ssh: connect to host orin port 22: Connection timed out", "Is it on and in this network", True),
        (255, "", "the connection was closed", True),
        (255, "me@orin: Permission denied (publickey,password).", "never asks for a password", False),
        (255, "No ED25519 host key is known for orin and you have requested strict checking.", "not known here", False),
        (255, "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!", r"ssh-keygen -R '[orin]:2222'", False),
        (127, "bash: python3: Kommando nicht gefunden.", "has no python3", False),
        (1, "python3: Command not found.", "has no python3", False),  # csh
        (1, "kdedge-python 3.7.1 ", "has Python 3.7.1; kdedge needs 3.8", False),
        (1, "kdedge-python 3.6.9 # R32 (release), REVISION", "JetPack 4 or older (L4T R32, Python 3.6.9)", False),
        (1, "This account is currently not available.", "answers, but not as a board should (exit code 1)", False),
    ],
)
def test_answers_of_ssh(code: int, told: str, words: str, again: bool) -> None:
    error, may_help = explained(PLACE, code, told)
    assert words in str(error)
    assert may_help == again
    assert error.exit_code == 2


def test_an_alias_is_known_by_its_real_name() -> None:
    changed = "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!"
    alias = Place.parse("ssh://board")
    cases = [
        ({"hostname": "192.168.1.20", "port": "22"}, "ssh-keygen -R 192.168.1.20,"),
        ({"hostname": "192.168.1.20", "port": "2222"}, "ssh-keygen -R '[192.168.1.20]:2222',"),
        ({"hostname": "10.0.0.1", "port": "2222", "hostkeyalias": "orin"}, "ssh-keygen -R orin,"),
        ({"hostname": "orin", "userknownhostsfile": "/home/me/.ssh/known_hosts /home/me/x"}, "ssh-keygen -R orin,"),
        ({"hostname": "orin", "userknownhostsfile": "/a/known_hosts"}, "ssh-keygen -R orin -f /a/known_hosts,"),
        ({}, "ssh-keygen -R board,"),
    ]
    for settings, words in cases:
        assert words in str(explained(alias, 255, changed, settings)[0]), settings


def test_by_hand_is_the_ssh_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PLACE.by_hand == "ssh -p 2222 me@orin"
    monkeypatch.setenv("KDEDGE_SSH", "ssh -F my.config")
    assert PLACE.by_hand == "ssh -F my.config -p 2222 me@orin"


def test_what_to_install() -> None:
    everything = {"numpy": "2.0", "onnxruntime": "1.23", "tensorrt": None}
    cases = itertools.product((True, False), (True, False), (True, False), (True, False))
    for pip, managed, venv, ensurepip in cases:
        seen = {"python": "3.11.2", "pip": pip, "managed": managed, "venv": venv, "ensurepip": ensurepip, "apt": True}
        info: dict[str, Any] = {"can": {"bench": "It needs it."}, "runtimes": everything | {"onnxruntime": None}}
        told = str(lacking(PLACE, "bench", seen, info))
        assert "me@orin has Python 3.11.2 but no ONNX Runtime or TensorRT, so it cannot bench." in told
        assert ("python3 -m pip install --user onnxruntime" in told) == (pip and not managed and not venv)
        assert ("python3 -m venv" in told) == (not venv and (managed or not pip))
        assert ("sudo apt install python3-venv &&" in told) == (not venv and not ensurepip and (managed or not pip))
    info |= {"board": {"l4t": "36.4.3"}, "problems": {"onnxruntime": "importing it crashed (SIGILL)"}}
    told = str(lacking(PLACE, "bench", seen, info))
    assert "sudo apt install nvidia-jetpack" in told
    assert "that works (importing it crashed (SIGILL))" in told
    assert str(lacking(PLACE, "build", seen, {"can": {"build": "No GPU."}, "runtimes": everything})).endswith("No GPU.")
    assert lacking(PLACE, "bench", seen, {"can": {"bench": None}}) is None
    assert lacking(PLACE, "bench", seen, {}) is None


def test_the_agent_is_for_python_3_8() -> None:
    source = Path(remote_agent.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imports = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not {name for name in imports if name.startswith(("kdedge", "numpy"))}
