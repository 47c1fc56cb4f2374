"""Kernels in C++ for x86 processors; `covey.model.layers` computes the same with torch."""
