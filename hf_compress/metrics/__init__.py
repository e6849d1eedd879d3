"""Modules of the evaluate library that need no download."""
