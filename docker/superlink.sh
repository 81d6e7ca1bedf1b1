#!/bin/sh
# A SuperLink that takes TLS and registered SuperNodes alone. Nodes reach the fleet port on every network; runs are
# submitted and ServerApps work on the control network only, where no SuperNode is.
set -eu
control=$(getent hosts superlink-control | cut -d' ' -f1 | head -n1)
[ -n "$control" ] || { echo "this container has no address on the control network" >&2; exit 1; }
# gRPC tells of clients that speak no TLS only at this level.
export GRPC_VERBOSITY="${GRPC_VERBOSITY:-INFO}"
flower-superlink --isolation process --disable-runtime-dependency-installation \
    --database /state/superlink.db \
    --ssl-ca-certfile /keys/ca.pem --ssl-certfile /keys/superlink/cert.pem --ssl-keyfile /keys/superlink/key.pem \
    --appio-ssl-ca-certfile /keys/ca.pem --appio-ssl-certfile /keys/superlink/cert.pem \
    --appio-ssl-keyfile /keys/superlink/key.pem \
    --superexec-auth-secret-file /keys/superlink/superexec.secret --enable-supernode-auth \
    --host "$control" --port 8000 --fleet-api-address 0.0.0.0:9092 --control-api-address "$control:9093" \
    --health-server-address 127.0.0.1:9100 &
superlink=$!
trap 'kill -TERM $superlink 2>/dev/null || true' TERM INT
rm -f /tmp/registered
if hawthorn keys register /keys --superlink superlink-control:9093; then
    touch /tmp/registered
else
    kill -TERM $superlink
fi
while kill -0 $superlink 2>/dev/null; do wait $superlink && code=0 || code=$?; done
exit "${code:-1}"
