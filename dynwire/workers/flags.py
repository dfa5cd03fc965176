"""Settings as flags of a program. Values are checked by `load_config`, with the same words as those of variables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..config import Config, Setting, settings

KV_SWITCHES: dict[str, tuple[str, bool]] = {
    "router.kv_events": ("--no-kv-events", False),
    "router.replica_sync": ("--router-replica-sync", True),
    "router.reset_states": ("--router-reset-states", True),
}
"""of programs that have a KV-aware router"""


def add_flags(
    parser: argparse.ArgumentParser, flags: Mapping[str, tuple[str, ...]], switches: Mapping[str, tuple[str, bool]]
) -> None:
    """Adds ``flags``, setting to its flags with a value, and ``switches``, setting to its flag without one and what that means.

    The parsed names are those of the settings, as `load_config` takes them; and ``verbose``.
    """
    known = {setting.name: setting for setting in settings()}
    for name, names in flags.items():
        parser.add_argument(*names, dest=name, metavar="VALUE", help=_help(known[name]))
    for name, (flag, value) in switches.items():
        parser.add_argument(flag, dest=name, action="store_const", const=value, help=_help(known[name]))
    parser.add_argument("-v", "--verbose", action="store_true", help="log what comes and goes")


def _help(setting: Setting) -> str:
    default = setting.default_text or setting.show(Config().get(setting.name))
    unit = f" in {setting.unit}" if setting.unit else ""
    # argparse formats with %
    return f"{setting.doc}{unit} [{setting.env}, default: {default}]".replace("%", "%%")
