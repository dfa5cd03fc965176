#!/usr/bin/env bash
# Requests over tcp, KV events over core NATS: nothing is stored there, workers answer for what was lost. See --help.
title="KV events over core NATS."
events=nats
frontend_flags=()
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
