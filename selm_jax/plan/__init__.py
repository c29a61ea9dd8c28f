"""`selm plan`: an experiment's programs compiled for devices that need not be here.

topology.py   what there is: generations of TPU, their memory and speed; the devices here
phases.py     the run's own programs, from settings and a config.json alone
measure.py    one program compiled: its memory on a device
work.py       tokens, arithmetic and hours of an iteration
remedies.py   what would make it fit, in the order in which it is tried
examine.py    all of it for one target
table.py, command.py   what is printed
"""
