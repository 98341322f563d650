"""Signals: noted where a step can be finished, at once everywhere else."""

import os
import signal

import pytest

from rlhf_ray.errors import Interrupted
from rlhf_ray.training.stopping import Stopping


def test_outside_a_loop_a_signal_stops_at_once_with_its_exit_code() -> None:
    stopping = Stopping()
    with stopping.listening(), pytest.raises(Interrupted) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130


def test_inside_a_loop_the_first_is_noted_and_the_second_stops() -> None:
    stopping = Stopping()
    with stopping.listening(), stopping.graceful():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked is signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_afterwards_the_former_handlers_are_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stopping().listening():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_a_library_put_in_its_place_is_replaced_again() -> None:
    stopping = Stopping()
    with stopping.listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopping.listen_again()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interruption_that_compiled_code_has_wrapped_comes_out_as_itself() -> None:
    with pytest.raises(Interrupted), Stopping().listening():
        raise SystemError("returned a result with an exception set") from Interrupted("stopped", 143)
    with pytest.raises(SystemError), Stopping().listening():
        raise SystemError("another")
