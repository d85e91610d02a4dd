"""How the nodes of a run reach each other: which of them serves the rendezvous, and from which
address and interface each of them speaks.

torchrun and gloo both go by the machine's host name. It often resolves to 127.0.0.1 or 127.0.1.1
(Debian's default), and then no node serves the rendezvous, or workers wait for each other on
loopback. The way to the rendezvous says better which address others can reach.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from dus_cli.errors import HealError, shown

# torchrun's, where the endpoint has no port.
_DEFAULT_PORT = 29400

# Seconds for a connection to another node.
_PATIENCE = 5.0

_SIOCGIFADDR = 0x8915  # an interface's IPv4 address: linux/sockios.h


def local_address(endpoint: str) -> str:
    """The address of this machine on the way to the rendezvous. Nothing is sent.

    Raises:
        HealError: the name is unknown here, or there is no way to it.
    """
    host, port = _parts(endpoint)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise HealError(
            f"--rdzv-endpoint: {shown(host)} is no name that this machine knows "
            f"({error.strerror}); give node 0's name or address"
        ) from None
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise HealError(
            f"--rdzv-endpoint: there is no way from this machine to {shown(host)} "
            f"({error.strerror}); check the network"
        ) from None


def check_port(endpoint: str) -> None:
    """Check that node 0 can serve the rendezvous.

    Raises:
        HealError: its port is taken.
    """
    _, port = _parts(endpoint)
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
    except OSError as error:
        raise HealError(
            f"--rdzv-endpoint: port {port} cannot be served by this machine, which is node 0 "
            f"({error.strerror}); another run may have it; give every node another port"
        ) from None


def answers(endpoint: str) -> bool:
    """Whether something listens at an endpoint."""
    try:
        socket.create_connection(_parts(endpoint), _PATIENCE).close()
    except OSError:
        return False
    return True


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None if it is not found."""
    if ipaddress.ip_address(address.partition("%")[0]).version == 6:
        return _ipv6_interface(address.partition("%")[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _ipv6_interface(address: str) -> str | None:
    wanted = ipaddress.ip_address(address).packed.hex()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            number, *_, name = line.split()
            if number == wanted:
                return name
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _parts(endpoint: str) -> tuple[str, int]:
    """Host and port of an endpoint that `parse_endpoint` has accepted."""
    if endpoint.startswith("["):
        host, _, port = endpoint[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = endpoint.partition(":")
    return host, int(port or _DEFAULT_PORT)
