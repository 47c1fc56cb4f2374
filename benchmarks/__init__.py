"""Benchmarks behind `covey bench`."""
