#!/usr/bin/env bash
# Start a Slurm cluster of one node on this machine, as root, and wait until it accepts jobs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
spool=/var/spool/kvt-slurm

mkdir -p /run/munge /etc/slurm "$spool"/state "$spool"/spool
chown munge: /run/munge
chmod 755 /run/munge
# jobs are submitted without SLURM_CONF, so the files are in the folder that Slurm reads by default
install -m 644 slurm.conf gres.conf /etc/slurm/

munge --no-input >/dev/null 2>&1 || runuser -u munge -- munged
scontrol ping 2>/dev/null | grep -q 'is UP' || slurmctld -c
pid=$(cat "$spool/slurmd.pid" 2>/dev/null || true)
[ -n "$pid" ] && kill -0 "$pid" 2>/dev/null || slurmd -N localhost

for _ in $(seq 100); do
    [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ] && exit 0
    sleep 0.2
done
sinfo >&2
tail -n 5 "$spool"/slurmctld.log "$spool"/slurmd.log >&2
exit 1
