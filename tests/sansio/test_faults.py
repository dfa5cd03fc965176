"""Bodies of ERROR frames."""

from __future__ import annotations

import random

import msgspec
import pytest

from dynwire._frames import LIMITS
from dynwire.errors import BY_CODE, DynwireError, Overloaded, ProtocolError, RemoteError
from dynwire.wire.faults import error_body, error_from_body, for_request, handler_error, handler_error_body


def field_value(name: str) -> object:
    return 7 if name in ("depth", "limit", "size", "offset", "retry_after", "timeout") else "seven"


def test_fields_of_the_wrong_type_are_not_taken_over() -> None:
    """A peer's ``retry_after`` is calculated with."""
    body = error_body(Overloaded("full", depth=1))
    forged = body.replace(b"\xa5depth\x01", b"\xa5depth\xa1x")
    assert forged != body
    back = error_from_body(forged, peer=None, request_id=None)
    assert isinstance(back, Overloaded) and back.depth is None


@pytest.mark.parametrize("code", BY_CODE)
def test_every_class_survives_the_wire(code: str) -> None:
    error = BY_CODE[code]("what happened", phase="accept", sent="no", retryable=True, details={"a": [1, None]})
    for name in error.own_fields:
        if name not in ("type_name", "message", "delivered"):
            setattr(error, name, field_value(name))
    back = error_from_body(error_body(error), peer="p:1", request_id="r-1")
    assert type(back) is type(error)
    assert (back.phase, back.sent, back.retryable, back.details) == ("accept", "no", True, {"a": [1, None]})
    assert (back.peer, back.request_id) == ("p:1", "r-1")
    assert "what happened" in str(back)
    for name in error.own_fields:
        if name not in ("type_name", "message", "delivered"):
            assert getattr(back, name) == field_value(name)


def test_a_handlers_exception() -> None:
    back = error_from_body(handler_error_body(KeyError("k")), peer="p:1", request_id=None)
    assert isinstance(back, RemoteError)
    assert (back.type_name, back.message, back.sent, back.retryable) == ("KeyError", "'k'", "yes", False)


def test_what_was_raised_is_told_once() -> None:
    """However often a worker reports it: as the exception it caught, or as the error made of it."""
    error = handler_error(KeyError("k"))
    assert str(error) == "the handler raised KeyError: 'k'"
    assert error_body(error) == handler_error_body(KeyError("k"))
    assert str(error_from_body(error_body(error), peer="p:1", request_id=None)) == "the handler at p:1 raised KeyError: 'k'"


def test_an_unknown_code_is_a_remote_error() -> None:
    back = error_from_body(msgspec.msgpack.encode({"c": "new_in_2", "m": "text", "zz": 1}), peer=None, request_id=None)
    assert isinstance(back, RemoteError) and back.type_name == "new_in_2" and back.message == "text"


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x80", b"\x81\xa1c\x01", b"\x82\xa1c\xa1x\xa1m\xc0", b"\x90", b"\xc6\xff\xff\xff\xff"]
)
def test_a_body_that_does_not_decode(body: bytes) -> None:
    back = error_from_body(body, peer="p:1", request_id="r")
    assert isinstance(back, ProtocolError) and back.request_id == "r" and back.__cause__ is not None


@pytest.mark.parametrize(
    "body",
    [b"\x82\xa1c\xa1x\xa1m\xa1\xff", b"\x83\xa1c\xa1x\xa1m\xa1y\xa1d\x81\xa1k" + b"\x91" * 15_000 + b"\xc0"],
    ids=["not UTF-8", "nested too deeply"],
)
def test_strings_or_nesting_that_msgspec_dislikes(body: bytes) -> None:
    assert isinstance(error_from_body(body, peer=None, request_id=None), ProtocolError)


def test_mutated_bodies_make_errors_not_exceptions() -> None:
    good = error_body(Overloaded("full", depth=3, limit=2, details={"k": "v"}))
    rng = random.Random(3)
    for _ in range(20_000):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.getrandbits(8) & 0x7F  # strings stay ASCII: see the test above
        assert isinstance(error_from_body(bytes(body), peer=None, request_id=None), DynwireError)


def test_a_long_message_is_cut() -> None:
    body = handler_error_body(ValueError("\U0001f600" * 100_000))
    assert len(body) < LIMITS["small_limit"]


def test_a_traceback_fits_into_a_frame() -> None:
    try:
        raise ValueError("\U0001f600" * 100_000)
    except ValueError as error:
        body = handler_error_body(error, with_traceback=True)
    assert len(body) <= LIMITS["small_limit"]


def test_details_fit_into_a_frame() -> None:
    assert len(error_body(Overloaded("x", details={"k": "v" * 200_000}))) <= LIMITS["small_limit"]


def test_a_message_with_surrogates() -> None:
    back = error_from_body(handler_error_body(FileNotFoundError("caf\udce9.txt")), peer=None, request_id=None)
    assert isinstance(back, RemoteError) and "caf" in back.message


def test_details_that_msgpack_does_not_know() -> None:
    error_body(Overloaded("x", details={"k": [object()]}))


def test_a_connections_error_as_a_request_sees_it() -> None:
    template = Overloaded("full", depth=1)
    template.__cause__ = OSError("cause")
    one = for_request(template, sent="no", request_id="r", delivered=5)
    assert type(one) is Overloaded and one is not template
    assert (one.sent, one.request_id, one.depth) == ("no", "r", 1) and one.__cause__ is template.__cause__
    assert template.request_id is None
