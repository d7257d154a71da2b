"""What `waver` says of a server that it cannot reach: the cause, and what to do about it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest

from serving.client import Client
from tests.serving.api.conftest import Start
from waver_core.errors import UserError


def test_a_plain_server_that_is_asked_for_tls_is_told_from_one_that_is_away(start: Start) -> None:
    address = str(start(paint=False).base_url).replace("http:", "https:")
    with Client(address) as client, pytest.raises(UserError, match=r"no TLS at https://.*: a plain server's address begins with"):
        client.jobs()


def test_a_name_that_does_not_resolve_is_told_from_a_server_that_is_away() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("no", request=request) from socket.gaierror(-2, "Name or service not known")

    said = r"far.example does not resolve \(Name or service not known\): check --server"
    with Client("http://far.example", transport=httpx2.MockTransport(answer)) as client, pytest.raises(UserError, match=said):
        client.jobs()


def test_a_certificate_that_is_not_trusted_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening_with_tls(tmp_path) as (address, certificate):
        with Client(address) as client, pytest.raises(UserError, match=r"certificate of .* is not trusted .*: set SSL_CERT_FILE"):
            client.jobs()
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        with Client(address) as client:
            assert client.jobs() == []
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(UserError, match="SSL_CERT_FILE or SSL_CERT_DIR cannot be used"):
        Client(address)


@contextlib.contextmanager
def listening_with_tls(folder: Path) -> Iterator[tuple[str, str]]:
    """(address, certificate) of a server that has no jobs, with a certificate that nobody has signed."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    certificate = folder / "certificate.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                connection = listener.accept()[0]
                with contextlib.suppress(OSError), connection, context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(65536)
                    secured.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"data": []}')

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        yield f"https://localhost:{listener.getsockname()[1]}", str(certificate)
        listener.shutdown(socket.SHUT_RDWR)
