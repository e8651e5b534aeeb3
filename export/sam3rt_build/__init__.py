"""From a bundle to engines that have proved themselves: typed graphs, builds and the gate.

Nothing here imports PyTorch: engines are built on the machine that runs them, and an edge box has
none.
"""

from __future__ import annotations

# It keeps ONNX Runtime from reporting, which asks when it is imported.
import sam3rt.backends  # noqa: F401
