"""Shared utilities: one-line errors, command-line flags, atomic file writes, checksums, locks, devices."""
