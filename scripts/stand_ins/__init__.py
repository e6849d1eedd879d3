"""Data sets and models that stand in for published ones where the Hub cannot be reached.

Everything comes from the Python Package Index and from Debian, is downloaded once, and lies in the cache of the demo.
"""
