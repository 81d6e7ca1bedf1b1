"""Hawthorn's front door: command line, engines, reports."""
