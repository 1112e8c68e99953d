"""Bundles to deploy: written, verified, quantised and timed."""
