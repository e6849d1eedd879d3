"""Entry point of ``bash scripts/demo``; everything happens in ``demo_run.py``."""

import logging
import warnings

NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "torch._inductor")
"""They warn about kernels for other hardware and about each other's deprecations."""


def main() -> None:
    """Quiet other packages, then import what they live in."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")
    import demo_run

    demo_run.main()


if __name__ == "__main__":
    main()
