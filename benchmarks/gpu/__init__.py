"""GPU benchmarks of the ops and of whole explanations, each row checked before it is timed. See ../README.md."""
