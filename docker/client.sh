#!/bin/sh
# A SuperNode. HAWTHORN_PARTITION is a client id, or several as 0-5, of which this container takes one that no other
# container holds; HAWTHORN_ATTACK makes it malicious.
set -eu
set -- --superlink "${HAWTHORN_FLEET:-superlink:9092}" --keys /keys --partition "${HAWTHORN_PARTITION:?a client id}" \
    --health 127.0.0.1:9100
[ -w /claims ] && set -- "$@" --claims /claims
[ -n "${HAWTHORN_ATTACK:-}" ] && set -- "$@" --attack "$HAWTHORN_ATTACK"
exec hawthorn client "$@"
