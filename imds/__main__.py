"""``python -m imds`` is ``imds-router``."""

import sys

from imds.supervisor import main

sys.exit(main())
