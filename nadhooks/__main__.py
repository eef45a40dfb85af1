"""`python -m nadhooks`."""

import sys

from .cli import main

sys.exit(main())
