"""Files that are being written, from the first byte to the commit, or to recovery."""
