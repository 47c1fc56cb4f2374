"""Pure decisions without I/O, clock or randomness of their own.

Live services, property tests and the simulator run the same classes.
"""
