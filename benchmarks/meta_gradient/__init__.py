"""Meta-gradients of palf_dist against those of other libraries; ``python -m benchmarks.meta_gradient``."""
