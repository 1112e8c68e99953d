#!/usr/bin/env bash
# One search on Slurm: Ray on the nodes of the allocation, the driver on its head. Ray stops when
# the search ends.
#
#   sbatch --nodes=4 --gpus-per-node=4 clusters/slurm.sh job.yaml
#   sbatch --nodes=1 clusters/slurm.sh job.yaml --set trials=400      # options of `search`
#
# The job's store must be on a file system that all nodes mount (store: /shared/studies), or in
# object storage. Submitting the same job again continues the study, also after a time limit.
#SBATCH --job-name=vitpareto
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=vitpareto-%j.log
#SBATCH --open-mode=append

set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: sbatch [--nodes=N] clusters/slurm.sh JOB.yaml [options of vitpareto search]" >&2
  exit 2
fi

# compute nodes have several names; the others reach the head by its first address
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
# ports below Ray's range for workers, different for each job, as nodes may be shared
port=$((6400 + SLURM_JOB_ID % 1000))

# a token for this job, in a file that only its owner can read and that all nodes see
token="${VITPARETO_TOKENS:-$HOME/.vitpareto}/token-$SLURM_JOB_ID"
umask 077
mkdir -p "$(dirname "$token")"
trap 'rm -f "$token"' EXIT
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$token"

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0
# decoded images are stored on each node's own disk if it has one
export VITPARETO_CACHE="${VITPARETO_CACHE:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/vitpareto-$USER}"

# every node runs this command; the one with this address becomes the head and runs the search
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --include-dashboard=false --disable-usage-stats -- \
  vitpareto search "$@" --address auto
