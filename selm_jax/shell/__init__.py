"""Files, processes, networks and the terminal; nothing here depends on the training method."""
