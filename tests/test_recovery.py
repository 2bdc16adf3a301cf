"""Killed at any point, the next start finishes what was decided and starts again what was not.

The command is killed by itself (SIGKILL) at a chosen audit event: a file opened for writing, a
rename, a child process. The agents are not killed: ending them is the next start's duty.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HANG = {"announce": True, "hang": True}
IN_BUILD = "in_progress phase=build phase_pool=main"
RECOVERED = "[orchestrator] Recover backlog state"

# Writes one line per event to `events`, and kills the process at the event whose number is wanted.
WATCH = """
count = 0
def describe(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and isinstance(args[0], str):
        return "open " + args[0]
    if event == "os.rename":
        return "rename " + str(args[1])
    if event == "subprocess.Popen":
        words = [os.fsdecode(word) for word in args[1]]
        return "start " + " ".join(words)
def watch(event, args):
    global count
    if event not in ("open", "os.rename", "subprocess.Popen"):
        return
    said = describe(event, args)
    if said is None or "/null" in said or "/dev/" in said or ".pyc" in said or not OUTSIDE in os.getcwd():
        return
    count += 1
    if count == AT:
        os.kill(os.getpid(), signal.SIGKILL)
    if not AT:
        handle = os.open(OUTSIDE + "/events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, said.replace("\\n", " ").encode() + b"\\n")
        os.close(handle)
"""


def inject(project: Any, at: int) -> None:
    project.inject(f"AT = {at}\nOUTSIDE = {str(project.outside)!r}\n{WATCH.replace('not AT:', 'not AT and not said.endswith(chr(47) + chr(101) + chr(118) + chr(101) + chr(110) + chr(116) + chr(115)):')}")
