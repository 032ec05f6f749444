#!/bin/bash
# `docker exec CONTAINER dropforge ...` arrives as root; what it writes must belong to the services' user.
exec /usr/local/bin/dropforge-shell /opt/venv/bin/dropforge "$@"
