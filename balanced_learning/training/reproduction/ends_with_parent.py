"""Becomes a program that gets SIGTERM when its parent PID ends, however: ends_with_parent.py PID PROGRAM WORD..."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux; elsewhere, the program goes on

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before it was asked
        sys.exit(f"{command[0]}: nobody is left who started it")
    os.execvp(command[0], command)  # noqa: S606
