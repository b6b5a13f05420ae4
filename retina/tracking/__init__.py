"""Beside the road: how people watch a run. Trackers, curves, and the bars of a terminal."""
