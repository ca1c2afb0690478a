"""Names, addresses, network interfaces and ports, as several machines see each other. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import platform
import re
import socket
import struct
from pathlib import Path

from liftdist.errors import UserError

DEFAULT_PORT = 29400
PORTS = range(20000, 32000)  # below the range from which systems take ports for outgoing connections
_SIOCGIFADDR = 0x8915


def split_endpoint(text: str) -> tuple[str, int]:
    """``HOST``, ``HOST:PORT``, ``ADDRESS6`` or ``[ADDRESS6]:PORT`` as host and port. Raises ``UserError``."""
    match = re.fullmatch(r"\[([0-9a-fA-F:.%\w]+)\](?::(\d+))?|([\w.-]+)(?::(\d+))?|([0-9a-fA-F:]+(?:%\w+)?)", text)
    port = int((match[2] or match[4] or DEFAULT_PORT) if match else 0)
    if match is None or text.startswith("-") or not 0 < port < 65536:
        raise UserError(f"head {text!r}: must be HOST[:PORT], or [ADDRESS]:PORT for IPv6")
    return match[1] or match[3] or match[5], port


def resolve(name: str) -> str:
    """The address of a host. Raises ``UserError``: falling back to this machine would make every node a job of its own."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"head {name}: {platform.node()} cannot resolve it: {error.strerror or error}") from None


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def outgoing_address(peer: str) -> str:
    """The address of this machine that ``peer`` sees. Nothing is sent. Raises ``UserError``: there is no way to it."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"{platform.node()} has no way to {peer}: {error.strerror}") from None


def interface_of(address: str) -> str | None:
    """The network interface that has ``address``."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            if line.startswith(packed):
                return line.split()[-1]
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    return None


def check_port(address: str, port: int) -> None:
    """Raises ``UserError`` unless this machine has ``address`` and can listen on ``port``."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, 0))
        except OSError:
            raise UserError(f"head {address}: is no address of this machine, {platform.node()}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} on {platform.node()}: {error.strerror}; give another, --head HOST:PORT"
            ) from None


def free_port(seed: int) -> int:
    """A port of ``PORTS`` on which nobody listens; jobs with different seeds start at different ports."""
    for offset in range(len(PORTS)):
        port = PORTS[(seed + offset) % len(PORTS)]
        with contextlib.suppress(UserError):
            check_port("127.0.0.1", port)
            return port
    raise UserError(f"no free port from {PORTS.start} to {PORTS.stop} on {platform.node()}")
