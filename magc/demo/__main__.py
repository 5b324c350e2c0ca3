"""``python -m magc.demo`` is ``magc demo``."""

import sys

from magc.demo import main

sys.exit(main())
