"""Canaries: which version answers, what both sides show, and when that decides."""
