"""One of two processes that meet at barriers; `test_watch` starts both.

The argument says what process 1 does then, while process 0 waits for it: it works, or it hangs.
"""

import signal
import sys
import time

from selm_jax.parallel import multihost
from selm_jax.shell.pace import here


def main(how: str) -> None:
    multihost.initialize()
    here.enter("iteration 1, train")
    multihost.barrier()
    print("met", flush=True)
    if multihost.index() == 1:
        {"works": work, "hangs": signal.pause}[how]()
    multihost.barrier()
    print("done", flush=True)


def work() -> None:
    """Takes longer than a process may be silent, and gives signs."""
    for _ in range(30):
        time.sleep(0.1)
        here.sign()


if __name__ == "__main__":
    main(sys.argv[1])
