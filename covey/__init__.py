"""Covey serves language models to agents: programs, disaggregated inference, caches."""
