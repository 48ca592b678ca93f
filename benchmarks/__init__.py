"""Benchmarks: one question a script, printed and written as JSON."""
