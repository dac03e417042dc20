"""Where the server listens: its socket, its certificate, its URL, and how many connections the process may hold."""

from __future__ import annotations

import socket
import ssl
import sys

from fusedllm.errors import SettingsError
from fusedllm.serve.settings import ServerSettings

# Files that a process has open beside its connections: libraries, weights, the log.
OTHER_FILES = 256

# Connections that the kernel holds until they are accepted.
BACKLOG = 2048


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket.

    Raises:
      SettingsError: the name is unknown, or the address can't be listened on.
    """
    host = settings.host.strip("[]")
    where = f"port {settings.port} of {settings.host}"
    try:
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"the server can't listen at {settings.host}: {_reason(error)}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(f"the server can't listen at {where}: {_reason(error)}; choose another port.") from error
    return listener


def check_certificate(settings: ServerSettings) -> None:
    """Reads the certificate and its key as the server will.

    Raises:
      SettingsError: they are no PEM files, need a password, or don't belong together.
    """
    if settings.certificate is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Nobody is there to type a password, and a server that waits for one looks as if it were starting.
        context.load_cert_chain(settings.certificate, settings.private_key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the certificate {settings.certificate} can't be used with its private key: {_reason(error)}."
        ) from error


def url_of(listener: socket.socket, settings: ServerSettings) -> str:
    """Where a client on this machine finds the server."""
    scheme = "http" if settings.certificate is None else "https"
    host, port = settings.host.strip("[]"), listener.getsockname()[1]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def allow_connections(most: int) -> None:
    """Raises the process's soft limit of open files, as far as the hard one lets, to hold `most` connections."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
