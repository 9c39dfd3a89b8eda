"""The spec types that are built in, one file each."""
