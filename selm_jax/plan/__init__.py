"""`selm plan`: compiles an experiment's programs for devices that this machine may not have.

topology.py   TPU generations, their memory and speed, and the local devices
phases.py     the programs of a run, built from its settings and the model's config.json
measure.py    compiles one program and measures its memory on a device
work.py       tokens, FLOPs and hours of an iteration
remedies.py   changes that may make an experiment fit, in the order in which they are tried
examine.py    the whole plan for one target
table.py, command.py   what `selm plan` prints
"""
