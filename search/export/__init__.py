"""Bundles to deploy: written, verified, quantised and timed.

- `trial_choice`: which trial of a study is exported
- `rebuilt_trial`: the measured model of a trial, rebuilt with its images
- `bundle`, `bundle_result`, `program_results`, `preprocessing`, `readme`: the folder and its files
- `reference_outputs`, `isolated_process`, `verification`: proof that the exported programs are the
  measured model
- `int8`, `specialised`: additional programs; `torch_internals` holds what torch does not document
- `benchmark`: latency of a bundle's programs

Only this room and `search.runtimes` may import onnx and onnxruntime. May import stats, data,
models, runtimes, measure and study; not files, training, trials, tracking or compare.
"""
