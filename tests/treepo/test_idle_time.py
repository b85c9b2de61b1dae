"""Idle time, on a clock of one's own."""

from treepo.idle_time import IdleTime


def test_the_share_is_that_of_the_time_looked_at_over_all_workers():
    now = [0.0]
    idle = IdleTime(2, clock=lambda: now[0])

    def at(seconds: float) -> None:
        now[0] = seconds

    at(3)
    idle.start()  # what was before does not count
    at(4)
    idle.begin(0)  # idle for 1
    at(6)
    idle.begin(0)  # works on
    at(8)
    idle.end(0)
    at(13)  # idle for 5; worker 1 for 10
    assert idle.share() == (1 + 5 + 10) / 20
    idle.begin(1)
    at(17)  # worker 0 idle for 4 of 4, worker 1 for none
    assert idle.share() == 4 / 8
    assert idle.share_of_all() == (16 + 4) / 28
