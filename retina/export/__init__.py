"""A detector as one file for other runtimes, and the proof that it finds the same there. Beside the road."""
