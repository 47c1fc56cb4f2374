"""The command line: `covey up`, `demo`, `chat`, `run`, `bench`, `doctor`."""
