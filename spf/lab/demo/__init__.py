"""Demonstration tasks with a measurable utility."""
