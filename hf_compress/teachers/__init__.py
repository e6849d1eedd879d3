"""Teachers, and what they say: computed step by step, or written to disk once and read back in every epoch."""
