"""The promises of exact resume under real faults. `python -m tests.chaos` runs them in full and prints one table; the
tests under tests/reliability call the same functions with small numbers."""
