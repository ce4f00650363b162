"""``python -m groupconv_ext``: the same as ``groupconv``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
