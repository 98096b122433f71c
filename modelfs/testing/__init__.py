"""Supported fakes and contract suites, for the tests of whatever is built on the ports."""
