"""TLS contexts of the http plane."""

from __future__ import annotations

import ssl

from ...config import Config
from ...errors import ConfigError

ALPN = ["h2", "http/1.1"]
"""what the server speaks over TLS, RFC 7301; our own client offers only the first"""


def server_context(config: Config) -> ssl.SSLContext | None:
    """The server's context, None without DYNWIRE_HTTP_TLS_CERT. Raises `ConfigError`."""
    http = config.http
    if http.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(http.tls_cert, http.tls_key)
    except (OSError, ssl.SSLError) as error:
        if http.tls_key is not None and _is_certificate(http.tls_cert):
            allowed = "a PEM file with the key of DYNWIRE_HTTP_TLS_CERT"
            raise _unusable("DYNWIRE_HTTP_TLS_KEY", http.tls_key, allowed, error) from error
        allowed = "a PEM file, with its key in it or in DYNWIRE_HTTP_TLS_KEY"
        raise _unusable("DYNWIRE_HTTP_TLS_CERT", http.tls_cert, allowed, error) from error
    context.set_alpn_protocols(ALPN)
    return context


def _is_certificate(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ssl.SSLError):
        return False
    return True


def client_context(config: Config) -> ssl.SSLContext:
    """The callers' context: trusts DYNWIRE_HTTP_TLS_CA, or the system's authorities without it. Raises `ConfigError`."""
    http = config.http
    try:
        context = ssl.create_default_context(cafile=http.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise _unusable("DYNWIRE_HTTP_TLS_CA", http.tls_ca, "a PEM file of certificates", error) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(ALPN[:1])
    return context


def _unusable(name: str, value: str | None, allowed: str, error: Exception) -> ConfigError:
    return ConfigError(f"{name}={value}: cannot be used ({error}); expected {allowed}", name=name, value=value, allowed=allowed)
