"""Where a board is: `ssh://[user@]host[:port]`, checked before any of it reaches a command line.

ssh hands user and host to programs of its own configuration (ProxyCommand, Match exec) through a shell, and takes what
starts with a dash for an option. So nothing but what names consist of is let through.
"""

import os
import re
from dataclasses import dataclass

from kdedge.errors import DeviceError

__all__ = ["Place", "shown"]

_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.+@-]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", re.ASCII)  # a name, IPv4, or an alias of the ssh configuration
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?", re.ASCII)
_FORM = "Expected local or ssh://user@host[:port], such as ssh://me@orin or ssh://me@192.168.1.20:2222."


@dataclass(frozen=True)
class Place:
    """A board that ssh reaches. What is None, the user's ssh configuration says."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Place":
        """DeviceError where `text` is no place, or one with a password in it."""
        scheme, found, rest = text.partition("://")
        if not found or scheme.lower() != "ssh":
            guess = "" if found or not _HOST.fullmatch(text.partition("@")[2]) else f" Did you mean 'ssh://{text}'?"
            raise DeviceError(f"{shown(text)!r} is no place to measure on. {_FORM}{guess}")
        user, at, address = rest.removesuffix("/").rpartition("@")
        if ":" in user:
            # Not repeated in the message: messages end up in logs.
            raise DeviceError(
                "A password has no place in ssh://user@host[:port]: kdedge logs in with your ssh keys only. "
                "Leave it out, and copy your key to the board once: ssh-copy-id user@host"
            )
        host, port = _host_and_port(address, text)
        if at and not _USER.fullmatch(user):
            raise DeviceError(
                f"The user {shown(user)!r} in {shown(text)!r} is no name that ssh should be given. {_FORM}"
            )
        return cls(host, user or None, port)

    @property
    def name(self) -> str:
        """For people, and for the user's own ssh: [user@]host."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def arguments(self) -> list[str]:
        """For ssh, after its options; `--` ends them, whatever the host is called."""
        port = ["-p", str(self.port)] if self.port is not None else []
        return [*port, *(["-l", self.user] if self.user else []), "--", self.host]

    @property
    def by_hand(self) -> str:
        """What to type to log in; by the ssh that KDEDGE_SSH names, too."""
        ssh = os.environ.get("KDEDGE_SSH") or "ssh"
        return f"{ssh} -p {self.port} {self.name}" if self.port is not None else f"{ssh} {self.name}"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port is not None else ""
        return f"ssh://{self.user + '@' if self.user else ''}{host}{port}"


def _host_and_port(address: str, text: str) -> tuple[str, int | None]:
    bracket = re.fullmatch(r"\[([^]]*)\](?::(.*))?", address)
    name, colon, number = address.partition(":")
    host, port = (bracket[1], bracket[2]) if bracket else (name, number if colon else None)
    if not (_IPV6 if bracket else _HOST).fullmatch(host):
        raise DeviceError(f"The host {shown(host)!r} in {shown(text)!r} is no name that ssh should be given. {_FORM}")
    if port is None:
        return host, None
    if not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or not 1 <= int(port) <= 65535:
        raise DeviceError(
            f"The port {shown(port)!r} in {shown(text)!r} is none; a number from 1 to 65535 was expected."
        )
    return host, int(port)


def shown(text: str, most: int = 400) -> str:
    """Text from elsewhere on one line and without control characters, which a terminal would obey; its end if long."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= most else f"...{line[-most:]}"
