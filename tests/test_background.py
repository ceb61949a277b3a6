"""Tasks: what stopped them, and a stop that reaches the task that it is for."""

import time

from cfpretrain.base.background import StoppedError, Task


def test_an_error_is_kept() -> None:
    task = Task(lambda: [][1], "fails")  # type: ignore[misc]
    task.join()
    assert isinstance(task.error, IndexError)


def test_a_stop_ends_a_task_that_works() -> None:
    def work() -> None:
        while True:
            time.sleep(0.001)

    task = Task(work, "works")
    task.stop()
    task.join(30)
    assert not task.is_alive()
    assert isinstance(task.error, StoppedError)


def test_a_stop_after_the_end_reaches_no_other() -> None:
    """The system gives a new thread the name of one that has ended."""
    for _ in range(50):
        ended = Task(lambda: None, "ends")
        ended.join()
        goes_on = Task(lambda: [time.sleep(0) for _ in range(200)], "goes on")  # type: ignore[arg-type, return-value]
        ended.stop()
        goes_on.join()
        assert goes_on.error is None
        assert ended.error is None


def test_a_stop_at_the_end_leaves_no_trace(capfd) -> None:
    for delay in range(200):
        task = Task(lambda: None, "ends soon")
        for _ in range(delay):
            pass
        task.stop()
        task.join(30)
        assert not task.is_alive()
    assert capfd.readouterr() == ("", "")
