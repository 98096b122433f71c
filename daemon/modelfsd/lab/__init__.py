"""Whole clusters on one machine, to try things, to test and to show."""
