#!/usr/bin/env bash
# Stops what start.sh started, by the process ids that it left, and takes its configuration away.
spool=/var/spool/kvt-slurm
for file in "$spool"/slurmd.pid "$spool"/slurmctld.pid; do
    pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null
done
for file in slurm.conf gres.conf; do
    grep -q '^# kv-transition' "/etc/slurm/$file" 2>/dev/null && rm -f "/etc/slurm/$file"
done
exit 0
