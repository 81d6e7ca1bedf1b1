#!/bin/sh
# Checks the compose files with whatever is installed: docker compose, docker-compose, both or none.
set -eu
cd "$(dirname "$0")/.."
found=0
for tool in "docker compose" docker-compose; do
    $tool version >/dev/null 2>&1 || continue
    found=1
    $tool -f docker-compose.yml config --quiet
    $tool -f docker-compose.yml -f docker-compose.gpu.yml config --quiet
    echo "$tool: the compose files are well-formed"
done
[ $found = 1 ] || echo "no docker compose here: the compose files were not checked"
