"""Every method that needs no training, at its first published setting, exported and verified.

    python tests/benchmarks/verify_methods.py

On the embedded model with all its blocks and images: the table of `vitpareto verify`, its largest
difference over batches 1, 2 and 5 of each runtime. Minutes; the suite does the same on two blocks.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.search.export.bundle import export
from vitpareto.search.export.verification import verify
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

SETTINGS = {"dense": {}, "resize": {"size": 48}, "random": {"keep_rate": 0.75}}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = SearchConfig.of(
            {"name": "all", "store": scratch, "cache": f"{scratch}/cache", "device": "cpu"}
        )
        prepared = check_job(config)
        prepared.folder.write_job(JobRequest(config.plain()))
        prepared.folder.identity.settle(prepared.identity)
        place = Worker.open(study_task(prepared, threads=2))
        untrained = [n for n in methods.names() if methods.get(n).training != "required"]
        print(f"{'method':<12}{'eager':>9}{'onnx':>9}{'pt2':>9}  class  tied  wrong      s  recipe")
        for trial, name in enumerate(untrained):
            declared = methods.get(name)
            params = SETTINGS.get(name)
            if params is None:
                params = declared.preset(declared.presets[0], prepared.model.shape)
            result = measure_recipe(place, trial, Recipe.of(name, **params))
            assert result.state == "finished", result
            prepared.folder.trials.write(result)
            begin = time.monotonic()
            found = verify(export(prepared.folder, result, Path(scratch) / f"bundle-{trial}"))
            seconds = time.monotonic() - begin
            rows = found.comparisons
            worst = [
                max(c.max_difference for c in rows if c.runtime == runtime)
                for runtime in ("eager", "onnxruntime", "torch.export")
            ]
            print(
                f"{name:<12}{''.join(f'{w:>9.1e}' for w in worst)}"
                f"{f'{min(c.same_class for c in rows)}/{found.images}':>7}"
                f"{max(c.near_tied for c in rows):>6}{sum(c.wrong for c in rows):>7}"
                f"{seconds:>7.0f}  {result.recipe}",
                flush=True,
            )


if __name__ == "__main__":
    main()
