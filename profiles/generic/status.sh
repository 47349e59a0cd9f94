#!/usr/bin/env bash
# Print the state of a Slurm job: running, success or failed.
case $(scontrol show job "$1" 2>/dev/null | grep -o 'JobState=[A-Z_]*') in
    *=COMPLETED) echo success ;;
    *=PENDING | *=CONFIGURING | *=RUNNING | *=COMPLETING | *=SUSPENDED | *=REQUEUED) echo running ;;
    *) echo failed ;;
esac
