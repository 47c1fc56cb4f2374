"""Everything that leaves the process: RPC over gRPC, control messages over NATS, and their in-process doubles."""
