"""Durable runs of workflows over the gateway's programs and attached tools."""
