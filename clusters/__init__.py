"""Where a search runs: Ray on this machine, several local nodes, or a cluster that takes jobs.

connect      start a private Ray on this machine, or join a cluster
local_nodes  a cluster of several nodes on this machine, to try one
packing      what is sent to a cluster, and where its files are stored there
jobs         submit, list and stop searches on a cluster, and read their logs
commands     the commands of this package

The folder also has a Dockerfile and templates for Kubernetes, AWS, Google Cloud and Slurm. May
import ray, `search` and `methods`; not `dashboards`.
"""
