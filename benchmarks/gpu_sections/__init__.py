"""The sections of ``benchmarks.gpu_evidence``; each runs in a process of its own."""
