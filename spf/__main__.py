"""`python -m spf`: the `spf` command."""

import sys

from spf.cli import main

if __name__ == "__main__":
    sys.exit(main())
