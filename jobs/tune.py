"""Ray job: ``palf-dist tune`` on the cluster that it runs on, started or resumed.

Entry point of a RayJob, or of
``ray job submit --working-dir . -- python jobs/tune.py --config FILE --run-dir URI [--max-restarts N]``.
"""

from palf_dist.jobs.entry import main

if __name__ == "__main__":
    main("tune")
