"""What every other package uses: errors of one line, files that are written whole, checksums, locks."""
