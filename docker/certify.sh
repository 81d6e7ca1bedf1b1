#!/bin/sh
# The certification service, behind TLS and a token.
set -eu
exec hawthorn certify serve --host 0.0.0.0 --port 50051 --store /store --device "${HAWTHORN_DEVICE:-cpu}" \
    --tls-cert /keys/certify/cert.pem --tls-key /keys/certify/key.pem --token-file /keys/certify/token \
    --metrics-port 9464
