"""``python -m launch``."""

import signal
import sys

# While our own modules are imported Ctrl-C just ends the process: a KeyboardInterrupt in the middle of an import may be
# swallowed. One that was ignored from the start stays ignored.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from launch.cli import main

if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    code = main()
except KeyboardInterrupt:
    code = 128 + signal.SIGINT
sys.exit(code)
