"""Ray job: ``palf-dist meta-train`` on the cluster that it runs on, started or resumed.

Entry point of a RayJob, or of
``ray job submit --working-dir . -- python jobs/meta_train.py --config FILE --run-dir URI [--max-restarts N]``.
"""

from palf_dist.jobs.entry import main

if __name__ == "__main__":
    main("meta-train")
