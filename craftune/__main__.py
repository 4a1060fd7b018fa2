"""`python -m craftune` is the command line."""

import sys

from craftune.cli import main

sys.exit(main())
