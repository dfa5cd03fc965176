"""DYNWIRE_HTTP_TLS_*: who trusts whom, and what goes wrong said in words."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from dynwire import ConfigError, ConnectError
from tests.plane.faces import Manager, eventually

from . import frames as f
from .live import ENGINES, FACES, ONE_LOOP, PATH, Direct, Raw, host_port, managing, outcome, raw_client, raw_server

pytestmark = pytest.mark.usefixtures("discovery_dir")


class Files(NamedTuple):
    ca: str
    other_ca: str
    cert: str
    key: str
    chain: str
    """certificate and key in one file"""
    expired: str
    foreign_name: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    ca, other = trustme.CA(), trustme.CA()
    now = datetime.datetime.now(datetime.UTC)
    good = ca.issue_cert("127.0.0.1", "localhost")
    old = ca.issue_cert("127.0.0.1", not_before=now - datetime.timedelta(9), not_after=now - datetime.timedelta(1))
    made = Files(*(str(folder / name) for name in Files._fields))
    ca.cert_pem.write_to_path(made.ca)
    other.cert_pem.write_to_path(made.other_ca)
    good.cert_chain_pems[0].write_to_path(made.cert)
    good.private_key_pem.write_to_path(made.key)
    good.private_key_and_cert_chain_pem.write_to_path(made.chain)
    old.private_key_and_cert_chain_pem.write_to_path(made.expired)
    ca.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(made.foreign_name)
    return made


async def echo(request: Any) -> Any:
    return request


async def address_of(manager: Manager) -> str:
    return (await manager.serve(PATH, echo)).instance.address


@ENGINES
@FACES
@pytest.mark.parametrize("one_file", [True, False])
async def test_certificate_key_and_authority(face: str, engine: str, one_file: bool, files: Files) -> None:
    own = {"http_tls_cert": files.chain} if one_file else {"http_tls_cert": files.cert, "http_tls_key": files.key}
    async with managing(face, http_engine=engine, **own) as server:
        address = await address_of(server)
        assert address.startswith("https://127.0.0.1:")
        async with managing(face, http_engine=engine, http_tls_ca=files.ca) as caller:
            client = await caller.client(PATH)
            assert await client.call(1) == 1
            assert await client.call(bytes(300000)) == bytes(300000)


@ONE_LOOP
async def test_alpn(files: Files) -> None:
    async with managing(http_tls_cert=files.chain) as server:
        address = await address_of(server)
        for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1")):
            context = ssl.create_default_context(cafile=files.ca)
            context.set_alpn_protocols(offered)
            async with raw_client(address, ssl=context) as raw:
                assert raw.writer.get_extra_info("ssl_object").selected_alpn_protocol() == chosen
                if chosen == "h2":
                    await raw.greet()
                    raw.post(1)
                    assert (await raw.reply(1))[::2] == (200, b"1")
                else:
                    raw.send(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    assert (await raw.reader.read()).startswith(b"HTTP/1.1 200 ")


@FACES
@pytest.mark.parametrize(
    ("cert", "trusted", "words"),
    [
        ("chain", "other_ca", "certificate"),
        ("chain", None, "certificate"),
        ("expired", "ca", "expired"),
        ("foreign_name", "ca", "127.0.0.1"),
    ],
    ids=["wrong authority", "the system's authorities", "expired", "wrong name"],
)
async def test_certificates_that_callers_refuse(face: str, cert: str, trusted: str | None, words: str, files: Files) -> None:
    ca = None if trusted is None else getattr(files, trusted)
    async with managing(face, http_tls_cert=getattr(files, cert)) as server, managing(face, http_tls_ca=ca) as caller:
        direct = Direct(caller, await address_of(server))
        started = asyncio.get_running_loop().time()
        error = await outcome(direct.call(1))
        assert isinstance(error, ConnectError), error
        assert "TLS" in str(error)
        assert words in str(error)
        assert error.sent == "no"
        assert asyncio.get_running_loop().time() - started < 2.5, "not by the connect timeout"
        await direct.close()


@FACES
async def test_plain_http_to_a_tls_port(face: str, files: Files) -> None:
    async with managing(face, http_tls_cert=files.chain) as server, managing(face) as caller:
        address = await address_of(server)
        direct = Direct(caller, address.replace("https:", "http:"))
        started = asyncio.get_running_loop().time()
        error = await outcome(direct.call(1))
        assert isinstance(error, ConnectError), repr(error)
        assert error.sent == "no"
        assert asyncio.get_running_loop().time() - started < 2.5, "not by the connect timeout"
        assert "TLS" in str(error) or "https" in str(error)
        await direct.close()


@FACES
async def test_tls_to_a_plain_port(face: str, files: Files) -> None:
    async with managing(face) as server, managing(face, http_tls_ca=files.ca) as caller:
        address = await address_of(server)
        direct = Direct(caller, address.replace("http:", "https:"))
        started = asyncio.get_running_loop().time()
        error = await outcome(direct.call(1))
        assert isinstance(error, ConnectError), repr(error)
        assert "TLS" in str(error)
        assert error.sent == "no"
        assert asyncio.get_running_loop().time() - started < 2.5, "not by the connect timeout"
        await direct.close()


@FACES
async def test_a_server_that_does_not_negotiate_http2(face: str, files: Files) -> None:
    """TLS works, ALPN does not say h2: the peer speaks HTTP/1.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.chain)

    async def script(raw: Raw) -> None:
        await raw.reader.read(100)
        raw.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await raw.reader.read()

    async with raw_server(script, ssl=context) as server, managing(face, http_tls_ca=files.ca) as caller:
        direct = Direct(caller, server.address)
        error = await outcome(direct.call(1))
        assert "HTTP/1.1" in str(error)
        assert error.sent == "no"
        await direct.close()


@FACES
@pytest.mark.parametrize(
    ("setting", "variable"),
    [
        ("http_tls_cert", "DYNWIRE_HTTP_TLS_CERT"),
        ("http_tls_key", "DYNWIRE_HTTP_TLS_KEY"),
        ("http_tls_ca", "DYNWIRE_HTTP_TLS_CA"),
    ],
)
@pytest.mark.parametrize("kind", ["missing", "no PEM"])
async def test_unusable_files(face: str, setting: str, variable: str, kind: str, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "file.pem"
    if kind == "no PEM":
        path.write_text("nothing of use\n")
    settings = {"http_tls_cert": files.cert, "http_tls_key": files.key, setting: str(path)}
    async with managing(face, **settings) as manager:
        if setting == "http_tls_ca":
            async with raw_server(silent) as server:
                direct = Direct(manager, server.address.replace("http:", "https:"))
                error = await outcome(direct.call(1))
                await direct.close()
                await eventually(lambda: server.connections)  # it has got to know the connection, and can close it
        else:
            error = await outcome(manager.serve(PATH, echo))
        assert isinstance(error, ConfigError), repr(error)
        assert variable in str(error)
        assert str(path) in str(error)
        assert error.name == variable


async def silent(raw: Raw) -> None:
    await raw.reader.read()


@ONE_LOOP
async def test_a_client_that_does_not_trust_us_costs_nothing(files: Files) -> None:
    """Its alert ends the connection; the next client is served."""
    async with managing(http_tls_cert=files.chain) as server:
        address = await address_of(server)
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(*host_port(address), ssl=ssl.create_default_context())
        async with raw_client(address) as raw:
            raw.send(f.PREFACE)  # no TLS at all
            await raw.until_closed()
        context = ssl.create_default_context(cafile=files.ca)
        context.set_alpn_protocols(["h2"])
        async with raw_client(address, ssl=context) as raw:
            await raw.greet()
            raw.post(1)
            assert (await raw.reply(1))[0] == 200
