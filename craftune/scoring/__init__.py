"""Scoring by itself: any images, any rewards, no run needed."""
