"""`python -m jaximm.cli`, the same as `jaximm`."""

import sys

from jaximm.cli import main

if __name__ == "__main__":
    sys.exit(main())
