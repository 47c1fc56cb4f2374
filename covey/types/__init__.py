"""The vocabulary of Covey: every message of every contract, as frozen dataclasses. Mirrors `proto/`, one module a file."""
