"""Processes and their faults: distributed start, signals, lock, compilation cache, crash record."""
