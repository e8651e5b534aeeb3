"""What runs in Triton's Python backend: one of the four models that ``sam3rt triton`` writes.

Each instance is a process of its own. Embeddings go from the one that encodes to those that decode
as files in a shared folder, once per image, and stay in each process's memory then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt import load_model
from sam3rt.embedding_cache import CacheFullError
from sam3rt.errors import BackendError, InvalidInputError, PromptError

from .core import ObjectMasks, ObjectPrompt, Service
from .errors import BusyError, DeadlineError, TooLargeError, UnknownImageError
from .limits import WARM_UP, Limits

_POLL = 0.1  # how often a request that is being answered is asked whether it was cancelled, seconds


class Model:
    """One instance.

    Args:
        args: what Triton gives to ``initialize``.
        utilities: the module ``triton_python_backend_utils``.
    """

    def __init__(self, args: dict[str, str], utilities: Any) -> None:
        self._triton = utilities
        parameters = json.loads(args["model_config"])["parameters"]
        options = json.loads(parameters["options"]["string_value"])
        role = options["role"]
        self._start: Callable[[Any], Callable[[], dict[str, NDArray[Any]]]] = getattr(
            self, f"_{role}"
        )
        device = options["device"]
        if args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        model = load_model(
            options["bundle"],
            backend=options["backend"],
            device=device,
            precision=options["precision"],
            threads=options["threads"],
        )
        model.warm_up()
        self._service = Service(
            model,
            Limits(**options["limits"]),
            cache_bytes=options["cache_bytes"],
            cache_folder=options["cache_folder"],
        )
        if role == "decode":
            self._service.add_image(np.zeros((8, 8, 3), np.uint8), WARM_UP).result()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that Triton has put together."""
        started = [self._guarded(partial(self._start, request)) for request in requests]
        return [
            self._response(answer if isinstance(answer, Exception) else self._guarded(answer))
            for answer in started
        ]

    def finalize(self) -> None:
        """Triton unloads the model."""
        self._service.close()

    # --- the four models -------------------------------------------------------------------------

    def _encode(self, request: Any) -> Callable[[], dict[str, NDArray[Any]]]:
        image_id = self._text(request, "image_id")
        future = self._service.add_image(
            self._image(request), image_id, deadline=self._deadline(request)
        )

        def answer() -> dict[str, NDArray[Any]]:
            stored = self._result(request, future)
            name = np.array([stored.image_id.encode()], np.object_)
            return {"image_id": name, "size": np.array(stored.size, np.int32)}

        return answer

    def _session(self, request: Any) -> Callable[[], dict[str, NDArray[Any]]]:
        session = str(request.correlation_id())
        if request.flags() & self._triton.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self._service.forget_session(session)
        return self._decode(request, session)

    def _decode(
        self, request: Any, session: str | None = None
    ) -> Callable[[], dict[str, NDArray[Any]]]:
        image_id = self._text(request, "image_id", batched=True)
        if image_id is None:
            raise InvalidInputError("image_id", "nothing", "the id that sam3rt_encode gave")
        future = self._click(request, image_id, session, batched=True)

        def answer() -> dict[str, NDArray[Any]]:
            arrays = _arrays(self._result(request, future))
            return {name: array[None] for name, array in arrays.items()}

        return answer

    def _segment(self, request: Any) -> Callable[[], dict[str, NDArray[Any]]]:
        future = self._service.add_image(self._image(request), deadline=self._deadline(request))

        def answer() -> dict[str, NDArray[Any]]:
            image_id = self._result(request, future).image_id
            return _arrays(self._result(request, self._click(request, image_id)))

        return answer

    # --- tensors ----------------------------------------------------------------------------------

    def _click(
        self, request: Any, image_id: str, session: str | None = None, batched: bool = False
    ) -> Future[Any]:
        points = self._input(request, "points", batched)
        labels = self._input(request, "labels", batched)
        boxes = self._input(request, "boxes", batched)
        multimask = self._input(request, "multimask", batched)
        if points is None and boxes is None:
            raise PromptError("points", "neither points nor boxes", "one of them, or both")
        if (points is None) != (labels is None) or (
            points is not None and labels is not None and labels.shape != points.shape[:2]
        ):
            raise PromptError("labels", "other objects and points", "one label per point")
        counts = {len(array) for array in (points, boxes) if array is not None}
        if len(counts) > 1:
            raise PromptError("boxes", f"{counts} objects", "as many boxes as objects with points")
        objects = [
            ObjectPrompt(
                [] if points is None else points[number].tolist(),
                [] if labels is None else labels[number].tolist(),
                None if boxes is None else boxes[number].tolist(),
            )
            for number in range(counts.pop())
        ]
        return self._service.segment(
            image_id,
            objects,
            True if multimask is None else bool(multimask[0]),
            session=session,
            deadline=self._deadline(request),
        )

    def _image(self, request: Any) -> bytes | NDArray[np.uint8]:
        file, pixels = self._input(request, "image"), self._input(request, "pixels")
        if (file is None) == (pixels is None):
            raise InvalidInputError("image", "both or none", "a file as image, or pixels")
        if file is not None:
            return file.tobytes()
        assert pixels is not None
        return pixels

    def _input(self, request: Any, name: str, batched: bool = False) -> NDArray[Any] | None:
        tensor = self._triton.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        array: NDArray[Any] = tensor.as_numpy()
        if array.size > 1 and not any(array.strides):
            raise BackendError(
                "what the server gave is no array: its Python backend was built for NumPy 1, so "
                "the packages that model.py names need numpy<2"
            )
        if batched and len(array) != 1:
            raise InvalidInputError(name, f"a batch of {len(array)}", "1; objects are an axis")
        return array[0] if batched else array

    def _text(self, request: Any, name: str, batched: bool = False) -> str | None:
        array = self._input(request, name, batched)
        return None if array is None else str(array[0].decode(errors="replace"))

    def _deadline(self, request: Any) -> float | None:
        """By ``time.monotonic``, where the client set a timeout."""
        microseconds: int = request.timeout()
        return time.monotonic() + microseconds * 1e-6 if microseconds else None

    # --- answers ----------------------------------------------------------------------------------

    def _result(self, request: Any, future: Future[Any]) -> Any:
        while True:
            try:
                return future.result(_POLL)
            except TimeoutError:
                if future.done():
                    raise
                if request.is_cancelled() and future.cancel():
                    raise DeadlineError("the request was cancelled") from None

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # one request's; the others are answered
            return error

    def _response(self, answer: Any) -> Any:
        if not isinstance(answer, Exception):
            tensors = [self._triton.Tensor(name, array) for name, array in answer.items()]
            return self._triton.InferenceResponse(output_tensors=tensors)
        kinds = self._triton.TritonError
        code = next(getattr(kinds, code) for known, code in _CODES if isinstance(answer, known))
        message = f"{type(answer).__name__}: {answer}"
        return self._triton.InferenceResponse(error=kinds(message, code))


_CODES: tuple[tuple[type[Exception], str], ...] = (
    (UnknownImageError, "NOT_FOUND"),
    (BusyError, "UNAVAILABLE"),
    (CacheFullError, "UNAVAILABLE"),
    (DeadlineError, "CANCELLED"),
    (TooLargeError, "INVALID_ARG"),
    (InvalidInputError, "INVALID_ARG"),
    (Exception, "INTERNAL"),
)


def _arrays(found: list[ObjectMasks]) -> dict[str, NDArray[Any]]:
    """Bool [P, C, H, W], float32 [P, C] and float32 [P, C, h, w]."""
    return {
        "masks": np.stack([one.masks for one in found]),
        "scores": np.stack([one.scores for one in found]),
        "low_res_masks": np.stack([one.low_res_masks for one in found]),
    }
