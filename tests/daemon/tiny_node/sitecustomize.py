"""On PYTHONPATH, this makes `python -m modelfsd` run the tiny node in place of the real one."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "modelfsd.node", Path(__file__).with_name("tiny_node.py")
)
assert _spec is not None


class _Finder:
    """Finds `modelfsd.node` here, before anybody looks in the package."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        """See importlib.abc.MetaPathFinder."""
        return _spec if name == "modelfsd.node" else None


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
