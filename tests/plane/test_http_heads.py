"""Heads of requests that are right and unusual, on real connections."""

from __future__ import annotations

import base64
from typing import Any

import pytest

import dynwire

from .conftest import Managers
from .test_http1_exchanges import PATH, ROUTE, talk

pytestmark = pytest.mark.planes("http")


async def echo(request: Any) -> Any:
    if request == "fail":
        raise ValueError("as asked")
    return request


@pytest.mark.parametrize("request_id", ["an id", "\u00fc", "\u20ac", "a\r\nx-more: b"])
async def test_ids_that_no_header_can_carry(managers: Managers, request_id: str) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        for _ in range(2):  # a connection that was given up would be another one
            with pytest.raises(dynwire.DynwireError, match="as asked") as caught:
                await client.call("fail", context=dynwire.Context(id=request_id))
            assert caught.value.request_id == request_id
            assert await client.call(1, context=dynwire.Context(id=request_id)) == 1


@pytest.mark.faces("async")
@pytest.mark.parametrize("request_id", ["\u20ac", "a\r\nx-more: b"])
async def test_ids_that_no_header_can_carry_for_others(managers: Managers, request_id: str) -> None:
    packed = base64.urlsafe_b64encode(request_id.encode())
    async with managers() as manager:
        service = await manager.serve(PATH, echo)
        head = b"POST %s HTTP/1.1\r\nhost: a\r\nx-dynwire-id: %s\r\ncontent-length: %%d\r\n\r\n%%s" % (ROUTE, packed)
        raw = await talk(service, head % (6, b'"fail"'), head % (4, b'"ok"'))
        replies = await raw.replies(2)
        assert [status for status, _ in replies] == [500, 200]
        assert replies[1][1] == b'"ok"\n'
        raw.writer.close()


@pytest.mark.faces("async")
async def test_several_accept_headers_say_nothing_about_one(managers: Managers) -> None:
    async with managers() as manager:
        service = await manager.serve(PATH, echo)
        head = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1\r\n" % ROUTE
        both = head + b"accept: application/msgpack\r\naccept: application/json;q=0.5\r\n\r\n1"
        one = head + b"accept: application/json;q=0.5\r\nconnection: close\r\n\r\n1"
        raw = await talk(service, both, one)
        first, second = (await raw.rest()).split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert b"application/msgpack" in first
        assert second.endswith(b"\r\n\r\n1\n")
        raw.writer.close()
