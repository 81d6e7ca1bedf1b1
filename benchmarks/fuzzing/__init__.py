"""Kinds of bad input, a file each: every function makes one case from a generator of numbers and judges it."""
