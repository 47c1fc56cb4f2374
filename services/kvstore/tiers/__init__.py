"""Where blocks lie below memory: a disk of this node's own, and an engine that a fleet shares."""
