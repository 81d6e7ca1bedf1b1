"""Certificates as files: a header that says what was certified and how, then one certificate per line."""
