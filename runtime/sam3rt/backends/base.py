"""What a backend must offer. A backend runs the two graphs of one bundle on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..features import DeviceArray
from ..geometry import ImageGeometry
from ..prompts import PackedPrompts


class Features(Protocol):
    """One image's feature maps, wherever the backend keeps them."""

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first."""


class Backend(Protocol):
    """Runs encoder and decoder. Every method may be called from many threads at once."""

    @property
    def name(self) -> str:
        """Such as ``"onnxruntime"``."""

    @property
    def device(self) -> str:
        """Such as ``"cpu"`` or ``"cuda:0"``."""

    @property
    def precision(self) -> str:
        """What it computes in, such as ``"fp32"`` or the name of a precision recipe."""

    def encode(self, pixels: NDArray[np.float32]) -> Features:
        """Run the encoder on float32 [1, 3, H, W]; the features stay on the device."""

    def decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Run the decoder and bring the named outputs to the host, in the order asked for."""

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> Features:
        """Bring feature maps, float32 [1, C, h, w] each, to the device."""

    def prepare(self) -> None:
        """Load both graphs now instead of at their first use."""

    def versions(self) -> dict[str, str]:
        """Versions of what the backend is made of."""


@runtime_checkable
class ExportableFeatures(Protocol):
    """Features that other libraries can read where they lie."""

    def arrays(self) -> tuple[DeviceArray, ...]:
        """The maps in their own type, [1, C, h, w] each, finest map first."""


@runtime_checkable
class ImagingBackend(Protocol):
    """A backend that can also do on its device what surrounds the two graphs.

    Whether it does depends on the image's size; where it does not, the host does.
    """

    def preprocesses(self, place: ImageGeometry) -> bool:
        """Whether :meth:`encode_image` takes images of that size."""

    def encode_image(self, image: NDArray[np.uint8], place: ImageGeometry) -> Features:
        """Preprocess uint8 [H, W, 3] and run the encoder."""

    def upsamples(self, place: ImageGeometry) -> bool:
        """Whether :meth:`decode_masks` and :meth:`upsample` make masks of that size."""

    def decode_masks(
        self,
        features: Features,
        prompts: PackedPrompts,
        outputs: Sequence[str],
        place: ImageGeometry,
        threshold: float,
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8]]:
        """Run the decoder, and upsample and threshold its first output.

        Returns:
            The named outputs, and masks, uint8 [P, C, H, W] of 0 and 1.
        """

    def upsample(
        self, logits: NDArray[np.float32], place: ImageGeometry, threshold: float
    ) -> NDArray[np.uint8]:
        """Upsample and threshold float32 [P, C, h, w] to uint8 [P, C, H, W] of 0 and 1."""
