"""`python -m packattn`."""

import sys

from packattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
