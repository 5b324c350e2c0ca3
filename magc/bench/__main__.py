"""``python -m magc.bench`` is ``magc bench``, without its one-line errors."""

import sys

from magc.bench import main

sys.exit(main())
