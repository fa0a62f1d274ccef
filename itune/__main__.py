"""`python -m itune` is the same as `itune`."""

import sys

from itune.cli import main

sys.exit(main())
