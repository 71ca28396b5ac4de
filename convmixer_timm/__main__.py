"""``python -m convmixer_timm``: the same as the ``convmixer-timm`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
