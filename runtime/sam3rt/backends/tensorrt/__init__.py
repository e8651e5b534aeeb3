"""The TensorRT backend, for the modules ``tensorrt`` and ``tensorrt_rtx``.

Both offer the same runtime API under two names. Engines are built beforehand by ``sam3rt build``;
here they are found, checked and run. Importing these modules imports neither TensorRT nor CUDA.

``offer`` loads engines; ``engines`` and ``sidecar`` say which ones fit. ``backend`` runs them,
through a ``lane`` of the ``pool``, which drives ``trt`` and ``cuda``. ``network`` holds the engines
and what lies where for them, ``runs`` divides calls among runs of the decoder, and ``memory`` owns
what embeddings and a lane's ``buffers`` take.
"""
