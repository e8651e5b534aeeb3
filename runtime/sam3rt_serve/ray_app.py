"""The same application on Ray Serve: replicas on several machines behind one address.

    serve run sam3rt_serve.ray_app:app bundle=engines/sam3 cache_folder=/shared replicas=4

An image lies with the replica that encoded it, and in the folder that all share. A request whose
header ``serve_multiplexed_model_id`` names its image goes to a replica that holds it, where Ray
can; any other replica loads the image from the folder. Replicas are lost and come back without
loss of images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from sam3rt import load_model
from sam3rt.bundle.names import find_bundle
from sam3rt.errors import InvalidInputError

from .core import Service
from .http import create_app
from .limits import Limits

_DEFAULTS = {
    "bundle": "",
    "backend": "auto",
    "device": "auto",
    "precision": "auto",
    "threads": "",
    "cache_mb": "1024",
    "deadline": "30",
    "replicas": "1",
    "cpus": "1",
    "gpus": "0",
}
# Images that Ray remembers of a replica, for routing alone.
_REMEMBERED = 256


class Segmenter:
    """One replica.

    Args:
        options: as for :func:`app`.
    """

    def __init__(self, options: dict[str, str]) -> None:
        model = load_model(
            options["bundle"] or None,
            backend=options["backend"],
            device=options["device"],
            precision=options["precision"],
            threads=int(options["threads"]) if options["threads"] else None,
        )
        model.warm_up()
        self._service = Service(
            model,
            Limits(seconds=float(options["deadline"])),
            cache_bytes=int(options["cache_mb"]) << 20,
            cache_folder=options["cache_folder"],
        )

    @serve.multiplexed(max_num_models_per_replica=_REMEMBERED)  # type: ignore[untyped-decorator]
    async def _remember(self, image_id: str) -> str:
        """Let Ray know that this replica holds an image."""
        return image_id

    def check_health(self) -> None:
        """Ray asks this now and then, and replaces a replica that raises."""
        if not all(thread.is_alive() for thread in self._service.clicks.threads):
            raise RuntimeError("a thread that answers clicks has ended")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        application = create_app(self._service, api_key=os.environ.get("SAM3RT_API_KEY"))

        async def remembering(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and (image_id := serve.get_multiplexed_model_id()):
                await self._remember(image_id)
            await application(scope, receive, send)

        return remembering


def app(arguments: dict[str, str]) -> Any:
    """The application that ``serve run`` starts.

    Args:
        arguments: ``cache_folder``, which all replicas share, and what differs from the defaults
            of ``bundle``, ``backend``, ``device``, ``precision``, ``threads``, ``cache_mb``,
            ``deadline`` (seconds), ``replicas`` (a number, or ``auto`` for as many as the load
            asks for), and ``cpus`` and ``gpus`` of a replica. An API key comes from the variable
            ``SAM3RT_API_KEY``.

    Raises:
        InvalidInputError: ``cache_folder`` is missing, or an argument is unknown.
        BundleError: there is no such bundle.
    """
    unknown = set(arguments) - {*_DEFAULTS, "cache_folder"}
    if unknown or not arguments.get("cache_folder"):
        expected = f"cache_folder, and any of {', '.join(_DEFAULTS)}"
        raise InvalidInputError("arguments", ", ".join(sorted(arguments)) or "none", expected)
    options = _DEFAULTS | arguments
    # Replicas start in folders of their own.
    options["cache_folder"] = str(Path(options["cache_folder"]).absolute())
    if options["bundle"]:
        options["bundle"] = str(find_bundle(options["bundle"]).absolute())
    replicas = options["replicas"]
    return (
        serve.deployment(serve.ingress()(Segmenter))
        .options(
            name="sam3rt",
            num_replicas=replicas if replicas == "auto" else int(replicas),
            max_ongoing_requests=64,
            ray_actor_options={
                "num_cpus": float(options["cpus"]),
                "num_gpus": float(options["gpus"]),
            },
        )
        .bind(options)
    )
