"""The ``hf-compress`` command as it is installed.

A package of its own, since importing anything of ``hf_compress`` loads PyTorch and Transformers, for which nobody wants
to wait who asks for help or has misspelled an option.
"""

import logging
from collections.abc import Sequence

from hf_compress_cli.parser import make_parser

_NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, whenever Transformers is imported, of what no user of this command can change."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, then load what carries it out.

    Args:
        arguments: What to parse; the process's own arguments by default.

    Returns:
        The exit code, see ``hf_compress.cli.main``.
    """
    given = make_parser().parse_args(arguments)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from hf_compress.cli import execute

    return execute(given)
