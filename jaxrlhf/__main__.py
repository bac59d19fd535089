"""``python -m jaxrlhf`` is the command ``jaxrlhf``."""

import sys

from jaxrlhf.apps.cli import main

sys.exit(main())
