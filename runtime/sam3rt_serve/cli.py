"""``sam3rt serve``: a model over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import signal
import socket
import warnings
from datetime import datetime, timezone
from pathlib import Path

from sam3rt.cli.options import (
    add_bundle_argument,
    add_model_options,
    load_from_options,
    named_path,
    positive_int,
)
from sam3rt.errors import BackendError, InvalidInputError, PromptWarning

from .limits import add_limit_options, add_number, limits_from_options

HELP = "serve a model over HTTP (needs the serve extra)"
DESCRIPTION = """\
Serve a model over HTTP: an image is encoded once, then clicks on it are answered with masks.

/openapi.json describes the interface, /readyz asks the model whether it is well, /metrics is for
Prometheus. Each request is logged to standard error as a line of JSON. SIGTERM ends the server
once it has answered what it has accepted.
"""
_KEY = "SAM3RT_API_KEY"
_LOG = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_bundle_argument(parser, "--bundle")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (8000)")
    parser.add_argument(
        "--api-key-file",
        type=named_path,
        metavar="FILE",
        help=f"file with the key to ask for (default: the variable {_KEY}, else no key)",
    )
    parser.add_argument(
        "--cache-folder",
        type=named_path,
        metavar="DIR",
        help="folder to keep embeddings in too; several servers may share it",
    )
    for name, default, what in (
        ("--cache-mb", 1024, "memory for embeddings, on the device that decodes"),
        ("--cache-folder-mb", 65536, "what the folder may hold"),
        # A process may usually have 1,024 files open.
        ("--max-connections", 800, "connections"),
        ("--health-seconds", 300, "how long an answer of /readyz holds"),
    ):
        add_number(parser, name, default, what)
    add_limit_options(parser)
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="threads that answer clicks (default: one a core, from 2 to 8)",
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    try:
        import uvicorn

        from .connections import BoundedProtocol
        from .core import Service
        from .http import create_app
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        raise BackendError(f"serving needs {missing}: pip install 'sam3rt[serve,cpu]'") from error
    api_key = _api_key(options.api_key_file)
    # Before the model is loaded: an address that is taken shows at once. Callers are refused until
    # the server listens, so that a balancer waits.
    listener = bind(options.host, options.port)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        _LOG.warning("there is no API key: whoever reaches %s can use it", address_of(listener))
    # Prompts far outside an image are the callers' affair.
    warnings.filterwarnings("ignore", category=PromptWarning)
    model = load_from_options(options)
    model.warm_up()
    service = Service(
        model,
        limits_from_options(options),
        cache_bytes=options.cache_mb << 20,
        cache_folder=options.cache_folder,
        max_folder_bytes=options.cache_folder_mb << 20,
        threads=options.workers,
    )
    app = create_app(service, api_key=api_key, health_seconds=float(options.health_seconds))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            backlog=128,
            limit_concurrency=options.max_connections,
            timeout_graceful_shutdown=options.deadline,
            access_log=False,
            log_config=None,
            server_header=False,
        )
    )
    _LOG.info("serving %s at http://%s", model.manifest.name, address_of(listener))
    # uvicorn ends in order on SIGTERM, and raises it once more after that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine, which does not listen yet.

    Args:
        host: an address or a name; of a name's addresses, one of IPv4 where there is one.
        port: 0 takes a free one.

    Raises:
        InvalidInputError: there is no such host or port.
        OSError: the address is another machine's, or the port is taken.
    """
    if not 0 <= port < 1 << 16:
        raise InvalidInputError("--port", str(port), "a number from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InvalidInputError("--host", repr(host), "an address of this machine") from error
    family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family)
    if os.name == "posix":  # elsewhere it lets two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {address[0]}, port {port}: {error.strerror}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Host and port of a socket, as addresses of the web have them."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _api_key(path: Path | None) -> str | None:
    """The key from a file or the environment; never from the command line, which others see."""
    given = os.environ.get(_KEY) if path is None else path.read_text().strip()
    if given is None:
        return None
    if not given or not given.isascii() or not given.isprintable():
        source = f"in {path}" if path is not None else f"in the variable {_KEY}"
        raise InvalidInputError("API key", f"nothing usable {source}", "printable ASCII")
    return given


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
