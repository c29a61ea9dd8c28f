"""What the program does to files, processes, networks and the terminal; nothing here knows the method."""
