"""The kernels, one concept a file, each with its torch reference of the same signature beside it."""

from __future__ import annotations
