"""What runs: checking a job, measuring its trials, and the study's run on Ray.

job_check, study_task           from a job to the record that workers get
task, worker, built_candidate, measurement   measure one recipe, rung by rung, without ray
single_measurement              measure one recipe without a study; does not import ray
early_stopping                  whether a trial goes on to its next rung
candidates, preparations        trained weights of candidates and of whole studies
ray_environment                 variables that must be set before ray is imported
trial_actor, searcher, tune     trials with Ray Tune; tune_internals holds what is not documented
ray_cluster, nodes, resources   Ray tasks, the cluster's nodes and how trials share them
run_study, front_latency, certification, recovery   the steps of a study and after it

The only room of `search` that may import ray. May import stats, files, data, models, runtimes,
measure, training and study; not export, tracking, compare or commands.
"""

from vitpareto.search.trials import ray_environment as ray_environment
