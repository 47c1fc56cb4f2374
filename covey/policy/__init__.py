"""Pure decisions: no I/O, no clock, no randomness of their own; live services, property tests and the simulator run the same classes."""
