"""The cache of answers: equal requests first, then, in categories that a configuration switches on, similar ones."""
