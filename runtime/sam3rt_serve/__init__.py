"""Serving a model to many users: one image encoded once, then any number of clicks.

``core`` is the service itself, ``http`` offers it over HTTP, ``client`` is the other side.
"""
