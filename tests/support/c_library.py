"""The C interface through ctypes: what any language that can call C sees."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_ssize_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATUS = (
    "OK",
    "INVALID_INPUT",
    "IMAGE_ERROR",
    "PROMPT_ERROR",
    "STATE_ERROR",
    "BUNDLE_ERROR",
    "EMBEDDING_ERROR",
    "BACKEND_ERROR",
    "IO_ERROR",
    "OUT_OF_MEMORY",
    "INTERNAL_ERROR",
    "CANCELLED",
)


class ArrayView(ctypes.Structure):
    """``sam3rt_float_array`` and its likes, which differ only in the type of the values."""

    _fields_ = [("values", c_void_p), ("shape", c_int64 * 4), ("axes", c_int32)]


class Image(ctypes.Structure):
    """``sam3rt_image``."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("pixels", c_void_p),
        ("height", c_int64),
        ("width", c_int64),
        ("row_stride", c_ssize_t),
        ("format", c_int32),
        ("plane_stride", c_size_t),
        ("on_device", c_int32),
        ("stream", c_void_p),
    ]


class Prompts(ctypes.Structure):
    """``sam3rt_prompts``."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("point_coords", ArrayView),
        ("point_labels", ArrayView),
        ("box", ArrayView),
        ("mask_input", ArrayView),
        ("coords_are_normalized", c_int32),
        ("point_counts", ArrayView),
    ]


class ModelOptions(ctypes.Structure):
    """``sam3rt_model_options``."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("device", c_char_p),
        ("threads", c_int32),
        ("skip_file_checks", c_int32),
        ("expected_fingerprint", c_char_p),
        ("engine_folder", c_char_p),
        ("concurrent_encodes", c_int32),
        ("concurrent_decodes", c_int32),
        ("map_weights", c_int32),
        ("provider_options", c_void_p),
        ("provider_option_count", c_size_t),
        ("thread_affinities", c_char_p),
        ("spin_between_runs", c_int32),
        ("no_memory_arena", c_int32),
        ("environment_allocators", c_int32),
    ]


class File(ctypes.Structure):
    """``sam3rt_file``."""

    _fields_ = [("name", c_char_p), ("content", c_void_p), ("size", c_size_t)]


class Option(ctypes.Structure):
    """``sam3rt_option``."""

    _fields_ = [("name", c_char_p), ("value", c_char_p)]


class PredictorOptions(ctypes.Structure):
    """``sam3rt_predictor_options``."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("mask_threshold", c_double),
        ("max_hole_area", c_double),
        ("has_max_hole_area", c_int32),
        ("max_sprinkle_area", c_double),
    ]


class PredictOptions(ctypes.Structure):
    """``sam3rt_predict_options``."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("single_mask", c_int32),
        ("return_logits", c_int32),
        ("best_mask_only", c_int32),
        ("foreground", c_int32),
        ("cancellation", c_void_p),
        ("mask_form", c_int32),
        ("output", c_void_p),
        ("output_size", c_size_t),
        ("output_on_device", c_int32),
        ("stream", c_void_p),
    ]


LogCallback = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)
_TEXTS = (
    "version",
    "error_message",
    "error_subject",
    "model_device",
    "model_name",
    "model_fingerprint",
    "model_type",
    "model_path",
    "model_manifest_json",
    "prediction_rle",
    "prediction_warning",
    "embedding_fingerprint",
    "maps_name",
    "report_explanation",
    "report_case",
    "report_output",
    "report_metric",
    "health_problem",
    "health_backend",
    "health_device",
    "health_precision",
    "health_fingerprint",
)
_SIZES = ("buffer_size", "prediction_rle_count", "embedding_nbytes", "maps_count", "report_count")
_NUMBERS = ("report_value", "report_limit", "health_encode_seconds", "health_decode_seconds")


class Sam3rtError(Exception):
    """A call's error.

    Args:
        status: its name, without the prefix.
        message: for people.
        subject: the argument or file at fault.
    """

    def __init__(self, status: str, message: str, subject: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.subject = status, message, subject


class Library:
    """The shared library, loaded.

    Args:
        builds: the folder ``make test-cpp`` builds to.
    """

    def __init__(self, builds: Path) -> None:
        # Loaded first, so that the dynamic linker finds it by its name.
        self._runtime = ctypes.CDLL(str(builds / "dependencies" / "lib" / "libonnxruntime.so.1"))
        self.c = ctypes.CDLL(str(builds / "install" / "lib" / "libsam3rt.so"))
        for name in _TEXTS:
            getattr(self.c, f"sam3rt_{name}").restype = c_char_p
        self.c.sam3rt_buffer_data.restype = c_void_p
        for name in _SIZES:
            getattr(self.c, f"sam3rt_{name}").restype = c_size_t
        for name in _NUMBERS:
            getattr(self.c, f"sam3rt_{name}").restype = c_double
        self.c.sam3rt_maps_values.restype = ArrayView
        for name in ("masks", "logits", "iou", "low_res", "object_scores"):
            function = getattr(self.c, f"sam3rt_prediction_{name}")
            function.restype, function.argtypes = ArrayView, [c_void_p]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function whose last parameter is the error.

        Raises:
            Sam3rtError: it failed.
        """
        error = c_void_p()
        status = getattr(self.c, f"sam3rt_{name}")(*arguments, byref(error))
        if status == 0:
            assert not error
            return
        assert self.c.sam3rt_error_status(error) == status
        message = self.c.sam3rt_error_message(error).decode()
        subject = self.c.sam3rt_error_subject(error).decode()
        self.c.sam3rt_error_free(error)
        raise Sam3rtError(STATUS[status], message, subject)

    def make(self, name: str, *arguments: Any) -> c_void_p:
        """Call a function that stores a new object."""
        made = c_void_p()
        self.call(name, *arguments, byref(made))
        assert made
        return made

    def load(self, bundle: Path, **options: Any) -> c_void_p:
        """A model."""
        given = ModelOptions(ctypes.sizeof(ModelOptions), **{"device": b"cpu", **options})
        return self.make("model_load", str(bundle).encode(), byref(given))

    def cancellation(self, seconds: float) -> c_void_p:
        """What ends calls at a time, or with 0 only when it is told to."""
        return self.make("cancellation_new", c_double(seconds))

    def taken(self, buffer: c_void_p) -> bytes:
        """The content of a buffer, which is freed."""
        content = ctypes.string_at(
            self.c.sam3rt_buffer_data(buffer), self.c.sam3rt_buffer_size(buffer)
        )
        self.c.sam3rt_buffer_free(buffer)
        return content

    def encode(self, model: c_void_p, pixels: NDArray[np.uint8]) -> c_void_p:
        """An image's embedding."""
        return self.make("model_encode", model, byref(image(pixels)))

    def maps(self, embedding: c_void_p) -> dict[str, NDArray[np.float32]]:
        """Copies of an embedding's feature maps, by name."""
        maps = self.make("embedding_maps", embedding)
        found = {}
        for number in range(self.c.sam3rt_maps_count(maps)):
            index = c_size_t(number)
            values = copied(self.c.sam3rt_maps_values(maps, index), np.float32)
            found[self.c.sam3rt_maps_name(maps, index).decode()] = values
        self.c.sam3rt_maps_free(maps)
        return found

    def predictor(self, model: c_void_p, **options: float) -> c_void_p:
        """A predictor with a Python predictor's keyword arguments."""
        given = PredictorOptions(
            ctypes.sizeof(PredictorOptions),
            has_max_hole_area=int("max_hole_area" in options),
            **options,
        )
        return self.make("predictor_new", model, byref(given))

    def predict(
        self, predictor: c_void_p, arguments: dict[str, Any]
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
        """Masks or logits, IoUs and low-resolution logits for a Python call's arguments."""
        given = prompts(arguments)
        options = PredictOptions(
            ctypes.sizeof(PredictOptions),
            int(not arguments.get("multimask_output", True)),
            int(arguments.get("return_logits", False)),
        )
        prediction = self.make("predictor_predict", predictor, byref(given), byref(options))
        try:
            return self.arrays(prediction, bool(options.return_logits))
        finally:
            self.c.sam3rt_prediction_free(prediction)

    def predict_batch(
        self, predictor: c_void_p, arguments: list[dict[str, Any]]
    ) -> list[tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]]:
        """What :meth:`predict` returns, for each image of a batch; the first call's options."""
        given = [prompts(call) for call in arguments]
        pointers = (ctypes.POINTER(Prompts) * len(given))(*map(ctypes.pointer, given))
        options = PredictOptions(
            ctypes.sizeof(PredictOptions),
            int(not arguments[0].get("multimask_output", True)),
            int(arguments[0].get("return_logits", False)),
        )
        made = (c_void_p * len(given))()
        count = c_size_t(len(given))
        self.call("predictor_predict_batch", predictor, pointers, count, byref(options), made)
        try:
            return [self.arrays(c_void_p(one), bool(options.return_logits)) for one in made]
        finally:
            for one in made:
                self.c.sam3rt_prediction_free(c_void_p(one))

    def arrays(
        self, prediction: c_void_p, logits: bool = False
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
        """Copies of a prediction's arrays."""
        masks = self.c.sam3rt_prediction_masks(prediction)
        whole = self.c.sam3rt_prediction_logits(prediction)
        assert (masks.axes == 0) == logits == (whole.axes != 0)
        return (
            copied(whole, np.float32) if logits else copied(masks, np.uint8),
            copied(self.c.sam3rt_prediction_iou(prediction), np.float32),
            copied(self.c.sam3rt_prediction_low_res(prediction), np.float32),
        )


def image(pixels: NDArray[np.uint8]) -> Image:
    """A view of an image, which it keeps alive."""
    pixels = np.ascontiguousarray(pixels)
    view = Image(ctypes.sizeof(Image), pixels.ctypes.data, pixels.shape[0], pixels.shape[1], 0)
    view.keep = pixels
    return view


def memory_files(contents: Mapping[str, bytes | None]) -> tuple[Any, list[Any]]:
    """An array of ``sam3rt_file``, and the memory that it points to; ``None`` for no content."""
    files = (File * len(contents))()
    kept = []
    for file, (name, content) in zip(files, contents.items(), strict=True):
        file.name, file.size = name.encode(), 1
        if content is not None:
            buffer = ctypes.create_string_buffer(content, len(content))
            file.content, file.size = ctypes.addressof(buffer), len(content)
            kept.append(buffer)
    return files, kept


def prompts(arguments: dict[str, Any]) -> Prompts:
    """Prompts for a Python call's arguments, which they keep alive."""
    result = Prompts(ctypes.sizeof(Prompts))
    result.keep = []
    for name in ("point_coords", "point_labels", "point_counts", "box", "mask_input"):
        if arguments.get(name) is None:
            continue
        array = np.asarray(
            arguments[name],
            np.int64 if name in ("point_labels", "point_counts") else np.float32,
            order="C",
        )
        result.keep.append(array)
        padded = (*array.shape, *(0,) * (4 - array.ndim))
        view = ArrayView(array.ctypes.data, (c_int64 * 4)(*padded), array.ndim)
        setattr(result, name, view)
    result.coords_are_normalized = int(not arguments.get("normalize_coords", True))
    return result


def copied(view: ArrayView, dtype: Any) -> NDArray[Any]:
    """A copy of an array that the library owns."""
    shape = tuple(view.shape[: view.axes])
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(view.values, size), dtype).reshape(shape)
