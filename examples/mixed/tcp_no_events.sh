#!/usr/bin/env bash
# Requests over tcp, no KV events and no NATS: the router takes what it sent somewhere to be cached there. See --help.
title="no KV events."
events=none
frontend_flags=(--no-kv-events)
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
