#!/bin/sh
# Starts a ServerApp for every run that the SuperLink hands out; the record of a run goes to /runs.
set -eu
if ! touch /runs/.writable 2>/dev/null; then
    echo "user $(id -u) cannot write /runs: set HAWTHORN_UID and HAWTHORN_GID to the owner of the folder" >&2
    exit 1
fi
rm -f /runs/.writable
exec flower-superexec --plugin-type serverapp --runtime-api-address superlink-control:8000 \
    --root-certificates /keys/ca.pem --superexec-auth-secret-file /keys/superlink/superexec.secret \
    --health-server-address 127.0.0.1:9100
