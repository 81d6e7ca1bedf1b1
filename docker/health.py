"""Exit with 0 if a container does its work: its own gRPC health answers, and what it depends on takes connections.

    health.py 127.0.0.1:9100 [HOST:PORT ...] [--tls CA --name NAME] [--file PATH] [--writable FOLDER]

A container whose network is gone still answers itself; the connections to others are what shows that.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 4.0


def main() -> int:
    """Ask everything once; say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", help="address of this container's gRPC health service")
    parser.add_argument("needs", nargs="*", help="addresses that must take a connection")
    parser.add_argument("--tls", type=Path, help="authority of the health service's certificate, if it has one")
    parser.add_argument("--file", type=Path, help="must exist")
    parser.add_argument("--writable", type=Path, help="folder that must be writable")
    given = parser.parse_args()
    try:
        ask(given.own, given.tls)
        for address in given.needs:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, RuntimeError) as error:
        print(f"unhealthy: {error}")
        return 1
    if given.file is not None and not given.file.exists():
        print(f"unhealthy: {given.file} does not exist yet")
        return 1
    if given.writable is not None and not os.access(given.writable, os.W_OK):
        print(f"unhealthy: user {os.getuid()} cannot write {given.writable}; set HAWTHORN_UID and HAWTHORN_GID")
        return 1
    return 0


def ask(address: str, authority: Path | None) -> None:
    """Ask a gRPC health service; `RuntimeError` unless it serves."""
    options = [("grpc.enable_http_proxy", 0)]
    if authority is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.read_bytes()), options)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            raise RuntimeError(f"{address} does not answer: {error.code().name}") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"{address} answers {answer.status}")


if __name__ == "__main__":
    sys.exit(main())
