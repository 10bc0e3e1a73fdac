import os
import signal
import threading

import pytest

from altopt.interruption import Terminated, deferred_signals, raise_on_sigterm

BOTH = pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@BOTH
def test_signal_is_held_back_until_the_block_ends(number, error, handlers):
    done = []
    with pytest.raises(error), deferred_signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        done.append("went on")
    assert done
    assert {each: signal.getsignal(each) for each in handlers} == handlers


@BOTH
def test_block_that_looks_can_stop_sooner(number, error):
    with pytest.raises(error), deferred_signals() as stop:
        signal.raise_signal(number)
        stop.raise_it()
        pytest.fail("it did not stop")


@BOTH
def test_second_signal_gets_through_at_once(number, error):
    with pytest.raises(error), deferred_signals():
        signal.raise_signal(number)
        signal.raise_signal(number)
        pytest.fail("it did not get through")


def test_without_a_signal_nothing_happens(handlers):
    with deferred_signals() as stop:
        stop.raise_it()
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {each: signal.getsignal(each) for each in handlers} == handlers


def test_error_of_the_block_comes_before_a_signal_held_back(handlers):
    with pytest.raises(ZeroDivisionError), deferred_signals():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError
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
