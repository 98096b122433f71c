"""The kernel's side: FUSE requests, open files, and what the kernel caches."""
