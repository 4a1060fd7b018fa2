"""Stages: each a function from files to files, usable alone in a notebook or a test."""
