"""``python -m hf_compress_cli``: the command without its script."""

import sys

from hf_compress_cli import main

sys.exit(main())
