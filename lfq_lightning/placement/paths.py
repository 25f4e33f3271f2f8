"""Paths from one module of a model to another, which stay true when both are moved into a larger model."""

from __future__ import annotations

import posixpath


def path_between(start: str, end: str) -> str:
    """The way from one dotted name to another, such as `../key`; `.` where they are one."""
    return posixpath.relpath(_absolute(end), _absolute(start))


def follow(start: str, path: str) -> str:
    """The dotted name to which `path_between` leads from another."""
    return posixpath.normpath(posixpath.join(_absolute(start), path)).strip("/").replace("/", ".")


def _absolute(name: str) -> str:
    return f"/{name.replace('.', '/')}"
