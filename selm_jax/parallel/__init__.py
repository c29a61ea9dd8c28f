"""Parallelism: the device mesh, sharding rules, and the coordination of several processes."""
