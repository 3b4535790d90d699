"""The outbox: everything arrives, in order, whenever the service answers, and whoever writes waits for nothing."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from harness.tracking import outbox
from harness.tracking.outbox import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Away, Outbox, WriterThread
from tests.patience import PATIENCE_SECONDS


class Service:
    """Takes numbers while it answers; an answer may get lost after the number arrived."""

    def __init__(self) -> None:
        self.answers, self.loses = True, False
        self.arrived: list[int] = []
        self.attempts = 0

    def take(self, number: int) -> None:
        self.attempts += 1
        if not self.answers:
            raise Away("connection refused")
        if number not in self.arrived:  # an operation bears being repeated
            self.arrived.append(number)
        if self.loses:
            self.loses = False
            raise Away("the answer was lost")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def box(clock: list[float], said: list[str]) -> Outbox:
    return Outbox(said.append, "The service")


def test_while_the_service_answers_everything_is_done_at_once_and_nothing_is_said(box: Outbox, said: list[str]) -> None:
    service = Service()
    for number in range(5):
        box.add(lambda number=number: service.take(number))  # type: ignore[misc]
        assert service.arrived == list(range(number + 1))
    assert not box.waiting
    assert box.flush()
    assert said == []


def test_away_and_back_are_said_once_each(box: Outbox, said: list[str], clock: list[float]) -> None:
    service = Service()
    for _ in range(2):
        said.clear()
        service.answers = False
        for number in range(10):
            box.add(lambda number=number: service.take(number))  # type: ignore[misc]
            clock[0] += 30.0
        assert [text for text in said if "connection refused" in text] == said
        assert len(said) == 1
        service.answers = True
        assert box.flush()
        assert len(said) == 2
        assert "answers again" in said[1]


def test_pauses_double_up_to_a_bound_and_start_anew_after_an_answer(box: Outbox, clock: list[float]) -> None:
    service = Service()

    def pauses(count: int) -> list[float]:
        """The seconds between attempts, measured by adding something every second."""
        found: list[float] = []
        last, before = clock[0], service.attempts
        while len(found) < count:
            box.add(lambda: service.take(0))
            if service.attempts > before:
                found.append(clock[0] - last)
                last, before = clock[0], service.attempts
            clock[0] += 1.0
        return found[1:]

    service.answers = False
    expected = [min(FIRST_PAUSE_SECONDS * 2**each, LONGEST_PAUSE_SECONDS) for each in range(8)]
    assert pauses(9) == expected
    assert expected[-3:] == [LONGEST_PAUSE_SECONDS] * 3
    service.answers = True
    assert box.flush()
    service.answers = False
    assert pauses(3) == expected[:2]


def test_between_two_attempts_nothing_is_tried(box: Outbox, clock: list[float]) -> None:
    service = Service()
    service.answers = False
    for number in range(100):
        box.add(lambda number=number: service.take(number))  # type: ignore[misc]
    assert service.attempts == 1
    clock[0] += FIRST_PAUSE_SECONDS - 0.01
    box.add(lambda: service.take(100))
    assert service.attempts == 1
    clock[0] += 0.01
    service.answers = True
    box.add(lambda: service.take(101))
    assert service.arrived == list(range(102))


def test_an_operation_whose_answer_was_lost_is_repeated(box: Outbox) -> None:
    service = Service()
    service.loses = True
    box.add(lambda: service.take(0))
    assert (service.arrived, len(box.waiting)) == ([0], 1)
    assert box.flush()
    assert service.attempts == 2
    assert service.arrived == [0]


def test_flush_tries_now_whatever_the_pause(box: Outbox) -> None:
    service = Service()
    service.answers = False
    box.add(lambda: service.take(0))
    assert not box.flush()
    assert service.attempts == 2
    service.answers = True
    assert box.flush()


def test_what_is_no_absence_is_raised_and_the_operation_kept(box: Outbox) -> None:
    """Ctrl-C inside an operation: it is neither lost nor half done."""
    service, interrupted = Service(), [True]

    def operation() -> None:
        if interrupted.pop() if interrupted else False:
            raise KeyboardInterrupt
        service.take(0)

    with pytest.raises(KeyboardInterrupt):
        box.add(operation)
    assert box.flush()
    assert service.arrived == [0]


class OutboxMachine(RuleBasedStateMachine):
    """Any mixture of writing, waiting, outages and lost answers."""

    @initialize()
    def begin(self) -> None:
        self.now, self.said, self.service, self.sent = 0.0, list[str](), Service(), 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(outbox.time, "monotonic", lambda: self.now)
        self.box = Outbox(self.said.append, "The service")

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule()
    def write(self) -> None:
        number, before = self.sent, self.service.attempts
        self.sent += 1
        self.box.add(lambda: self.service.take(number))
        if not self.service.answers:
            assert self.service.attempts <= before + 1, "a writer waits for one attempt at most"

    @rule(seconds=st.floats(0, 200))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(answers=st.booleans())
    def change(self, answers: bool) -> None:
        self.service.answers = answers

    @rule()
    def lose_the_next_answer(self) -> None:
        self.service.loses = True

    @rule()
    def flush(self) -> None:
        done = self.box.flush()
        assert done is (not self.box.waiting)
        if done:
            assert self.service.arrived == list(range(self.sent))

    @rule()
    def the_longest_pause_passes(self) -> None:
        self.now += LONGEST_PAUSE_SECONDS
        self.service.answers, self.service.loses = True, False
        self.write()
        assert not self.box.waiting
        assert self.service.arrived == list(range(self.sent))

    @invariant()
    def order_is_kept_and_nothing_is_lost(self) -> None:
        if not hasattr(self, "box"):
            return
        arrived, waiting = self.service.arrived, len(self.box.waiting)
        assert arrived == list(range(len(arrived)))
        # One may have arrived and still wait, for its answer was lost.
        assert len(arrived) + waiting - self.sent in (0, 1)

    @invariant()
    def away_and_back_take_turns(self) -> None:
        if not hasattr(self, "box"):
            return
        assert all(("answers again" in text) == bool(number % 2) for number, text in enumerate(self.said))
        assert bool(self.box.waiting) == bool(len(self.said) % 2)


TestAnyMixture = OutboxMachine.TestCase
TestAnyMixture.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# -- emptied by a thread -------------------------------------------------------------------------------------------


@pytest.fixture
def courier(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> WriterThread:
    monkeypatch.setattr(outbox, "GATHERING_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "FIRST_PAUSE_SECONDS", 0.05)
    return WriterThread(Outbox(said.append, "The service"))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def courier_threads() -> int:
    return sum(thread.name == "outbox" for thread in threading.enumerate())


def test_what_is_added_is_done_in_order_without_anybody_waiting_for_it(courier: WriterThread) -> None:
    service, free = Service(), threading.Event()
    courier.add(lambda: (free.wait(20), service.take(0))[1])
    for number in range(1, 50):
        courier.add(lambda number=number: service.take(number))  # type: ignore[misc]
    assert service.arrived == []
    free.set()
    until(lambda: len(service.arrived) == 50)
    assert service.arrived == list(range(50))
    until(lambda: not courier_threads())  # none is left when nothing waits
    courier.add(lambda: service.take(50))
    until(lambda: 50 in service.arrived)


def test_a_flush_waits_for_what_runs_and_does_the_rest(courier: WriterThread) -> None:
    service = Service()
    courier.add(lambda: (time.sleep(0.2), service.take(0))[1])
    time.sleep(0.1)  # it runs
    for number in range(1, 20):
        courier.add(lambda number=number: service.take(number))  # type: ignore[misc]
    assert courier.flush()
    assert service.arrived == list(range(20))


def test_a_service_that_is_back_is_noticed_by_itself(courier: WriterThread, said: list[str]) -> None:
    service = Service()
    service.answers = False
    courier.add(lambda: service.take(0))
    until(lambda: said)
    assert not courier.flush()
    service.answers = True
    until(lambda: service.arrived)
    until(lambda: len(said) == 2)
    assert "answers again" in said[1]


@pytest.mark.parametrize("hear", ["check", "flush"])
def test_a_mistake_in_the_thread_is_raised_once_and_what_follows_is_done(courier: WriterThread, hear: str) -> None:
    service = Service()
    courier.add(lambda: service.take(0))
    courier.add(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    courier.add(lambda: service.take(1))
    until(lambda: len(service.arrived) == 2)
    with pytest.raises(ZeroDivisionError):
        getattr(courier, hear)()
    courier.check()
    assert courier.flush()


def test_stopped_it_keeps_what_waits_and_goes_on_when_asked_to(courier: WriterThread, said: list[str]) -> None:
    service = Service()
    service.answers = False
    courier.add(lambda: service.take(0))
    until(lambda: said)
    courier.stop()
    service.answers = True
    until(lambda: not courier_threads())
    assert service.arrived == []
    courier.add(lambda: service.take(1))
    until(lambda: service.arrived == [0, 1])


def test_ctrl_c_while_a_flush_waits_loses_nothing(courier: WriterThread) -> None:
    service = Service()
    courier.add(lambda: (time.sleep(0.4), service.take(0))[1])
    courier.add(lambda: service.take(1))
    time.sleep(0.1)

    def flush_for_ever() -> None:
        while True:
            courier.flush()

    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        flush_for_ever()
    assert courier.flush()
    assert service.arrived == [0, 1]
