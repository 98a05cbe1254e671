"""``python -m benchmarks.gpu``; ``--help`` lists the options."""

import signal
import sys

from benchmarks.gpu.kit import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what is running ends with it
    sys.exit(main())
