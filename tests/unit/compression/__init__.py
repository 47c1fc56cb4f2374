"""Tests of the codecs of stored blocks."""
