"""The six services of the mesh; none imports another."""
