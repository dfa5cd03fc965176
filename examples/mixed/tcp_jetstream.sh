#!/usr/bin/env bash
# Requests over tcp, KV events over JetStream: they and the router's index are stored there, for routers that start. See --help.
title="KV events over JetStream."
events=jetstream
frontend_flags=()
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
