"""`python -m jobs STAGE ...`: the console script `beit`, where nothing is installed."""

import sys

from jobs.cli import main

sys.exit(main())
