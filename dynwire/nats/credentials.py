"""Keys, JWTs and credentials files for the embedded nats-server; needs nkeys (``pip install 'dynwire[nats]'``).

Enough of what ``nsc`` does to test decentralised authentication: one operator, one account with JetStream, any number of users.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import time
from typing import Any

from ..errors import ConfigError

_UNLIMITED = -1


def _nkeys() -> Any:
    try:
        import nkeys  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            "NATS keys and credentials need nkeys: pip install 'dynwire[nats]'",
            name="nkeys",
            allowed="pip install 'dynwire[nats]'",
        ) from error
    return nkeys


def _new(kind: str) -> Any:
    nkeys = _nkeys()
    return nkeys.from_seed(nkeys.encode_seed(secrets.token_bytes(32), getattr(nkeys, f"PREFIX_BYTE_{kind}")))


def new_user_seed() -> str:
    """The seed of a new user key, as ``NATS_AUTH_NKEY`` takes it; a secret."""
    seed: str = bytes(_new("USER").seed).decode()
    return seed


def public_key(seed: str) -> str:
    """The public key of a seed. Raises `ConfigError` if it is none."""
    nkeys = _nkeys()
    try:
        found: bytes = nkeys.from_seed(seed.encode()).public_key
    except nkeys.NkeysError as error:
        raise ConfigError("this is not the seed of an NKey", name="nkey", allowed="text that begins with SU") from error
    return found.decode()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _jwt(signer: Any, subject: str, name: str, nats: dict[str, Any]) -> str:
    claims: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": bytes(signer.public_key).decode(),
        "sub": subject,
        "name": name,
        "nats": {**nats, "version": 2},
    }
    unsigned = json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()
    claims["jti"] = base64.b32encode(hashlib.sha256(unsigned).digest()).rstrip(b"=").decode()
    body = json.dumps(claims, separators=(",", ":")).encode()
    head = json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}, separators=(",", ":")).encode()
    signed = f"{_encode(head)}.{_encode(body)}"
    return f"{signed}.{_encode(signer.sign(signed.encode()))}"


class Operator:
    """A new operator with one account, which nats-server is told about when it starts (a memory resolver)."""

    def __init__(self, name: str = "dynwire") -> None:
        self._operator, self._account = _new("OPERATOR"), _new("ACCOUNT")
        self._operator_id = bytes(self._operator.public_key).decode()
        self._account_id = bytes(self._account.public_key).decode()
        self._operator_jwt = _jwt(self._operator, self._operator_id, name, {"type": "operator"})
        limits = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), _UNLIMITED)
        storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), _UNLIMITED)
        account = {"type": "account", "limits": {**limits, **storage, "wildcards": True}}
        self._account_jwt = _jwt(self._operator, self._account_id, f"{name}-account", account)
        # JetStream does not start without a system account, and may not be used by one
        self._system_id = bytes(_new("ACCOUNT").public_key).decode()
        self._system_jwt = _jwt(self._operator, self._system_id, f"{name}-system", {"type": "account", "limits": limits})

    def server_settings(self) -> dict[str, Any]:
        """What belongs into the server's configuration."""
        return {
            "operator": self._operator_jwt,
            "resolver": "MEMORY",
            "system_account": self._system_id,
            "resolver_preload": {self._account_id: self._account_jwt, self._system_id: self._system_jwt},
        }

    def credentials(self, name: str = "user") -> str:
        """The text of a credentials file for a new user of the account; a secret."""
        user = _new("USER")
        limits = dict.fromkeys(("subs", "data", "payload"), _UNLIMITED)
        jwt = _jwt(self._account, bytes(user.public_key).decode(), name, {"type": "user", **limits})
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{bytes(user.seed).decode()}\n------END USER NKEY SEED------\n"
        )

    def write_credentials(self, path: str | os.PathLike[str], name: str = "user") -> str:
        """Write `credentials` to a new file that only its owner may read, for ``NATS_AUTH_CREDENTIALS_FILE``."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(self.credentials(name))
        return os.fspath(path)


__all__ = ["Operator", "new_user_seed", "public_key"]
