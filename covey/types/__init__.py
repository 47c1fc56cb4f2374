"""The vocabulary of Covey: every message of every contract, as frozen dataclasses; mirrors `proto/`."""
