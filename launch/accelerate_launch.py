"""`accelerate launch` with the same words, in a session of its own and without the tracebacks it adds to every failure.

In a session of its own, a Ctrl-C in the terminal reaches the script that started it and not the launcher, which would end
the run at once. A failure needs no more than exit code 1: train.py has said what there is to say.
"""

import logging
import os
import subprocess
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported, which would warn that it finds no GPU

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    os.setsid()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except (subprocess.CalledProcessError, ChildFailedError, SignalException):
        sys.exit(1)
