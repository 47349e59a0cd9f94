#!/usr/bin/env bash
# Stop the processes that start.sh started, by their recorded process ids, and remove their configuration.
spool=/var/spool/kvt-slurm
for file in "$spool"/slurmd.pid "$spool"/slurmctld.pid; do
    pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null
done
for file in slurm.conf gres.conf; do
    grep -q '^# kv-transition' "/etc/slurm/$file" 2>/dev/null && rm -f "/etc/slurm/$file"
done
exit 0
