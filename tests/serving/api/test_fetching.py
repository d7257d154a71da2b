"""Pictures by URL, from a TLS server of this machine that stands in for the internet."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.api.errors import ApiError
from serving.api.fetching import check_url, fetch, is_public

HOST, ADDRESS = "pictures.example", "93.184.215.14"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the host and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
    made = builder.sign(key, hashes.SHA256())
    folder = tmp_path_factory.mktemp("tls")
    encoding = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.public_bytes(encoding))
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"


Get = Callable[..., bytes]


@pytest.fixture
def get(certificate: tuple[Path, Path]) -> Iterator[Get]:
    """`get(answer)`: fetch from a server that sends these pieces, waiting `pause_s` between them."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    listener = socket.create_server(("127.0.0.1", 0))
    dialled: list[tuple[str, int]] = []

    def get(
        *pieces: bytes, pause_s: float = 0.0, path: str = "/a.png", context: ssl.SSLContext | None = trusting, **more: object
    ) -> bytes:
        def serve() -> None:
            raw, _ = listener.accept()
            with raw, contextlib.suppress(OSError), server_side.wrap_socket(raw, server_side=True) as tls:
                asked = tls.recv(4096)
                requests.append(asked)
                for piece in pieces:
                    tls.sendall(piece)
                    time.sleep(pause_s)

        def dial(address: tuple[str, int], timeout_s: float) -> socket.socket:
            dialled.append(address)
            return socket.create_connection(listener.getsockname(), timeout_s)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        options = {"max_bytes": 10_000, "timeout_s": 5.0, **more}
        try:
            return fetch(
                f"https://{HOST}{path}",
                [HOST],
                "first_frame",
                resolve=lambda *_: [ADDRESS],
                dial=dial,
                context=context,
                **options,
            )  # type: ignore[arg-type]
        finally:
            thread.join(5)
            assert dialled.pop() == (ADDRESS, 443)  # the very address that was checked

    requests: list[bytes] = []
    get.requests = requests  # type: ignore[attr-defined]
    yield get
    listener.close()


def _refused(get: Get, *pieces: bytes, **more: object) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as refused:
        get(*pieces, **more)
    return refused.value.status, refused.value.code, str(refused.value)


def test_a_listed_host_is_asked_once_and_by_its_name(get: Get) -> None:
    data = get(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello", path="/a%20b/ü.png?x=1&y=ä")
    assert data == b"hello"
    asked = get.requests[0].decode()  # type: ignore[attr-defined]
    assert asked.startswith("GET /a%20b/%C3%BC.png?x=1&y=%C3%A4 HTTP/1.1\r\n") and f"Host: {HOST}\r\n" in asked
    assert get(b"HTTP/1.1 200 OK\r\n\r\nto the end") == b"to the end"


def test_redirects_errors_and_broken_answers(get: Get) -> None:
    moved = _refused(get, b"HTTP/1.1 302 Found\r\nLocation: https://10.0.0.1/\r\nContent-Length: 0\r\n\r\n")
    assert moved[:2] == (400, "url_failed") and "redirects are not followed" in moved[2]
    assert "answers 404" in _refused(get, b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")[2]
    assert "breaks off" in _refused(get, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfour")[2]
    assert "connection failed" in _refused(get, b"nonsense\r\n\r\n")[2]
    assert "connection failed" in _refused(get, context=ssl.create_default_context())[2]  # a certificate of nobody


def test_caps_on_bytes_and_time(get: Get) -> None:
    assert _refused(get, b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n")[:2] == (413, "file_too_large")
    assert _refused(get, b"HTTP/1.1 200 OK\r\n\r\n" + bytes(20_000))[:2] == (413, "file_too_large")
    began = time.monotonic()
    slow = _refused(get, b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 8, pause_s=0.1, timeout_s=0.4)
    assert "in time" in slow[2] and time.monotonic() - began < 3
    began = time.monotonic()  # each byte of a header is in time, all of them are not
    drops = [bytes([c]) for c in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 30]
    slow = _refused(get, *drops, pause_s=0.1, timeout_s=0.4)
    assert "in time" in slow[2] and time.monotonic() - began < 6


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("93.184.215.14", True), ("2606:2800:21f::1", True), ("8.8.8.8", True)),
        *(("127.0.0.1", False), ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False)),
        *(("100.64.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False), ("240.0.0.1", False)),
        *(
            ("192.0.2.1", False),
            ("198.18.0.1", False),
            ("::1", False),
            ("::", False),
            ("fe80::1%eth0", False),
            ("fc00::1", False),
        ),
        *(("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True), ("64:ff9b::a00:1", False), ("64:ff9b::808:808", True)),
        *(
            ("2002:a00:1::", False),
            ("2001:0:808:808::f5ff:fffe", False),
            ("ff02::1", False),
            ("fec0::1", False),
            ("not an address", False),
        ),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize("url", ["https://Pictures.Example/a", "https://pictures.example:443/a", "https://pictures.example"])
def test_hosts_are_compared_without_case(url: str) -> None:
    assert check_url(url, ["PICTURES.example"], "first_frame").scheme == "https"
