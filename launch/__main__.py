"""``python -m launch``."""

import signal
import sys

try:
    from launch.cli import main

    code = main()
except KeyboardInterrupt:  # while our own modules were imported
    code = 128 + signal.SIGINT
sys.exit(code)
