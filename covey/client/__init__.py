"""The SDK: semantic functions, workflows and tools over gRPC; needs neither torch nor NATS."""
