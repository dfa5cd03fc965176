"""When to ask, to report, to publish again: the rules of durable requests, without a server and without a clock."""

from __future__ import annotations

from dynwire.nats.confirm import MARGIN_S, RETRY_S, Unconfirmed
from dynwire.nats.pull import CONFLICT, EXPIRED, HEARTBEAT, NO_RESPONDERS, SILENT_AFTER_S, Progress, PullWindow
from dynwire.nats.queue import Delivery


def delivery(seq: int, attempt: int = 1) -> Delivery:
    return Delivery(b"ack.%d.%d" % (attempt, seq), seq, attempt, 0.0, 0)


# asking ------------------------------------------------------------------------------------------------------------------------


def test_a_worker_asks_for_what_it_can_run() -> None:
    window = PullWindow(8)
    assert window.wanted(0, 0.0) == 8
    window.sent(8, 0.0)
    assert window.wanted(0, 0.0) == 0
    for running in range(1, 9):
        window.delivered(0.0)
        assert window.asked + running == 8
        assert window.wanted(running, 0.0) == 0
    # nothing is asked for: each free place is worth a question
    assert window.wanted(7, 0.0) == 1
    window.sent(1, 0.0)
    assert window.wanted(7, 0.0) == 0


def test_with_questions_waiting_it_asks_in_quarters() -> None:
    window = PullWindow(8)
    window.sent(4, 0.0)
    assert window.wanted(3, 0.0) == 0
    assert window.wanted(2, 0.0) == 2


def test_a_question_that_expired_frees_its_rest() -> None:
    window = PullWindow(8)
    window.sent(8, 0.0)
    window.delivered(1.0)
    assert window.status(EXPIRED, 7, 30.0)
    assert window.asked == 0


def test_other_endings_make_all_questions_void() -> None:
    window = PullWindow(8)
    for code, left in ((CONFLICT, None), (CONFLICT, 3), (NO_RESPONDERS, None), (EXPIRED, None)):
        assert not window.status(code, left, 0.0)


def test_heartbeats_keep_a_question_alive() -> None:
    window = PullWindow(8)
    window.sent(8, 0.0)
    assert not window.silent(SILENT_AFTER_S)
    assert window.silent(SILENT_AFTER_S + 1)
    window.status(HEARTBEAT, None, SILENT_AFTER_S)
    assert not window.silent(SILENT_AFTER_S + 1)
    window.reset()
    assert not window.silent(1e9), "who has asked nothing waits for no word"


def test_a_late_question_counts_from_when_it_was_asked() -> None:
    window = PullWindow(8)
    window.sent(8, 1000.0)
    assert not window.silent(1001.0)


def test_more_than_was_asked_for_is_no_debt() -> None:
    window = PullWindow(4)
    window.delivered(0.0)
    assert window.asked == 0 and window.wanted(1, 0.0) == 3


# reporting ---------------------------------------------------------------------------------------------------------------------


def test_what_runs_is_reported_three_times_per_wait() -> None:
    progress = Progress(9.0)
    progress.add(delivery(1), 0.0)
    progress.add(delivery(2), 2.0)
    assert [d.seq for d in progress.due(2.9)] == []
    assert [d.seq for d in progress.due(3.0)] == [1]
    assert [d.seq for d in progress.due(5.0)] == [2]
    assert [d.seq for d in progress.due(6.0)] == [1]


def test_an_ended_request_is_not_reported() -> None:
    progress = Progress(3.0)
    first = delivery(1)
    progress.add(first, 0.0)
    assert progress.remove(first)
    assert not progress.remove(first)
    assert progress.due(100.0) == []


def test_an_earlier_delivery_does_not_end_a_later_one() -> None:
    progress = Progress(3.0)
    first, second = delivery(1), delivery(1, attempt=2)
    progress.add(first, 0.0)
    progress.add(second, 0.0)
    assert not progress.remove(first)
    assert progress.remove(second)


# publishing again --------------------------------------------------------------------------------------------------------------


def test_what_is_not_confirmed_is_published_again_with_growing_pauses() -> None:
    waiting = Unconfirmed(120.0)
    waiting.published("a", 0.0)
    times = []
    now = 0.0
    while now < 30.0:
        now = waiting.next_due() or 0.0
        again, lost = waiting.due(now)
        assert (again, lost) == (["a"], [])
        times.append(now)
    assert times[:5] == [RETRY_S, RETRY_S + 2, RETRY_S + 6, RETRY_S + 11, RETRY_S + 16]


def test_a_confirmed_request_rests() -> None:
    waiting = Unconfirmed(120.0)
    waiting.published("a", 0.0)
    assert waiting.settled("a")
    assert not waiting.settled("a"), "a second answer, to a repetition"
    assert waiting.due(1000.0) == ([], []) and waiting.next_due() is None


def test_beyond_the_duplicate_window_nothing_is_repeated() -> None:
    waiting = Unconfirmed(10.0)
    waiting.published("a", 0.0)
    assert waiting.due(10.0 - MARGIN_S - 0.1)[1] == []
    assert waiting.due(10.0 - MARGIN_S + 0.1) == ([], ["a"])
    assert len(waiting) == 0


def test_a_new_connection_repeats_at_once() -> None:
    waiting = Unconfirmed(120.0)
    for n in range(3):
        waiting.published(n, float(n))
    waiting.due(2.5)
    waiting.all_due(2.6)
    assert waiting.due(2.6) == ([0, 1, 2], [])


def test_a_very_short_window_still_allows_an_attempt() -> None:
    waiting = Unconfirmed(0.5)
    waiting.published("a", 0.0)
    assert waiting.due(0.2) == ([], []) and waiting.due(0.3) == ([], ["a"])
