"""Files, processes, networks and the terminal; nothing in this package knows the method."""
