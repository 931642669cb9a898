"""Requests, scheduling and generation: many sequences on one model, one step at a time."""
