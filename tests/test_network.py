"""Addresses and ports."""

import socket

import pytest

from liftdist import network
from liftdist.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node7", ("node7", 29400)),
        ("node7.cluster:123", ("node7.cluster", 123)),
        ("10.0.0.1:29500", ("10.0.0.1", 29500)),
        ("[fe80::1%eth0]:29500", ("fe80::1%eth0", 29500)),
        ("::1", ("::1", 29400)),
    ],
)
def test_endpoints(text, expected):
    assert network.split_endpoint(text) == expected


@pytest.mark.parametrize(
    "text", ["", "-x", "a b", "node:0", "node:70000", "node:x", "$(x):1", "a\nb", "[::1", "node:1:2x"]
)
def test_endpoints_that_are_none(text):
    with pytest.raises(UserError, match="must be HOST"):
        network.split_endpoint(text)


def test_addresses_and_ports():
    with pytest.raises(UserError, match="cannot resolve it"):
        network.resolve("no-such-host.invalid")
    assert network.outgoing_address("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("::1") == "lo"
    assert network.interface_of("203.0.113.9") is None
    port = network.free_port(3)
    with socket.create_server(("", port)):
        assert network.free_port(3) != port
        with pytest.raises(UserError, match=f"port {port} on .*: Address already in use"):
            network.check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="is no address of this machine"):
        network.check_port("203.0.113.9", port)
