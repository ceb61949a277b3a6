"""Work beside the training thread."""

import threading
from collections.abc import Callable


class Task(threading.Thread):
    """Work in a thread, which begins at once; what stopped it is in `error`.

    A process that ends does not wait for it.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
