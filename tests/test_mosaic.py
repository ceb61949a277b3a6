"""The door to MosaicML's streaming: what it passes over is whole for who asks for it."""

import subprocess
import sys


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_start_imports_little_of_streaming_which_is_whole_when_it_is_imported_after_us() -> None:
    run(
        "import sys\n"
        "from cfpretrain.training import folder, trainer\n"
        "found = {'transformers', 'sklearn', 'streaming', 'streaming.base'} & sys.modules.keys()\n"
        "assert not found, found\n"
        "from cfpretrain.data import mosaic\n"
        "import streaming\n"
        "assert streaming.MDSWriter is mosaic.MDSWriter\n"
        "from streaming.base.partition import get_partitions\n"
        "assert get_partitions is mosaic.get_partitions\n"
        "assert streaming.LocalDataset"
    )


def test_streaming_is_whole_when_it_was_imported_before_us() -> None:
    run(
        "import streaming\n"
        "from cfpretrain.data import mosaic\n"
        "assert streaming.MDSWriter is mosaic.MDSWriter\n"
        "import streaming.base\n"
        "assert streaming.base.LocalDataset"
    )
