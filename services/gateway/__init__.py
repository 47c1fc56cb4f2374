"""The gateway: the edge of the mesh, where requests become work for prefill and decode."""
