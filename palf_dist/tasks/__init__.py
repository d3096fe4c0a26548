"""Where tasks come from: real datasets, the corruptions they are put through, and the families they are drawn from."""
