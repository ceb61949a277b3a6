"""The door to MosaicML's streaming: its format of shards, its storage and its shuffle, without the rest of it.

Its two outer packages import transformers, scikit-learn and every data set they know: half of the seconds that a rank
takes to start. Here they are passed over; who imports them later gets them whole.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec


@contextmanager
def _without_running(*packages: str) -> Iterator[None]:
    """Lets modules of these packages be imported without the packages' own code, outermost first."""
    passed_over = [name for name in packages if name not in sys.modules]
    try:
        for name in passed_over:
            spec = find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules[name] = module_from_spec(spec)
        yield
    finally:
        for name in passed_over:
            sys.modules.pop(name, None)


with _without_running("streaming", "streaming.base"):
    from streaming._version import __version__
    from streaming.base.format.mds import MDSWriter, encodings
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle
    from streaming.base.storage import CloudDownloader

__all__ = ["CloudDownloader", "MDSWriter", "__version__", "encodings", "get_partitions", "get_shuffle"]
