"""Devices: the mesh, and which logical axis of an array lies on which of its axes."""
