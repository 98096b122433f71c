"""`python -m modelfsd` is the `modelfs` command."""

from __future__ import annotations

from modelfsd.cli import main

if __name__ == "__main__":
    main()
