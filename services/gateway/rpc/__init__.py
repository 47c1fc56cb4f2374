"""The gRPC edge: Inference and Programs."""
