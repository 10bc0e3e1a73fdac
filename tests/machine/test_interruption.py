import os
import signal
import threading

import pytest

from altopt.errors import LostError
from altopt.machine.interruption import Terminated, deferred_signals, raise_on_sigterm

BOTH = pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@BOTH
def test_signal_is_held_back_until_the_block_ends(number, error, handlers):
    seen = []

    def block():
        with deferred_signals() as stop:
            seen.append(stop.signal)
            os.kill(os.getpid(), number)
            seen.append(stop.signal)

    with pytest.raises(error):
        block()
    assert seen == [None, number]
    assert {each: signal.getsignal(each) for each in handlers} == handlers


@BOTH
def test_block_that_looks_can_stop_sooner(number, error):
    def block():
        with deferred_signals() as stop:
            signal.raise_signal(number)
            stop.raise_it()
            pytest.fail("it did not stop")

    with pytest.raises(error):
        block()


@BOTH
def test_second_signal_gets_through_at_once(number, error):
    def block():
        with deferred_signals():
            signal.raise_signal(number)
            signal.raise_signal(number)
            pytest.fail("it did not get through")

    with pytest.raises(error):
        block()


def test_without_a_signal_nothing_happens(handlers):
    with deferred_signals() as stop:
        stop.raise_it()
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {each: signal.getsignal(each) for each in handlers} == handlers


def test_error_of_the_block_comes_before_a_signal_held_back(handlers):
    def block():
        with deferred_signals():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert {each: signal.getsignal(each) for each in handlers} == handlers


def test_but_not_a_lost_process_which_is_what_torchrun_sends_sigterm_for(handlers):
    def block():
        with deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            raise LostError

    with pytest.raises(Terminated):
        block()
    assert {each: signal.getsignal(each) for each in handlers} == handlers


def test_other_threads_leave_the_handlers_alone(handlers):
    seen = []

    def work():
        with deferred_signals() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, handlers[signal.SIGINT])]


def test_sigterm_becomes_an_exception_that_nothing_swallows():
    assert not issubclass(Terminated, Exception)
    raise_on_sigterm()
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
