"""Run a command on a pseudo-terminal and return what it writes there."""

import os
import pty
import subprocess


def run_on_terminal(command, *, environment, redirect_stdout=False):
    """Return (display, stdout) as bytes; stdout is empty unless it is redirected. The command must succeed."""
    pty_fd, child_fd = pty.openpty()
    stdout = subprocess.PIPE if redirect_stdout else child_fd
    process = subprocess.Popen(command, stdin=child_fd, stdout=stdout, stderr=child_fd, env=os.environ | environment)
    os.close(child_fd)
    display = b""
    while True:
        try:
            part = os.read(pty_fd, 65536)
        except OSError:  # the command has closed its end
            break
        if not part:
            break
        display += part
    os.close(pty_fd)
    piped = b""
    if redirect_stdout:
        with process.stdout:
            piped = process.stdout.read()
    assert process.wait(30) == 0, display.decode()
    return display, piped
