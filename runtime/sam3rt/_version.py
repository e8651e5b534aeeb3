"""The distribution's version, read by pyproject.toml and by the runtime."""

__version__ = "0.1.0"
