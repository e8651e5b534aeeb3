"""The models to export, in PyTorch code that is not ours."""

from __future__ import annotations

from ..torchvision_operators import declare_missing_operators

# Both packages the oracles come from import torchvision wherever it is installed.
declare_missing_operators()
