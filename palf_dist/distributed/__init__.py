"""Runs that are spread over Ray workers, or done in process by the same code. The only place that imports ray."""
