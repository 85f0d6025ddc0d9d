"""Rows on their way to disk: the part files that a pass writes and others read while it runs."""
