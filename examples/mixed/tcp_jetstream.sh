#!/usr/bin/env bash
# Requests over tcp, KV events through JetStream: stored there, with snapshots of the index for routers that start. See --help.
title="KV events through JetStream."
events=jetstream
frontend_flags=()
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
