"""Run the command line by ``python -m localagg``."""

import sys

from .cli import main

sys.exit(main())
