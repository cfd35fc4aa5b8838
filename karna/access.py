"""Who may come in: Host, Origin and token.

This server executes commands on its user's machine, and any page open in that user's browser can
reach it: the page is the attacker to plan for. Pure decisions on a Head and the Config; every door
asks `check_access` before anything else. Used by the routes and the Socket.IO door.
"""

from __future__ import annotations

import functools
import hmac
import re
import socket
from typing import Any

from karna.config import ORIGIN, Config
from karna.errors import Forbidden, InvalidRequest, RequestError
from karna.head import Head

TOKEN_TEXT = "this server needs its token"


def check_access(config: Config, head: Head, *, is_near: bool = False) -> str | None:
    """Decide, for every door, whether this request may come in. Raises RequestError.

    Host: a web page whose name was rebound to this address names itself there. Origin: the page
    that asks. Token: what a page or a process that was let in must still know.
    is_near: it comes from this machine; a load balancer there may ask for `/health` in HTTP/1.0
    without a Host, which no browser does. Returns the allowed origin that asks, for the CORS
    answer; None when it is no browser.
    """
    if not (is_near and head.is_bare_probe):
        check_host(config, head)
    origin = check_origin(config, head)
    is_open = head.path in _OPEN_PATHS and not head.is_upgrade
    # A preflight carries no token, and the Socket.IO door takes its token with CONNECT.
    if head.method == "OPTIONS" or is_open or "EIO" in head.query:
        return origin
    if not is_authorized(config, head):
        headers = {"WWW-Authenticate": "Bearer"}
        raise RequestError(TOKEN_TEXT, code="unauthorized", headers=headers)
    return origin


_OPEN_PATHS = ("/", "/health")


def check_host(config: Config, head: Head) -> None:
    """Exactly one Host, naming localhost, an IP address, or a name that was allowed."""
    host = head.headers.get("host")
    if host is None or "host" in head.repeated:
        raise InvalidRequest("a request needs exactly one Host header")
    name = _foreign_name(host)
    if name and name not in [each.lower() for each in config.allow_host]:
        message = f"Host {name} is not allowed; --allow-host {name} would allow it"
        raise Forbidden(message)


@functools.lru_cache
def _foreign_name(host: str) -> str:
    """The name in a Host field that must be allowed; none of localhost and of an IP address."""
    match = _HOST.fullmatch(host)
    if match is None:
        raise InvalidRequest("malformed Host header")
    name = match[1].lower()
    return "" if name == "localhost" or is_ip_address(name) else name


_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")


def is_ip_address(name: str) -> bool:
    """Is this an IPv4 address, or an IPv6 address in brackets?"""
    family = socket.AF_INET6 if name.startswith("[") else socket.AF_INET
    try:
        socket.inet_pton(family, name.strip("[]"))
    except OSError:
        return False
    return True


def check_origin(config: Config, head: Head) -> str | None:
    """The allowed origin that asks, None when it is no browser. Raises RequestError."""
    origin = head.headers.get("origin")
    if origin is None:
        # In, not equal: one that comes twice is no less cross-site.
        if head.method == "POST" and "cross-site" in head.headers.get("sec-fetch-site", ""):
            raise Forbidden("cross-site request without an allowed Origin")
        return None
    if "origin" in head.repeated:
        raise Forbidden("a request has one Origin at most")
    if origin in config.allow_origin or _LOOPBACK_ORIGIN.fullmatch(origin):
        return origin
    scheme, _, authority = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    host = head.headers["host"].lower()
    if port is not None and authority.removesuffix(port) == host.removesuffix(port):
        return origin
    if not re.fullmatch(ORIGIN, origin) or len(origin) > 300:
        raise Forbidden("an Origin of this form, such as null, is never allowed")
    message = f"Origin {origin} is not allowed; --allow-origin {origin} would allow it"
    raise Forbidden(message)


_LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")


def forwarded_for(config: Config, peer: str, head: Head) -> str | None:
    """The address of who asked a trusted proxy; None where `peer` is no such proxy.

    The last of X-Forwarded-For that is no proxy of ours: what stands before it is anybody's word.
    """
    if peer not in config.trust_proxy:
        return None
    for each in reversed(head.headers.get("x-forwarded-for", "").split(",")):
        address = each.strip()
        if address not in config.trust_proxy:
            return address if re.fullmatch(_ADDRESS, address) else None
    return None


_ADDRESS = r"[0-9A-Fa-f:.]{2,45}"


def is_authorized(config: Config, head: Head) -> bool:
    """Does the request carry the token, if there is one, in its header or its query?"""
    if config.token is None:
        return True
    scheme, _, given = head.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and "authorization" not in head.repeated:
        return token_matches(config.token, given.strip())
    return token_matches(config.token, head.query.get("token", [None])[0])


def token_matches(token: str | None, given: Any) -> bool:
    """Is `given` the token, if there is one? Takes the same time for every wrong one."""
    if token is None or not isinstance(given, str):
        return token is None
    return hmac.compare_digest(token.encode(), given.encode(errors="replace"))
