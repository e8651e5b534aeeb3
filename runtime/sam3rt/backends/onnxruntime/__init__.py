"""The ONNX Runtime backend: CPU, or CUDA where onnxruntime-gpu finds a device.

``recipes`` says what it offers. On the CPU, ``backend`` runs two sessions. On CUDA they run in the
lanes that the TensorRT backend has too: see ``lanes``. Importing this package, or ``typed``, does
not import ONNX Runtime.
"""
