"""Runs as Ray jobs: what is sent to a cluster, how it is sent and followed, what starts or resumes the run there."""
