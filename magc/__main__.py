"""``python -m magc`` is the command ``magc``."""

import sys

from magc.cli import main

sys.exit(main())
