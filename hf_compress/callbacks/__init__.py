"""What a Trainer's events lead to: the only code that knows the Trainer."""
