"""From masks to a smaller model: plan, slice, compare with the masked one, describe for reloading."""
