"""Faults of a deployment, one function each: every one takes a folder to work in and returns a `Row`."""
