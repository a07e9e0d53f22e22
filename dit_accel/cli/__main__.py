"""Lets ``python -m dit_accel.cli`` do what ``dit-accel`` does."""

import sys

from . import main

sys.exit(main())
