"""The other side of ``sam3rt serve``, on what the runtime needs anyway."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import struct
import urllib.parse
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sam3rt.arguments import file_path
from sam3rt.embedding import ImageEmbedding
from sam3rt.errors import InvalidInputError, Sam3rtError


class ServerError(Sam3rtError):
    """The server refused a request.

    Attributes:
        status: of HTTP, such as 404 for an image that has to be sent again, or 429.
        kind: the class of what is wrong, such as ``"UnknownImageError"``.
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"{message} ({kind}, status {status})")
        self.status = status
        self.kind = kind


class RemoteMasks(NamedTuple):
    """What the server found of one object.

    Attributes:
        masks: bool [C, H, W] of the image's size.
        scores: predicted IoUs, float32 [C].
        refined: whether the session's earlier mask of this object was a prompt too.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    refined: bool


class Client:
    """A connection to a server, for one thread at a time. Usable in a ``with`` statement.

    Args:
        url: where the server is.
        api_key: what it asks for, if anything.
        timeout: longest silence of the server, seconds.

    Raises:
        InvalidInputError: the URL is not one of HTTP or HTTPS.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            if not parts.hostname:
                raise ValueError("no host")
            kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            self._connection = kind[parts.scheme](parts.hostname, parts.port, timeout=timeout)
        except (KeyError, ValueError, http.client.InvalidURL) as error:
            raise InvalidInputError(
                "url", repr(url), "http://HOST:PORT or https://HOST:PORT"
            ) from error
        self._root = parts.path.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The next call opens it again."""
        self._connection.close()

    def add_image(
        self, image: bytes | str | os.PathLike[str], image_id: str | None = None
    ) -> dict[str, Any]:
        """Send a JPEG or PNG file, as a path or its content.

        Args:
            image: the file.
            image_id: what to call it; a hash of its content by default.

        Returns:
            ``image_id``, ``height``, ``width``, ``cached`` and ``milliseconds``.

        Raises:
            InvalidInputError: ``image`` is neither.
            ServerError: the server refused it.
            OSError: the file cannot be read, or the server cannot be reached.
        """
        content = image if isinstance(image, bytes) else file_path("image", image).read_bytes()
        method, path = ("POST", "/v1/images") if image_id is None else ("PUT", _path(image_id))
        return self._document(method, path, content, "image/*")

    def segment(
        self,
        image_id: str,
        objects: Sequence[Mapping[str, Any]],
        multimask: bool = True,
        session: str | None = None,
    ) -> list[RemoteMasks]:
        """Masks of objects.

        Args:
            image_id: of an image that was sent.
            objects: each with ``points``, ``labels`` (1 for all where they are left out), ``box``.
            multimask: three masks of each object, or the best one.
            session: lets each object's earlier mask be a prompt too.

        Raises:
            ServerError: the server refused it; status 404 asks for the image (again).
            OSError: the server cannot be reached.
        """
        question: dict[str, Any] = {"objects": list(objects), "multimask": multimask}
        if session is not None:
            question["session"] = session
        content = json.dumps(question, default=_plain).encode()
        answer = self._document("POST", _path(image_id, "masks"), content, "application/json")
        return [
            RemoteMasks(
                _unpack(one["masks"]),
                np.array(one["scores"], np.float32),
                one["refined"],
            )
            for one in answer["objects"]
        ]

    def embedding(self, image_id: str) -> ImageEmbedding:
        """An image's embedding, for a decoder in this process.

        Raises:
            ServerError: the server refused it.
            EmbeddingError: what came is damaged.
            OSError: the server cannot be reached.
        """
        return ImageEmbedding.from_bytes(self._call("GET", _path(image_id, "embedding")))

    def remove_image(self, image_id: str) -> None:
        """Let the server forget an image.

        Raises:
            ServerError: it does not know the image.
            OSError: the server cannot be reached.
        """
        self._call("DELETE", _path(image_id))

    def model(self) -> dict[str, Any]:
        """What is served: name, family, sizes, fingerprint, backend, precision and limits."""
        return self._document("GET", "/v1/model")

    def _document(self, *request: Any) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._call(*request))
        return document

    def _call(
        self, method: str, path: str, content: bytes | None = None, media_type: str = ""
    ) -> bytes:
        headers = self._headers | ({"Content-Type": media_type} if media_type else {})
        if path.count("/") > 2:  # lets Ray Serve choose a replica that holds the image
            headers["serve_multiplexed_model_id"] = path.split("/")[3]
        was_open = self._connection.sock is not None
        try:
            self._connection.request(method, self._root + path, content, headers)
            response = self._connection.getresponse()
            body: bytes = response.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.close()
            if not was_open:
                raise
            # The server closed a connection that nobody used for a while.
            return self._call(method, path, content, media_type)
        except BaseException as error:  # half an exchange would answer the next call
            self.close()
            if isinstance(error, http.client.HTTPException):
                raise ConnectionError(f"the answer was cut, or is not HTTP: {error!r}") from error
            raise
        if response.status >= 300:
            try:
                problem = json.loads(body)
                raise ServerError(response.status, problem["kind"], problem["error"])
            except (ValueError, KeyError, TypeError):  # something in between answered
                raise ServerError(response.status, "HTTPError", response.reason) from None
        return body


def _path(image_id: str, *further: str) -> str:
    return "/".join(["/v1/images", urllib.parse.quote(image_id, safe=""), *further])


def _plain(value: Any) -> Any:
    """Arrays and numbers of NumPy as JSON has them."""
    return np.asarray(value).tolist()


def _unpack(files: Sequence[str]) -> NDArray[np.bool_]:
    """Masks out of PNG files of one size."""
    contents = [base64.b64decode(file) for file in files]
    (width,) = struct.unpack_from(">I", contents[0], 16)
    return np.unpackbits(np.stack([*map(_bits, contents)]), axis=2, count=width).view(np.bool_)


def _bits(content: bytes) -> NDArray[np.uint8]:
    """The rows of a PNG file as bits, uint8 [H, W / 8]; the server's own faster than Pillow."""
    _, height, depth, colour, *_ = struct.unpack_from(">IIBBBBB", content, 16)
    length, kind = struct.unpack_from(">I4s", content, 33)
    if (depth, colour, kind) == (1, 0, b"IDAT") and len(content) == length + 57:
        rows = np.frombuffer(zlib.decompress(content[41:-16]), np.uint8).reshape(height, -1)
        if not rows[:, 0].any():  # no filter
            return rows[:, 1:]
    with PIL.Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.packbits(np.asarray(image), axis=1)
