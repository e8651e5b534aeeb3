"""The neck that SAM 3's image encoders end in, whatever trunk stands before it.

Its linear chains are folded (:mod:`.folding`), and its maps keep their channels last up to the
final convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..checkpoint_keys import DECODER, NECK, NO_MEMORY
from . import folding
from .operators import Linear, conv3x3, gelu, interleave_cells, regroup


class Sam3Neck(nn.Module):
    """The base of an encoder graph: trunk features to the three maps that the decoder reads.

    ``no_mem_embed`` and the decoder's ``conv_s0``/``conv_s1`` are already applied, as the
    reference predictor does once per image.

    Args:
        grid: side of the coarsest map, tokens.
        tensors: parameters in ``sam3.pt`` naming.
    """

    def __init__(self, grid: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.grid = grid

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return tensors[name + ".weight"], tensors[name + ".bias"]

        # Transposed convolutions act on channels-last maps: one matmul per cell.
        self.up0 = Linear(*folding.transposed_2x2_as_matrix(*pair(NECK + "0.dconv_2x2_0")))
        self.up0_second = Linear(
            *folding.transposed_2x2_as_matrix(
                *folding.pointwise_after_transposed(
                    *pair(NECK + "0.dconv_2x2_1"), *pair(NECK + "0.conv_1x1")
                )
            )
        )
        self.out0 = conv3x3(
            *folding.pointwise_after_conv(*pair(NECK + "0.conv_3x3"), *pair(DECODER + "conv_s0"))
        )
        self.up1 = Linear(
            *folding.transposed_2x2_as_matrix(
                *folding.pointwise_after_transposed(
                    *pair(NECK + "1.dconv_2x2"), *pair(NECK + "1.conv_1x1")
                )
            )
        )
        self.out1 = conv3x3(
            *folding.pointwise_after_conv(*pair(NECK + "1.conv_3x3"), *pair(DECODER + "conv_s1"))
        )
        weight, bias = pair(NECK + "2.conv_1x1")
        self.project2 = Linear(weight.flatten(1).T, bias)
        weight, bias = pair(NECK + "2.conv_3x3")
        self.out2 = conv3x3(weight, bias + tensors[NO_MEMORY].flatten())

    def to_grid(self, x: Tensor) -> Tensor:
        """Bring the trunk's [B, T, C] to [B, grid^2, C]. Trunks that differ in size override it.

        It runs after the first linear step of each level, with which it must commute.
        """
        return x

    def feature_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B, T, C] to float32 [B, 32, 4G, 4G], [B, 64, 2G, 2G], [B, 256, G, G].

        The channel counts are SAM 3's; G is the grid.
        """
        return self._level0(x), self._level1(x), self._level2(x)

    def _level0(self, x: Tensor) -> Tensor:
        y = interleave_cells(gelu(self.to_grid(self.up0(x))), self.grid)
        y = interleave_cells(self.up0_second(y), 2 * self.grid)
        return self._convolve(self.out0, y, 4 * self.grid)

    def _level1(self, x: Tensor) -> Tensor:
        y = interleave_cells(self.to_grid(self.up1(x)), self.grid)
        return self._convolve(self.out1, y, 2 * self.grid)

    def _level2(self, x: Tensor) -> Tensor:
        return self._convolve(self.out2, self.to_grid(self.project2(x)), self.grid)

    @staticmethod
    def _convolve(convolution: nn.Conv2d, pixels: Tensor, side: int) -> Tensor:
        """A convolution of [B, side^2, C], to [B, C', side, side]."""
        x = regroup(pixels, -1, side, side, convolution.in_channels)
        result: Tensor = convolution(x.permute(0, 3, 1, 2))
        return result
