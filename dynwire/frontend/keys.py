"""API keys of clients, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from ..config import FrontendConfig
from ..errors import ConfigError
from .problems import ApiError


class Keys:
    """Which keys are let in; without any, everybody is."""

    def __init__(self, keys: list[str]) -> None:
        # of equal length, so that comparing says nothing of a key's length either
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def from_config(cls, config: FrontendConfig) -> Keys:
        """Keys of the setting and of the file. Raises `ConfigError` if the file cannot be read or holds no key."""
        keys = [key.strip() for key in (config.api_keys or "").split(",") if key.strip()]
        path = config.api_key_file
        if path is not None:
            try:
                lines = Path(path).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                text = f"DYNWIRE_API_KEY_FILE names {path!r}, which cannot be read: {error}"
                raise ConfigError(text, name="DYNWIRE_API_KEY_FILE", value=path, allowed="a text file") from error
            found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not found:
                # an empty file must not open the door
                text = f"DYNWIRE_API_KEY_FILE names {path!r}, which holds no key"
                raise ConfigError(text, name="DYNWIRE_API_KEY_FILE", value=path, allowed="one key per line")
            keys += found
        elif config.api_keys is not None and not keys:
            raise ConfigError("DYNWIRE_API_KEYS holds no key", name="DYNWIRE_API_KEYS", allowed="keys separated by commas")
        return cls(keys)

    @property
    def needed(self) -> bool:
        """Whether a key has to be shown."""
        return bool(self._digests)

    def check(self, headers: dict[bytes, bytes]) -> None:
        """Raises `ApiError` 401 unless ``Authorization: Bearer KEY`` (or ``x-api-key: KEY``) shows one of the keys."""
        if not self._digests:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        key = key.strip()
        if not key:
            raise ApiError(401, "no API key was given: send the header 'Authorization: Bearer KEY'", code="invalid_api_key")
        shown = _digest(key)
        # all of them are compared, whichever fits
        if not sum(hmac.compare_digest(shown, known) for known in self._digests):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
