"""The GPU runner: Triton kernels, a decoder that strings them together, and CUDA graphs for decode steps.

Importing this package imports neither torch nor Triton; `opening` says what is missing before anything else is loaded.
"""

from __future__ import annotations
