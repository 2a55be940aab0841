"""``python -m localagg``: the same as the command ``localagg``."""

import sys

from .cli.main import main

sys.exit(main())
