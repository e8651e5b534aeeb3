"""``sam3rt demo``: a page in the browser to click on pictures, on a server of this machine."""

from __future__ import annotations

import argparse
import hashlib
import io
import ipaddress
import sys
import tarfile
import threading
import warnings
import webbrowser
from pathlib import Path

from sam3rt.cli.options import add_bundle_argument, add_model_options, load_from_options, named_path
from sam3rt.errors import BackendError, InvalidInputError, PromptWarning

from .cli import address_of, bind

HELP = "click on pictures in the browser (needs the demo extra)"
DESCRIPTION = """\
Open a page in the browser: drop a picture, click on objects, download their masks.

Everything runs on this machine and needs no network. Only this machine can reach the page, unless
--host names another of its addresses, such as one that a phone in the same network reaches.
"""
# ONNX Runtime for browsers is 14 MB that most people do not need, so they bring it themselves.
_WEB_VERSION = "1.30.0"
_WEB_SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
_WEB_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_bundle_argument(parser, "--bundle")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of this machine to listen on (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=0, help="port (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument(
        "--onnxruntime-web",
        type=named_path,
        metavar="FILE",
        help="let the page decode too, by this package from npm: "
        f"onnxruntime-web-{_WEB_VERSION}.tgz, from `npm pack onnxruntime-web@{_WEB_VERSION}`",
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Serve the page until the user interrupts it."""
    try:
        import uvicorn

        from .core import Service
        from .demo_page import Guard, page_routes
        from .http import create_app
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        raise BackendError(f"the demo needs {missing}: pip install 'sam3rt[demo,cpu]'") from error
    web = {} if options.onnxruntime_web is None else read_onnxruntime_web(options.onnxruntime_web)
    # Before the model is loaded: an address that is taken shows at once.
    check_host(options.host)
    listener = bind(options.host, options.port)
    # Clicks far outside a picture are the user's affair.
    warnings.filterwarnings("ignore", category=PromptWarning)
    model = load_from_options(options)
    model.warm_up()
    host, port = listener.getsockname()[:2]
    hosts = {address_of(listener)}
    url = f"http://{address_of(listener)}/"
    if ipaddress.ip_address(host).is_loopback:
        hosts.add(f"localhost:{port}")
    else:
        print("Anybody in this network can use the page.", file=sys.stderr)
    app = Guard(create_app(Service(model), routes=page_routes(model.bundle, web)), hosts)
    listener.listen()  # the browser may be sooner than the server
    print(f"{url} (Ctrl-C ends it)", flush=True)
    if not options.no_browser:
        # Some browsers let the call wait until they end.
        threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
    server = uvicorn.Server(
        uvicorn.Config(
            app, http="h11", log_level="warning", server_header=False, timeout_graceful_shutdown=5
        )
    )
    server.run(sockets=[listener])
    return 0 if server.started else 1


def check_host(host: str) -> None:
    """Refuse what is not one address of a machine: the page answers to its own address alone.

    Raises:
        InvalidInputError: it is a name, or stands for all of the machine's addresses.
    """
    try:
        is_one = not ipaddress.ip_address(
            "127.0.0.1" if host == "localhost" else host
        ).is_unspecified
    except ValueError:
        is_one = False
    if not is_one:
        raise InvalidInputError("--host", repr(host), "one address of this machine in numbers")


def read_onnxruntime_web(path: Path) -> dict[str, bytes]:
    """The files that the page needs of the npm package onnxruntime-web, by name.

    Raises:
        InvalidInputError: it is another file than the registry's.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if hashlib.sha512(content).hexdigest() != _WEB_SHA512:
        expected = f"onnxruntime-web-{_WEB_VERSION}.tgz as the npm registry has it"
        raise InvalidInputError("--onnxruntime-web", str(path), expected)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {name: archive.extractfile(f"package/dist/{name}") for name in _WEB_FILES}
        return {name: file.read() for name, file in files.items() if file is not None}
