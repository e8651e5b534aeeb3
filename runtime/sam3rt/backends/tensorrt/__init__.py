"""The TensorRT backend, for the modules ``tensorrt`` and ``tensorrt_rtx``.

Both offer the same runtime API under two names. Engines are built beforehand by ``sam3rt build``;
here they are found, checked and run. Importing these modules imports neither TensorRT nor CUDA.

``offer`` is where loading begins, ``engines`` and ``sidecar`` say which engines fit,
``engine_backend`` loads a set of them, and ``backend`` runs it: through a ``lane`` of the ``pool``,
which drives ``trt`` and ``cuda``.
"""
