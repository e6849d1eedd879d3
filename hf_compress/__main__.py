"""``python -m hf_compress``: the same as the command ``hf-compress``."""

import sys

from hf_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
