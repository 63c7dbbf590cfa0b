"""The command `flow-pl deploy --check`: test what a node needs to connect to a SuperLink, before it is started."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from flow_pl.errors import ConfigurationError, brief
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.optional import import_optional

PATIENCE = 10.0
"""Seconds to wait for a connection."""


def command(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the arguments after `flow-pl deploy`.

    Raises:
        ConfigurationError: a node with these files cannot connect.
    """
    parser = Parser(
        prog="flow-pl deploy --check",
        description="Test what a node needs to connect to a SuperLink: address, certificate and key.",
    )
    parser.add_argument("--check", required=True, metavar="HOST:PORT", help="address of the SuperLink")
    parser.add_argument(
        "--root-certificates",
        type=home,
        metavar="FILE",
        help="certificate of the authority, PEM (default: a SuperLink without TLS)",
    )
    parser.add_argument(
        "--auth-supernode-private-key", type=home, metavar="FILE", help="key of the node, where nodes are authenticated"
    )
    options = parser.parse_args(args)
    if options.auth_supernode_private_key is not None:
        check_key(options.auth_supernode_private_key)
    check_superlink(options.check, options.root_certificates)
    key = "" if options.auth_supernode_private_key is None else ", and the key has the right format"
    secured = (
        "without TLS" if options.root_certificates is None else f"with a certificate by {options.root_certificates}"
    )
    print(f"{options.check} answers {secured}{key}.")


def check_key(path: Path) -> None:
    """Check that a file has a private key as Flower expects it.

    Args:
        path: the file.

    Raises:
        ConfigurationError: it cannot be read, or is no unencrypted EC key in OpenSSH's format.
    """
    content = _read(path, "the key")
    keys = import_optional("cryptography.hazmat.primitives.asymmetric.ec", "flower", "the check of a key")
    formats = import_optional("cryptography.hazmat.primitives.serialization", "flower", "the check of a key")
    remedy = f'make one with `ssh-keygen -t ecdsa -b 384 -N "" -C "" -f {path.name}`.'
    try:
        key = formats.load_ssh_private_key(content, password=None)
    except Exception as error:
        raise ConfigurationError(
            f"the key {path} is not an unencrypted private key in OpenSSH's format ({brief(error)}): {remedy}"
        ) from error
    if not isinstance(key, keys.EllipticCurvePrivateKey):
        kind = type(key).__name__.strip("_")
        raise ConfigurationError(f"the key {path} is a {kind}, expected an elliptic curve: {remedy}")


def check_superlink(address: str, authority: Path | None) -> None:
    """Check that a SuperLink answers at an address, with a certificate by the authority.

    Args:
        address: "host:port".
        authority: PEM file of the authority; None for a SuperLink without TLS.

    Raises:
        ConfigurationError: the address or the file is invalid, nothing answers, or one side only uses TLS.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigurationError(f"the address is {address}, expected HOST:PORT, such as 127.0.0.1:8000.")
    context = ssl.create_default_context()
    if authority is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    else:
        _read(authority, "the certificate")
        context = _trusting(authority)
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE)
    except OSError as error:
        raise ConfigurationError(
            f"no SuperLink answers at {address} ({brief(error)}): start `flower-superlink`, and check the address and "
            "the firewall."
        ) from error
    with connection:
        secured, why = _handshake(context, connection, host.strip("[]"))
    if authority is None and secured:
        raise ConfigurationError(
            f"the SuperLink at {address} uses TLS: give --root-certificates, the certificate of its authority."
        )
    if authority is not None and not secured:
        raise ConfigurationError(f"the SuperLink at {address} is not trusted: {why}")


def _trusting(authority: Path) -> ssl.SSLContext:
    """Return a context that trusts an authority alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=authority)
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"the certificate {authority} is not in PEM format ({brief(error)}): give the file ca.crt of the authority."
        ) from error
    return context


def _handshake(context: ssl.SSLContext, connection: socket.socket, host: str) -> tuple[bool, str]:
    """Return whether a TLS handshake succeeds, and otherwise why not, with the remedy."""
    try:
        with context.wrap_socket(connection, server_hostname=host):
            return True, ""
    except ssl.SSLCertVerificationError as error:
        return False, (
            f"{error.verify_message}. Give the certificate of the authority that signed the SuperLink's; that one must "
            f"name {host} as a subjectAltName."
        )
    except OSError as error:  # also of a server without TLS, which closes the connection or waits for more
        return False, f"it does not answer in TLS ({brief(error)}). Start it with --ssl-certfile and --ssl-keyfile."


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{what} {path} cannot be read ({error.strerror}): give the path of its file."
        ) from error
