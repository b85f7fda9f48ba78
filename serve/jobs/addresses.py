"""Check of the addresses to which webhooks are sent.

A tenant chooses the URL, so a server that believed it would send requests into its own network
(server-side request forgery). The address is checked when the socket is made: a name that answers
with another address each time changes nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

GLOBAL_UNICAST = ip_network("2000::/3")
# IPv6 addresses that hold an IPv4 address, to which some networks send their packets.
TRANSLATED = tuple(
    ip_network(name)
    for name in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
)


class ForbiddenAddressError(OSError):
    """A webhook's name leads to an address to which nothing may be sent."""


def is_public(address: Address) -> bool:
    """Return whether an address belongs to a single machine of the public internet."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address not in GLOBAL_UNICAST or any(address in network for network in TRANSLATED):
            return False
    return address.is_global and not address.is_multicast


def is_in(address: Address, networks: Iterable[Network]) -> bool:
    """Return whether an address is in one of these networks."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(address.version == n.version and address in n for n in networks)


def checked_socket(
    networks: Callable[[], Iterable[Network]], *, private_only: bool
) -> Callable[[Any], socket.socket]:
    """Return a function that makes sockets, for a client that may reach allowed addresses only.

    `networks`: returns the private networks that are allowed. `private_only`: no others are. The
    function raises `ForbiddenAddressError` for all other addresses.
    """

    def make(info: Any) -> socket.socket:
        family, kind, protocol, _, where = info
        address = ip_address(str(where[0]).partition("%")[0])
        if not (is_in(address, networks()) or (not private_only and is_public(address))):
            raise ForbiddenAddressError(f"webhooks may not be sent to {address}")
        return socket.socket(family, kind, protocol)

    return make
