"""What processes of tests are forked from: everything slow is imported here once."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import deepspeed  # noqa: F401

import train  # noqa: F401
