"""Ray job: ``palf-dist evaluate`` on the cluster that it runs on.

Entry point of a RayJob, or of
``ray job submit --working-dir . -- python jobs/evaluate.py POLICY --config FILE [--max-restarts N]``.
"""

from palf_dist.jobs.entry import main

if __name__ == "__main__":
    main("evaluate")
