"""`python -m vl_dist COMMAND`."""

import sys

from vl_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
