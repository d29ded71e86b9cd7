"""Pluggable storage backends for anything that builds in steps."""
