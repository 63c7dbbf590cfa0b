"""What a node needs to connect is tested before it is started, and what is wrong is one line."""

import datetime
import ipaddress
import socket
import ssl
import threading

import pytest

pytest.importorskip("flwr")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from flow_pl.__main__ import main
from flow_pl.deploy.connection import check_key, check_superlink
from flow_pl.errors import ConfigurationError
from tests.deploy.network import free_port

PEM = serialization.Encoding.PEM
FORMATS = serialization.PrivateFormat
PLAIN = serialization.NoEncryption()


def signed(name, key, issuer, issuer_key, address=None):
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=1)
    named = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
    made = x509.CertificateBuilder(named[1], named[0], key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=2))
    made = made.add_extension(x509.BasicConstraints(ca=address is None, path_length=None), critical=True)
    if address is not None:
        address = x509.IPAddress(ipaddress.ip_address(address))
        made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return made.sign(issuer_key, hashes.SHA256()).public_bytes(PEM)


@pytest.fixture
def files(tmp_path):
    """Two authorities, the certificate of a server by the first one, and one by it for another address."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "other", "server")}
    (tmp_path / "ca.crt").write_bytes(signed("flow CA", keys["ca"], "flow CA", keys["ca"]))
    (tmp_path / "other.crt").write_bytes(signed("other CA", keys["other"], "other CA", keys["other"]))
    for name, address in (("server", "127.0.0.1"), ("elsewhere", "127.0.0.2")):
        (tmp_path / f"{name}.crt").write_bytes(signed(name, keys["server"], "flow CA", keys["ca"], address))
    (tmp_path / "server.key").write_bytes(keys["server"].private_bytes(PEM, FORMATS.PKCS8, PLAIN))
    return tmp_path


@pytest.fixture
def serve(files):
    """Start a server with TLS, or one that closes what is no HTTP."""
    listeners = []

    def start(certificate=None):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if certificate:
            context.load_cert_chain(files / certificate, files / "server.key")

        def answer():
            try:
                connection, _ = listener.accept()
                if certificate:
                    connection = context.wrap_socket(connection, server_side=True)
                connection.recv(1000)
                connection.close()
            except OSError:  # the client has turned away
                pass

        threading.Thread(target=answer, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


def test_a_superlink_that_is_trusted_passes(serve, files, capsys):
    key = ec.generate_private_key(ec.SECP384R1()).private_bytes(PEM, FORMATS.OpenSSH, PLAIN)
    (files / "node.key").write_bytes(key)
    address = serve("server.crt")
    certificate, node = files / "ca.crt", files / "node.key"
    options = ["--root-certificates", str(certificate), "--auth-supernode-private-key", str(node)]
    main(["deploy", "--check", address, *options])
    expected = f"{address} answers with a certificate by {certificate}, and the key has the right format.\n"
    assert capsys.readouterr().out == expected
    check_superlink(serve(), None)


@pytest.mark.parametrize(
    ("certificate", "authority", "said"),
    [
        ("server.crt", "other.crt", r"is not trusted: .*Give the certificate of the authority that signed"),
        ("elsewhere.crt", "ca.crt", r"is not trusted: .*must name 127.0.0.1 as a subjectAltName"),
        ("server.crt", None, r"uses TLS: give --root-certificates"),
        (None, "ca.crt", r"does not answer in TLS .*Start it with --ssl-certfile"),
        ("server.crt", "absent.crt", r"the certificate .*absent.crt cannot be read \(No such file"),
        ("server.crt", "server.key", r"the certificate .*server.key is not in PEM format"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said(serve, files, certificate, authority, said):
    address = serve(certificate)
    with pytest.raises(ConfigurationError, match=said):
        check_superlink(address, None if authority is None else files / authority)


def test_what_is_wrong_with_an_address_is_said():
    with pytest.raises(ConfigurationError, match="expected HOST:PORT"):
        check_superlink("http://here", None)
    with pytest.raises(ConfigurationError, match=r"no SuperLink answers at 127\.0\.0\.1:"):
        check_superlink(f"127.0.0.1:{free_port()}", None)


def test_what_is_wrong_with_a_key_is_said(tmp_path):
    path = tmp_path / "node.key"
    with pytest.raises(ConfigurationError, match=r"the key .*node.key cannot be read \(No such file"):
        check_key(path)
    path.write_bytes(ec.generate_private_key(ec.SECP384R1()).private_bytes(PEM, FORMATS.PKCS8, PLAIN))
    with pytest.raises(ConfigurationError, match=r"not an unencrypted private key in OpenSSH's format .*ssh-keygen"):
        check_key(path)
    path.write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(PEM, FORMATS.OpenSSH, PLAIN))
    with pytest.raises(ConfigurationError, match=r"is a RSAPrivateKey, expected an elliptic curve"):
        check_key(path)
