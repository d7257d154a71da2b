"""Pictures by URL: https, a host of the operator's list, a public address, that very address, and no more than the cap."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, quote, urlsplit

from serving.api.errors import ApiError

TIMEOUT_S = 15.0
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Resolve = Callable[[str, int], Sequence[str]]
Dial = Callable[[tuple[str, int], float], socket.socket]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def dial(address: tuple[str, int], timeout_s: float) -> socket.socket:
    """Connect to an address that has been checked."""
    return socket.create_connection(address, timeout_s)


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large, also where it wraps an IPv4 address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:  # of old, and yet "global"
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_url(url: str, hosts: Sequence[str], param: str) -> SplitResult:
    """Take a URL apart; raises `ApiError` 400 or 403 where it may not be fetched."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ApiError(400, "invalid_url", f"{param} is no valid URL: send https://host/path.", param=param) from None
    if parts.scheme != "https" or port not in (None, 443) or parts.username is not None or parts.password is not None:
        message = f"{param} must be an https URL without user, password and port: send such a one, or the picture itself."
        raise ApiError(400, "invalid_url", message, param=param)
    if not url.isprintable() or not host.isascii() or any(c.isspace() for c in url):
        raise ApiError(400, "invalid_url", f"{param} holds characters that no URL has: encode them.", param=param)
    if host.lower() not in {h.lower() for h in hosts}:
        message = f"{param} names a host that this server does not fetch from: send the picture itself."
        raise ApiError(403, "url_not_allowed", message, param=param)
    return parts


def fetch(
    url: str,
    hosts: Sequence[str],
    param: str,
    *,
    max_bytes: int,
    resolve: Resolve = resolve,
    dial: Dial = dial,
    context: ssl.SSLContext | None = None,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """The bytes at a URL. Raises `ApiError` 400, 403 or 413; the message never says what answered at a private address.

    The name is resolved once, every address it has must be public, and the connection goes to one that was checked: a name
    that changes its address between two look-ups gains nothing. Redirects are not followed. Proxies are not used.
    """
    parts = check_url(url, hosts, param)
    host = parts.hostname or ""
    end = time.monotonic() + timeout_s
    try:
        addresses = list(resolve(host, 443))
    except (OSError, UnicodeError):
        raise _failed(param, "its name is not known") from None
    if not addresses or not all(is_public(address) for address in addresses):
        message = f"{param} leads to an address that is not public: send the picture itself."
        raise ApiError(403, "url_not_allowed", message, param=param)
    until: threading.Timer | None = None
    connection = http.client.HTTPConnection(host, 443, timeout=timeout_s)
    connection.default_port = 443  # what https leaves out of the Host header
    try:
        plain = dial((addresses[0], 443), timeout_s)
        until = _ends_at(plain, end)
        try:
            tls = (context or ssl.create_default_context()).wrap_socket(plain, server_hostname=host)
            connection.sock = tls
        except BaseException:
            plain.close()
            raise
        query = f"?{quote(parts.query, safe='%=&/?:@!$+,;~-._')}" if parts.query else ""
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + query
        connection.request("GET", target, headers={"User-Agent": "openwaver", "Accept": "image/png, image/jpeg, image/webp"})
        with connection.getresponse() as answer:
            if answer.status != 200:
                more = ", and redirects are not followed" if 300 <= answer.status < 400 else ""
                raise _failed(param, f"it answers {answer.status}{more}")
            return _read(answer, tls, param, max_bytes, end)
    except (OSError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= end
        why = "it did not answer in time" if late else "the connection failed"
        raise _failed(param, why) from None
    finally:
        connection.close()
        if until is not None:
            until.cancel()


def _ends_at(plain: socket.socket, end: float) -> threading.Timer:
    """Cut the connection at that time: a socket's own time-out begins anew with each byte, be it of the handshake or a header."""
    guard = plain.dup()  # TLS takes the socket itself over

    def cut() -> None:
        with guard, contextlib.suppress(OSError):
            guard.shutdown(socket.SHUT_RDWR)

    class Timer(threading.Timer):
        def cancel(self) -> None:
            super().cancel()
            guard.close()

    timer = Timer(max(0.0, end - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    return timer


def _read(answer: http.client.HTTPResponse, tls: socket.socket, param: str, max_bytes: int, end: float) -> bytes:
    too_large = ApiError(
        413, "file_too_large", f"{param} is larger than {max_bytes / 1e6:g} MB: take a smaller picture.", param=param
    )
    if (answer.length or 0) > max_bytes:
        raise too_large
    data = bytearray()
    while True:
        left_s = end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        tls.settimeout(left_s)
        chunk = answer.read1(_CHUNK_BYTES)
        if not chunk:
            break
        data += chunk
        if len(data) > max_bytes:
            raise too_large
    if time.monotonic() >= end:
        raise TimeoutError
    if answer.length:
        raise _failed(param, "the answer breaks off")
    return bytes(data)


def _failed(param: str, why: str) -> ApiError:
    return ApiError(400, "url_failed", f"{param} could not be fetched, {why}: send the picture itself.", param=param)
