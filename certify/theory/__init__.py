"""Theorems of papers as code: constructions that can be run, and statements that can be checked, in float64."""
