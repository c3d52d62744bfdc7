"""`python -m jaximm.cli`, the same as `jaximm`."""

import sys

from jaximm.cli import main

sys.exit(main())
